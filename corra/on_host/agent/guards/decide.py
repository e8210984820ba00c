"""The keeper's decisions, as functions of what it sees."""

from ..contract import CARRIER_DEADLINE_NS, KILL_DEADLINE_NS


def kill_deadline_ns(options):
    """Return how long after the first KILL the keeper gives up on survivors."""
    return KILL_DEADLINE_NS + (CARRIER_DEADLINE_NS if options.get("carrier") else 0)


def step(view, now):
    """Return (action, when to look again) for what the keeper sees. Times are monotonic ns.

    `Keeper.do_ACTION` carries an action out. The end comes in this order: the record, which has
    the exit status; the drain of the output; state.json; reap; leave, when no process holds the
    FIFOs any more. The next keeper can repeat each of them.
    """
    stop, wake = view["stop"], None
    if stop and stop[3] == "done":
        stop = None
    if view["timed"] and view["timeout_at"] and not view["stop"]:
        if now >= view["timeout_at"]:
            return "timeout", None
        wake = view["timeout_at"]
    if stop:
        if stop[3] == "grace" and view["alone"]:
            return "stopped", None
        if stop[3] == "grace" and now >= stop[2]:
            return "kill", None
        if stop[3] == "killing" and (view["alone"] or now >= stop[2] + view["kill_ns"]):
            return "stopped", None
        if stop[3] == "killing" and now >= view["again_at"]:
            return "kill", None
        due = stop[2] if stop[3] == "grace" else view["again_at"]
        wake = min(wake or due, due)
    if view["ended"]:
        if not view["recorded"]:
            if now >= view["retry_at"]:
                return "record", None
            wake = min(wake or view["retry_at"], view["retry_at"])
        elif not view["final"]:
            if view["alone"] or not view["wait_children"]:
                return "finish", None
        elif not view["due"] and not view["told"]:
            return "tell", None
        elif not view["due"] and not view["reaped"]:
            return "reap", None
        elif not view["due"] and not view["open"] and not stop and not view["courier"]:
            return "leave", None
    if view["courier_at"] is not None:
        if now >= view["courier_at"]:
            return "courier", None
        wake = min(wake or view["courier_at"], view["courier_at"])
    if view["blocked"]:
        if now >= view["room_at"]:
            return "unblock", None
        wake = min(wake or view["room_at"], view["room_at"])
    if view["heed_at"] is not None:
        if now >= view["heed_at"]:
            return "heed", None
        wake = min(wake or view["heed_at"], view["heed_at"])
    return None, wake
