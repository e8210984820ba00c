"""The verbs start and run."""

import errno
import posix as os
import sys
import time

from ..contract import FULL, LAYOUT, START_DEADLINE_S, VERSION, Refusal
from ..files import fill
from ..kernel import now_ns, widen
from ..paths import octets, parent
from ..spool import claim, prepare_root, roots, user_name
from .archived import ArchivedRun
from .courier_file import place_courier
from .daily import daily_gc
from .finding import find_exact
from .ids import new_id
from .late import late
from .outliving import outliving
from .requests import start_complaints
from .starter import give_up, spawn_guards


def new_run(request, stdin, reply):
    """Return the run, and make it unless it exists. Raises Refusal."""
    prog_id = request["prog_id"]
    there = find_exact(request, prog_id)
    if there:
        drop_claim(request, there)
        return same_program(there, request)
    request["before"] = outliving(request)  # its refusal must come before anything is made
    stored = {
        key: request[key]
        for key in (
            *("prog_id", "name", "origin", "fleet"),
            *("program", "run", "callback", "config"),
        )
        if request.get(key)
    }
    token = (request.get("secrets") or {}).get("token")
    if stored.get("callback"):
        token = stored["callback"].get("token") or token
        stored["callback"] = {
            key: value for key, value in stored["callback"].items() if key != "token"
        }
        place_courier(request.get("courier"))
    stored.update(user=user_name(), created=now_ns(), layout=LAYOUT, agent=VERSION)
    source = request["program"].get("stdin")

    def feed(directory):
        """Fill the file `stdin`."""
        if isinstance(source, str):
            fill(directory, "stdin", octets(source))
            return
        digest = None
        if source.get("sha256"):
            import hashlib  # only here, as it takes 5 ms

            digest = hashlib.sha256()
        reply.first_line(" send")
        fd = os.open("stdin", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=directory)
        try:
            widen(stdin.fd, 4)
            stdin.pour(fd, source["bytes"], digest)
        except EOFError as error:
            raise Refusal("bad_request", str(error)) from None
        finally:
            os.close(fd)
        if digest and digest.hexdigest() != source["sha256"]:
            raise Refusal(
                "bad_request",
                "the bytes for stdin are not those announced: they changed while they were read",
            )

    tried = []
    for root in roots(request):
        try:
            runs = prepare_root(root)
            try:
                claim(
                    runs,
                    prog_id,
                    stored,
                    feed if source is not None and source != {"open": True} else None,
                    token,
                )
            finally:
                os.close(runs)
            # Whose claim it is, and whether the archive has it by now: this start may have been
            # stopped since it looked.
            there = find_exact(request, prog_id)
            if there:
                drop_claim(request, there)
                return same_program(there, request)
            raise Refusal("unreadable", "%s was removed just now" % prog_id, dir=root)
        except OSError as error:
            tried.append(
                {"dir": root, "errno": error.errno, "message": error.strerror or str(error)}
            )
            if isinstance(source, dict) and error.errno in FULL:
                break  # half of stdin was read, and the next root would need it all
    if tried[0]["errno"] == errno.EOPNOTSUPP:
        raise Refusal(
            "unsupported",
            "keep_output can't be used in %(dir)s: %(message)s" % tried[0],
            tried=tried,
        )
    raise Refusal("no_room", "no room for the spool: %s" % tried[0]["message"], tried=tried)


def drop_claim(request, run):
    """Remove the claims of a run that the archive has, which nobody has launched or will."""
    if isinstance(run, ArchivedRun):
        for root in roots(request):
            try:
                late("remove_claim")(root, run.prog_id)
            except OSError:
                pass  # there is none; or gc does it later


def same_program(run, request):
    """Return the run. Raises Refusal where it is another program's."""
    if run.request["program"] != request["program"]:
        raise Refusal("conflict", "this id already names another command", there=run.state())
    return run


def start_run(request, stdin, reply):
    """Start the program unless it was started; return its Run and State.

    It is safe to repeat with the same id. Raises Refusal.
    """
    if not sys.platform.startswith("linux"):
        raise Refusal(
            "unsupported", "the agent is for Linux, this is %s: use the chaperone" % sys.platform
        )
    wrong = start_complaints(request)
    if wrong:
        raise Refusal("bad_request", "; ".join(wrong), complaints=wrong)
    request["prog_id"] = request.get("prog_id") or new_id()
    umask = os.umask(0o077)
    run = new_run(request, stdin, reply)
    try:
        daily_gc(request, parent(parent(run.path)))
    except OSError:
        pass  # no room or no process for it: a later start cleans up
    secret = (request.get("secrets") or {}).get("env") or {}
    # Before `abandoned` would say so, since this start knows the reason.
    deadline, pause_s = time.monotonic() + START_DEADLINE_S * 0.8, 0
    wrong = OSError(0, "each died at once")
    while True:
        state = run.state()
        late = time.monotonic() > deadline
        if state["state"] != "starting" or (state["supervisor"] != "gone" and late):
            return run, state
        # It is new, or the guards that began it died before they launched anything.
        if state["supervisor"] == "gone" and late:
            give_up(run, wrong, "no guard could be started here: " + wrong.strerror)
        elif state["supervisor"] == "gone":
            before = outliving(run.request) if request.get("before") is None else request["before"]
            if pause_s:
                time.sleep(max(0.001, min(pause_s, deadline - time.monotonic())))
            pause_s = min(pause_s * 2 or 0.01, 1)
            try:
                spawn_guards(
                    dict(run.request, secret_env=secret, umask=umask, before=before), run.path
                )
            except OSError as error:
                wrong = error
        else:
            time.sleep(0.01)


def verb_start(request, stdin, reply, framed):
    reply.send(start_run(request, stdin, reply)[1])


def verb_run(request, stdin, reply, framed):
    run, state = start_run(request, stdin, reply)
    reply.send(state)
    if state["state"] != "not_started":
        late("Follower")(run, request, stdin if framed else None, reply.out).go()
