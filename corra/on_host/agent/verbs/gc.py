"""The verb gc, and what a start cleans up once a day."""

import posix as os
import time

from ..contract import FINAL, KEEP_BAD_S, KEEP_GOOD_S
from ..files import discard
from ..kernel import now_ns
from ..paths import CODE, absolute, base, join, parent, present
from .archive import Archive, forget_month, make_archive
from .ended import spools, unreadable
from .finding import find
from .fold import GONE, cover, fold, lockable
from .known import state_word

KEEP_RECORD_S, KEEP_YOUNG_S, KEEP_AGENT_S = 400 * 86400, 3 * 86400, 30 * 86400
KEEP_BYTES = 2 << 30
# A client waits 15 s for an answer, and may ask again for what is left.
PATIENCE_S = 5.0


def due_runs(request, found, now):
    """Return those of the Known in `found` that are to be folded away, the oldest end first.

    Output goes by its age, then the oldest beyond `max_size`. A run that has none goes KEEP_YOUNG_S
    after its end.
    """
    ids, older = request.get("ids"), request.get("older")
    most = KEEP_BYTES if request.get("max_size") is None else request["max_size"]
    bare_s = KEEP_YOUNG_S if request.get("records") is None else request["records"]
    total, due = sum(known.held for known in found), []
    for known in sorted(found, key=lambda known: (known.ended_ns(), known.prog_id)):
        age_s = (now - known.ended_ns()) / 1e9
        keep_s = known.keep_s or (KEEP_GOOD_S if known.word == "done" else KEEP_BAD_S)
        surplus = total > most and age_s > KEEP_YOUNG_S
        if surplus:
            total -= known.held
        if ids is not None:
            wanted = known.prog_id in ids and known.held
        elif known.held:
            wanted = surplus or age_s > (keep_s if older is None else older)
        else:
            wanted = age_s > bare_s
        if wanted:
            due.append(known)
    return due


def ended_runs(spool, over):
    """Return (the Known of each run that has ended, how many runs were not looked at)."""
    found, left = [], 0
    for prog_id, cached in spool.each():
        if cached is None and over():
            left += 1
            continue
        try:
            known = cached or spool.read(prog_id)
        except OSError:
            continue  # removed since it was listed, another user's, or damaged
        known.text = None
        if state_word(known.word) in FINAL:
            found.append(known)
    return found, left


def collect(request, now, over):
    """Return what gc removes, and remove it unless `dry`, until `over()`; `left` is the rest."""
    dry, left = request.get("dry"), 0
    by_root, found = {}, []
    for spool in spools(request):
        ended, unread = ended_runs(spool, over)
        by_root[spool.root] = spool
        found += ended
        left += unread
    # By how much there is of all of them, the oldest are told; so all must be known first.
    # Their age is that of now: a lost run may have been noted while they were looked at.
    due = due_runs(request, found, now_ns()) if not left else []
    removed, freed, folded, forgotten = [], 0, 0, []
    for root, spool in by_root.items():
        spool.flush()
        of_root = [known for known in due if known.root == root]
        done, emptied, rest = would_go(of_root) if dry else fold(root, of_root, over)
        removed += [known.prog_id for known in done + emptied if known.held]
        freed += sum(known.held for known in done + emptied)
        folded += len(done)
        left += len(rest)
        if request.get("ids") is None and not left:
            try:
                forgotten += forget(root, now, dry)
            except OSError as error:
                raise unreadable(join(root, "archive"), error) from None
        if not dry:
            tidy(spool, now)
        spool.close()
    return {
        "removed": sorted(set(removed) - set(forgotten)),
        "forgotten": sorted(forgotten),
        "folded": folded,
        "freed": freed,
        "left": left,
        "dry": bool(dry),
    }


def would_go(due):
    """Return what `fold` would: those of the Known in `due` that nothing keeps from going."""
    found = []
    for each in lockable(due):
        found.append(each.known)
        each.let_go()
    return found, [], []


def forget(root, now, dry):
    """Remove the months whose runs all ended KEEP_RECORD_S ago; return the ids of those.

    Not before: a start that is repeated after its record is gone would run again. A runbook's
    record stays.
    """
    try:
        archive = Archive(root)
    except (FileNotFoundError, NotADirectoryError):
        return []
    try:
        if not dry:
            archive.lock()
        forgotten = []
        for month in archive.months():
            if month.ends()[1] < now - KEEP_RECORD_S * 10**9:
                forgotten += forget_month(archive, month, dry)
        return forgotten
    finally:
        archive.close()


def tidy(spool, now):
    """Remove what starters and gc left behind when they died; write the cache anew if it pays."""
    try:
        archive = make_archive(spool.root)
    except OSError:
        return
    try:
        archive.lock()  # whoever removes a directory has it
        for month in archive.months():
            cover(month)
        for name in os.listdir(spool.runs):
            try:
                if name.startswith(GONE) or (
                    name.startswith(".new-")
                    and os.stat(name, dir_fd=spool.runs).st_mtime < now / 1e9 - 3600
                ):
                    discard(spool.runs, name)
            except OSError:
                pass  # the next gc does it
        spool.compact()
    except OSError:
        pass
    finally:
        archive.close()


def sweep_agents(now_s):
    """Remove agents that nobody has started for KEEP_AGENT_S."""
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
    """Reply with what was removed in PATIENCE_S at most, and how many runs are `left`."""
    if request.get("ids") is not None:
        found = [find({"prog_id": each, "spool": request.get("spool")}) for each in request["ids"]]
        request["ids"] = [run.prog_id for run in found]
        for run in found:
            run.close()  # nobody holds it, then
    deadline = time.monotonic() + PATIENCE_S
    found = collect(request, now_ns(), lambda: time.monotonic() > deadline)
    if not request.get("dry"):
        sweep_agents(time.time())
    reply.send(found)


def clean_up(request):
    """Do what a start does once a day."""
    collect({"spool": request.get("spool")}, now_ns(), lambda: False)
    sweep_agents(time.time())
