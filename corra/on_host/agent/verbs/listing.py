"""The verb list: the runs of a host, page by page, the newest first."""

import errno
import posix as os

from ..contract import Refusal
from ..records import to_json
from ..spool import user_name
from .archive import in_archives
from .ended import spools
from .finding import find_exact
from .known import Known, Page, Wanted, read_cursor

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
    # After ROOT/runs: a run goes from there to the archive.
    for _ in in_archives(request, lambda archive: offer_archive(page, archive)):
        pass
    texts, shown, last = states_of(request, page.newest(), damaged)
    facts = {"host": os.uname().nodename, "user": user_name(), "total": page.total}
    if page.wanted.counted:
        facts.update(more=page.matching - shown, counts=page.counts)
    more = facts["more"] if page.wanted.counted else shown == most
    facts["next"] = "%d:%s" % last if more and last else None
    if damaged:
        facts["unreadable"] = damaged
    # The States are JSON already.
    reply.send_text(to_json(facts)[:-1] + ', "runs": [' + ", ".join(texts) + "]}")


def known_runs(spool, damaged):
    """Yield the Known of each run in ROOT/runs; add to `damaged` what can't be read."""
    for prog_id, known in spool.each():
        try:
            yield known or spool.read(prog_id)
        except OSError as error:
            note_damage(damaged, prog_id, error)


def note_damage(damaged, prog_id, error):
    """Add a run to `damaged` whose files say what no agent has written.

    Else it was removed since it was listed, or is another user's.
    """
    if error.errno == errno.EBADMSG and len(damaged) < UNREADABLE_MAX:
        damaged.append({"prog_id": prog_id, "dir": error.filename, "message": error.strerror})


def offer_archive(page, archive):
    """Offer the runs of an archive to the page, and read no more of it than that takes."""
    wanted, sources = page.wanted, []
    for month in archive.months():
        words, (oldest, newest) = month.words(), month.ends()
        page.total += sum(words.values())
        if wanted.since_ns is not None and newest < wanted.since_ns:
            continue  # all of it ended before that
        partly = wanted.since_ns is not None and oldest < wanted.since_ns
        fitting = words_of(month, wanted, words)
        if fitting is None or (wanted.counted and partly):
            for line in month.lines(having=wanted.having):
                page.consider(line)
            continue
        for word, number in fitting.items() if wanted.counted else ():
            page.count(word, number)
        sources.append(of_words(month, wanted, fitting, sum(words.values())))
    taken = 0
    for line in merged(sources) if page.limit else ():
        if wanted.within(line) and page.take(line):
            taken += 1
            if taken == page.limit:
                return


def words_of(month, wanted, words):
    """Return {word: how many} of what fits but for its word and its age; None: it takes a reading.

    `words` are those of all.
    """
    if wanted.asks_more:
        return None
    if not wanted.asks_person:
        return words
    people = month.people()
    if people is None:
        return None
    found = {}
    for (user, host), counts in people.items():
        if wanted.user in (None, user) and wanted.host in (None, host):
            for word, number in counts.items():
                found[word] = found.get(word, 0) + number
    return found


def of_words(month, wanted, words, total):
    """Yield the newest first of the Lines that `words` counts and that are asked for.

    `total` is how many the month has. It reads no more than it yields, or the whole file once.
    """
    left = sum(number for word, number in words.items() if wanted.has_word(word))
    if not left:
        return
    if left * 8 < total and wanted.having:
        lines = sorted(month.lines(having=wanted.having), key=Known.key, reverse=True)
    else:
        lines = month.newest_first()
    for line in lines:
        if wanted.has_word(line.word) and wanted.is_of(line):
            yield line
            left -= 1
            if not left:
                return


def merged(sources):
    """Yield the Known of several iterators, each the newest first, in one such order."""
    heads = [(next(source, None), source) for source in sources]
    while True:
        heads = [head for head in heads if head[0] is not None]
        if not heads:
            return
        place = max(range(len(heads)), key=lambda at: Known.key(heads[at][0]))
        known, source = heads[place]
        yield known
        heads[place] = (next(source, None), source)


def states_of(request, found, damaged):
    """Return the States of the runs as JSON, as many as a page has room for.

    Also return how many of the runs those are, and the key of the last.
    """
    texts, shown, size, last = [], 0, 0, None
    for known in found:
        text = known.text or state_text(request, known, damaged)
        size += len(text)
        if size > LIST_BYTES and texts:
            break
        texts += [text] if text else []
        shown, last = shown + 1, known.key()
    return texts, shown, last


def state_text(request, known, damaged):
    """Return the State of a run as JSON; "" for one that was removed since it was found.

    Also for one that was damaged since it was noted as ended; that is added to `damaged`.
    """
    try:
        try:
            run = known.open()
        except FileNotFoundError:
            run = find_exact(request, known.prog_id)  # it may have been folded away meanwhile
            if run is None:
                return ""
        try:
            return to_json(run.state(sure=True))
        finally:
            run.close()
    except OSError as error:
        note_damage(damaged, known.prog_id, error)
        return ""
    except Refusal:
        return ""
