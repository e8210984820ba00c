"""The verb gc, and the daily cleaning by a start."""

import fcntl
import posix as os
import time

from ..contract import FINAL, KEEP_BAD_S, KEEP_GOOD_S
from ..files import discard, exists, read_file
from ..kernel import now_ns
from ..paths import CODE, absolute, base, join, parent, present
from ..records import Record
from ..run import Run
from ..spool import read_launched, roots, secure
from .ended import spools
from .finding import find

KEEP_RECORD_S, KEEP_YOUNG_S, KEEP_AGENT_S = 400 * 86400, 3 * 86400, 30 * 86400
KEEP_BYTES = 2 << 30


class EndedRun:
    """A run that gc may remove: ended, unguarded, unwatched, with nothing owed to a collector."""

    def __init__(self, root, prog_id, run, state, now):
        self.root, self.prog_id, self.run, self.state = root, prog_id, run, state
        launched = read_launched(read_file(run.directory, "launched"))
        record = Record.read((run.pages() or (b"",))[0]) or Record()
        self.end_ns = (
            record.outcome[1]
            if record.outcome
            else launched[3]
            if launched
            else run.request.get("created", 0)
        )
        self.age_s = now / 1e9 - self.end_ns / 1e9
        self.bytes = sum(stat.st_blocks * 512 for stat in run.sizes().values())
        good = state["state"] == "exited" and state["status"] == 0
        self.keep_s = (run.request.get("run") or {}).get("keep") or (
            KEEP_GOOD_S if good else KEEP_BAD_S
        )

    def drop_output(self):
        """Empty the files that grow. Readers find their lengths in the record."""
        for name in self.run.streams + ["index", "stdin"]:
            try:
                os.truncate(
                    os.open(name, os.O_WRONLY | os.O_NOFOLLOW, dir_fd=self.run.directory), 0
                )
            except FileNotFoundError:
                pass


def collectable_runs(request, now):
    """Yield the runs that gc may remove, each locked against watchers until the next."""
    ids = [(spool.root, prog_id) for spool in spools(request) for prog_id, _ in spool.each()]
    for root, prog_id in ids:
        try:
            run = Run(root, prog_id)
        except OSError:
            continue
        try:
            state = run.state()
        except OSError:
            run.close()  # damaged: its output is all that is left of it
            continue
        owed = state["callback"] and not state["callback"].get("completed")
        index = (
            os.open("index", os.O_RDONLY, dir_fd=run.directory)
            if exists(run.directory, "index")
            else None
        )
        try:
            if index is not None:
                fcntl.flock(index, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if state["state"] in FINAL and not run.alive() and not owed:
                yield EndedRun(root, prog_id, run, state, now)
        except BlockingIOError:
            pass  # the run is watched
        finally:
            if index is not None:
                os.close(index)
            run.close()


def collect(request, now):
    """Return what gc removes, and remove it unless `dry`.

    Output goes by its age, then the oldest beyond `max_size`; records go after KEEP_RECORD_S.
    """
    ids, older, dry = request.get("ids"), request.get("older"), request.get("dry")
    most = KEEP_BYTES if request.get("max_size") is None else request["max_size"]
    sizes = sorted(
        (ended.end_ns, ended.bytes, ended.age_s, ended.prog_id)
        for ended in collectable_runs(request, now)
    )
    total, surplus = sum(size for _, size, _, _ in sizes), set()
    for _, size, age_s, prog_id in sizes:
        if total > most and age_s > KEEP_YOUNG_S:
            surplus.add(prog_id)
            total -= size
    removed, forgotten, freed = [], [], 0
    for ended in collectable_runs(request, now):
        old = ended.age_s > (ended.keep_s if older is None else older)
        wanted = ended.prog_id in ids if ids is not None else old or ended.prog_id in surplus
        runbook = (ended.run.request.get("origin") or {}).get("runbook")
        if ids is None and ended.age_s > KEEP_RECORD_S and not runbook:
            # Not before: a start that is repeated after its record is gone would run again.
            forgotten.append(ended.prog_id)
            freed += ended.bytes
            if not dry:
                runs = os.open(join(ended.root, "runs"), os.O_RDONLY | os.O_DIRECTORY)
                discard(runs, ended.prog_id)
                os.close(runs)
        elif wanted and ended.bytes:
            removed.append(ended.prog_id)
            freed += ended.bytes
            if not dry:
                ended.drop_output()
    return {
        "removed": sorted(removed),
        "forgotten": sorted(forgotten),
        "freed": freed,
        "dry": bool(dry),
    }


def sweep_leftovers(request, now_s):
    """Remove half-made runs of starters that died, and agents not started for KEEP_AGENT_S."""
    for root in roots(request):
        try:
            runs = secure(join(root, "runs"))
        except OSError:
            continue
        for name in os.listdir(runs):
            if name.startswith(".new-") and os.stat(name, dir_fd=runs).st_mtime < now_s - 3600:
                discard(runs, name)
        os.close(runs)
    own = parent(absolute(CODE.co_filename))
    cache = parent(own)
    if len(base(own)) != 64:
        return  # run by hand and not from a cache
    for name in os.listdir(cache):
        path = join(cache, name + "/agent.py")
        if len(name) != 64 or name == base(own) or not present(path):
            continue
        # Every start reads the file to check its hash, which moves atime at least once a day.
        if max(os.stat(path).st_atime, os.stat(path).st_mtime) < now_s - KEEP_AGENT_S:
            above = os.open(cache, os.O_RDONLY | os.O_DIRECTORY)
            discard(above, name)
            os.close(above)


def verb_gc(request, stdin, reply, framed):
    if request.get("ids") is not None:
        request["ids"] = [
            base(find({"prog_id": each, "spool": request.get("spool")}).path)
            for each in request["ids"]
        ]
    found = collect(request, now_ns())
    if not request.get("dry"):
        sweep_leftovers(request, time.time())
    reply.send(found)


def daily_gc(request, root):
    """Clean up once a day, in a process of its own that no start waits for."""
    stamp = join(root, "gc")
    try:
        if os.stat(stamp).st_mtime > time.time() - 86400:
            return
    except FileNotFoundError:
        pass
    os.close(os.open(stamp, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600))
    os.utime(stamp, None)
    if os.fork():
        return
    try:
        os.setsid()
        if not os.fork():
            null = os.open("/dev/null", os.O_RDWR)
            for number in range(3):
                os.dup2(null, number)
            collect({"spool": request.get("spool")}, now_ns())
            sweep_leftovers(request, time.time())
    finally:
        os._exit(0)
