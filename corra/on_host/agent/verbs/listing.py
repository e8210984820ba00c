"""The verb list: the runs of a host, page by page, the newest first."""

import errno
import posix as os

from ..records import to_json
from ..run import Run
from ..spool import user_name
from .ended import spools
from .known import Page, Wanted, read_cursor

# A page: 1,000 States have some 1.5 MB.
LIST_MAX, LIST_BYTES = 1000, 4 << 20
UNREADABLE_MAX = 100


def verb_list(request, stdin, reply, framed):
    """Reply with a page of States, how many more there are, and with what can't be read."""
    most = LIST_MAX if request.get("limit") is None else min(LIST_MAX, int(request["limit"]))
    before = None if request.get("before") is None else read_cursor(request["before"])
    page, damaged = Page(Wanted(request), most, before), []
    for spool in spools(request):
        for known in known_runs(spool, damaged):
            page.offer(known)
        spool.close()
    texts, shown, last = states_of(page.newest())
    more = page.matching - shown
    facts = {
        "host": os.uname().nodename,
        "user": user_name(),
        "more": more,
        "next": "%d:%s" % last if more and last else None,
        "counts": page.counts,
        "total": page.total,
    }
    if damaged:
        facts["unreadable"] = damaged
    # The States are JSON already.
    reply.send_text(to_json(facts)[:-1] + ', "runs": [' + ", ".join(texts) + "]}")


def known_runs(spool, damaged):
    """Yield the Known of each run; add to `damaged` what can't be read."""
    for prog_id, known in spool.each():
        try:
            yield known or spool.read(prog_id)
        except OSError as error:
            # Else it was removed since it was listed, or is another user's.
            if error.errno == errno.EBADMSG and len(damaged) < UNREADABLE_MAX:
                damaged.append(
                    {"prog_id": prog_id, "dir": error.filename, "message": error.strerror}
                )


def states_of(found):
    """Return the States of the runs as JSON, as many as a page has room for.

    Also return how many of the runs those are, and the key of the last.
    """
    texts, shown, size, last = [], 0, 0, None
    for known in found:
        try:
            text = known.text or state_text(known)
        except OSError:
            text = ""  # removed since it was listed
        size += len(text)
        if size > LIST_BYTES and texts:
            break
        texts += [text] if text else []
        shown, last = shown + 1, known.key()
    return texts, shown, last


def state_text(known):
    run = Run(known.root, known.prog_id)
    try:
        return to_json(run.state(sure=True))
    finally:
        run.close()
