"""Finding the run that a request names: in ROOT/runs, then in the archive.

A run is taken out of ROOT/runs only once it is in the archive. So whoever looks in this order, and
finds it in neither, knows that it was nowhere.
"""

from ..contract import FINAL, Refusal
from ..files import exists
from ..spool import roots, user_name
from .archive import in_archives
from .ended import spools, unreadable
from .held import HeldRun
from .ids import tail_of, valid_id
from .known import Known, state_word

SHOWN_MOST = 20


def archived_line(request, prog_id):
    """Return the Line of exactly this id in an archive, or None. Raises Refusal."""
    found = in_archives(request, lambda archive: archive.with_id(prog_id))
    return next(filter(None, found), None)


def find_exact(request, prog_id):
    """Return the run with exactly this id, or None. Raises Refusal where a root can't be read.

    A claim that nobody has launched stands behind the archive: who made it may have been stopped
    while another start of this id ran, ended and was folded away.
    """
    run = find_claimed(request, prog_id)
    if run and exists(run.directory, "launched"):
        return run
    line = archived_line(request, prog_id)
    if line and run:
        run.close()
    return line.open() if line else run


def find_claimed(request, prog_id):
    """Return the run of this id in ROOT/runs, or None. Raises Refusal."""
    for root in roots(request):
        try:
            return HeldRun(root, prog_id)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise unreadable(error.filename or root, error) from None
    return None


def ambiguous(message, found):
    """Return the refusal of a text that means each of the Known in `found`."""
    states = []
    for known in found[:SHOWN_MOST]:
        try:
            run = known.open()
            states.append(run.state())
            run.close()
        except OSError:
            pass  # removed just now
    return Refusal("ambiguous", message, runs=states)


def readable(known):
    """Return whether the run can be read: another user's and a damaged one can't."""
    try:
        known.open().close()
    except OSError:
        return False
    return True


def find(request):
    """Return the run that the request names.

    Tried in this order: the full id; the name, of which an open run or else the newest is taken;
    the beginning of an id's tail. Raises Refusal, also for a name that several open runs have: the
    newest of them would be a guess.
    """
    text = request.get("prog_id") or ""
    exact = find_exact(request, text) if valid_id(text) else None
    if exact:
        return exact
    total, named, begun = 0, [], {}
    for spool in spools(request):
        for prog_id, cached in spool.each():
            total += 1
            if len(text) >= 2 and text in prog_id and tail_of(prog_id).startswith(text):
                begun[prog_id] = Known(spool.root, prog_id, 0, 0, "", None)
            try:
                known = cached or spool.read_if(prog_id, text)
                if known and known.about().name == text:
                    named.append(known)
            except OSError:
                pass  # removed since it was listed, another user's, or damaged
        spool.close()
    tails = valid_id(text) and len(text) >= 2
    for newest, lines, count in in_archives(
        request,
        lambda archive: (
            archive.with_name(text),
            archive.with_tail(text, SHOWN_MOST) if tails else (),
            archive.count(),
        ),
    ):
        total += count
        named += [newest] if newest else []
        for line in lines:
            begun[line.prog_id] = line
    open_ = [known for known in named if known.word and state_word(known.word) not in FINAL]
    if len(open_) > 1:
        open_.sort(key=Known.key, reverse=True)
        raise ambiguous("%d open runs are called %s" % (len(open_), text), open_)
    if named:
        return opened(request, open_[0] if open_ else max(named, key=Known.key))
    begun = {prog_id: known for prog_id, known in begun.items() if readable(known)}
    if len(begun) == 1:
        return opened(request, *begun.values())
    if begun:
        found = [begun[prog_id] for prog_id in sorted(begun)]
        raise ambiguous("%d runs begin with %s" % (len(begun), text), found)
    raise Refusal("not_found", "no run %s among %d" % (text, total), count=total, user=user_name())


def opened(request, known):
    """Return the run of a Known, which may have been folded away since. Raises Refusal."""
    run = find_exact(request, known.prog_id)
    if run is None:
        raise Refusal("not_found", "the run was removed just now", user=user_name())
    return run
