"""Ids, and finding the run that a request names."""

import posix as os
import time

from ..contract import FINAL, Refusal
from ..paths import join
from ..run import Run
from ..spool import roots, user_name

ID_ALPHABET = "23456789bcdfghjkmnpqrstvwxz"


def valid_id(text):
    first, rest = "abcdefghijklmnopqrstuvwxyz0123456789", "._-"
    return (
        0 < len(text) <= 64
        and text[0] in first
        and all(char in first or char in rest for char in text)
    )


def tail_of(prog_id):
    """Return what people type of an id: its last 8 characters, or all of an id of their own."""
    stamp, dash, tail = prog_id.rpartition("-")
    made = (
        dash
        and len(stamp) == 16
        and stamp[8] == "t"
        and stamp[15] == "z"
        and (stamp[:8] + stamp[9:15]).isdigit()
    )
    return (
        tail if made and len(tail) == 8 and all(char in ID_ALPHABET for char in tail) else prog_id
    )


def new_id():
    letters = "".join(ID_ALPHABET[byte % len(ID_ALPHABET)] for byte in os.urandom(8))
    return time.strftime("%Y%m%dt%H%M%Sz-", time.gmtime()) + letters


def runs_of(request):
    """Yield (root, prog_id) of each run of this user. Raises Refusal: a root is unreadable."""
    for root in roots(request):
        try:
            names = os.listdir(join(root, "runs"))
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise unreadable(root, error) from None
        for name in names:
            if valid_id(name):
                yield root, name


def unreadable(root, error):
    return Refusal(
        "unreadable", "%s can't be read: %s" % (root, error.strerror), dir=root, errno=error.errno
    )


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
    for root, prog_id in runs_of(request):
        try:
            run = Run(root, prog_id)
        except OSError:
            continue  # removed since it was listed, another user's, or damaged
        total += 1
        if len(text) >= 2 and tail_of(prog_id).startswith(text):
            begun.append((root, prog_id))
        try:
            if run.request.get("name") == text:
                begun_ns = run.request.get("created", 0)
                named.append((run.state()["state"] not in FINAL, begun_ns, root, prog_id))
        except OSError:
            pass  # damaged
        finally:
            run.close()
    open_ = [each for each in named if each[0]]
    if len(open_) > 1:
        found = [each[2:] for each in sorted(open_, reverse=True)]
        raise ambiguous("%d open runs are called %s" % (len(found), text), found)
    if named:
        return Run(*max(named)[2:])
    if len(begun) == 1:
        return Run(*begun[0])
    if begun:
        raise ambiguous("%d runs begin with %s" % (len(begun), text), sorted(begun))
    raise Refusal("not_found", "no run %s among %d" % (text, total), count=total, user=user_name())
