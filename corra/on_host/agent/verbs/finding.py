"""Finding the run that a request names."""

from ..contract import FINAL, Refusal
from ..run import Run
from ..spool import roots, user_name
from .ended import spools, unreadable
from .ids import tail_of, valid_id
from .known import state_word


def find_exact(request, prog_id):
    """Return the run with exactly this id, or None. Raises Refusal where a root can't be read."""
    for root in roots(request):
        try:
            return Run(root, prog_id)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise unreadable(error.filename or root, error) from None
    return None


def ambiguous(message, found):
    """Return the refusal of a text that means each of `found`, (root, prog_id) each."""
    return Refusal("ambiguous", message, runs=[Run(*each).state() for each in found[:20]])


def named_or_ended(spool, prog_id, name):
    """Return the Known of a run that isn't in the cache; None for an open run of another name.

    Raises OSError.
    """
    run = Run(spool.root, prog_id)
    try:
        if run.request.get("name") != name and run.alive():
            return None
    finally:
        run.close()
    return spool.read(prog_id)


def readable(root, prog_id):
    """Return whether the run can be read: another user's and a damaged one can't."""
    try:
        Run(root, prog_id).close()
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
    total, named, begun = 0, [], []
    for spool in spools(request):
        for prog_id, cached in spool.each():
            total += 1
            if len(text) >= 2 and text in prog_id and tail_of(prog_id).startswith(text):
                begun.append((spool.root, prog_id))
            try:
                known = cached or named_or_ended(spool, prog_id, text)
                if known and known.name() == text:
                    is_open = state_word(known.word) not in FINAL
                    named.append((is_open, known.created, spool.root, prog_id))
            except OSError:
                pass  # removed since it was listed, another user's, or damaged
        spool.close()
    open_ = [each for each in named if each[0]]
    if len(open_) > 1:
        found = [each[2:] for each in sorted(open_, reverse=True)]
        raise ambiguous("%d open runs are called %s" % (len(found), text), found)
    if named:
        return Run(*max(named)[2:])
    begun = [each for each in begun if readable(*each)]
    if len(begun) == 1:
        return Run(*begun[0])
    if begun:
        raise ambiguous("%d runs begin with %s" % (len(begun), text), sorted(begun))
    raise Refusal("not_found", "no run %s among %d" % (text, total), count=total, user=user_name())
