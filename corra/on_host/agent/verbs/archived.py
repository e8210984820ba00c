"""A run that was folded away: the line that is left of it, and the Run that a verb makes of it.

A line is its checksum, then "ID CREATED END FOLDED WORD JSON", the times in ns. JSON has the
request, and the facts that the State is computed from, so it is the State of before.
"""

import posix as os

from ..contract import FINAL
from ..kernel import now_ns
from ..paths import join
from ..records import Record, from_json, pack, to_json, unpack
from ..run import delivered, iso, state_of
from ..spool import stream_names
from .ended import sealed, unsealed
from .known import About, Known, word_of

# The lines of the keeper's record that the State of an ended run needs.
RECORD_KEPT = ("outcome", "usage", "length", "sent")


class Line(Known):
    """A line of the archive. It stands in its file from `offset` to `after`."""

    __slots__ = ("after", "data", "folded", "offset")

    def __init__(self, root, offset, after, words):
        prog_id, created, end, folded, word, self.data = words
        Known.__init__(self, root, prog_id.decode(), int(created), int(end), word.decode(), None)
        self.folded, self.offset, self.after = int(folded), offset, after

    def open(self):
        return ArchivedRun(self)

    def request(self):
        return from_json(self.data)["request"]

    def about(self):
        if self.said is None:
            self.said = About.of(self.request())
        return self.said


def read_line(root, offset, data):
    """Return the Line that the bytes `data` are, or None."""
    text = unsealed(data)
    words = text.split(b" ", 5) if text is not None else ()
    return Line(root, offset, offset + len(data) + 1, words) if len(words) == 6 else None


class ArchivedRun:
    """What Run is for a run's directory, for its line in the archive: all that only reads works."""

    bounded = False

    def __init__(self, line):
        self.line, self.prog_id = line, line.prog_id
        self.path = join(line.root, "runs/" + line.prog_id)
        self.record = from_json(line.data)
        self.request = dict(self.record["request"], prog_id=line.prog_id, created=line.created)
        self.streams = stream_names(self.request)
        # It has none of a run's files, so whoever opens one is told that there is none.
        self.directory = os.open(join(line.root, "archive"), os.O_RDONLY | os.O_DIRECTORY)

    def close(self):
        os.close(self.directory)

    def alive(self):
        return False

    def heads(self):
        return {}

    def sizes(self):
        return dict.fromkeys(self.streams, os.stat("/dev/null"))

    def pages(self):
        return None

    def hindered(self):
        return None

    def state(self, details=False, sure=False):
        """Return the State that the run had before it was folded away, and when that was."""
        found = self.record
        launched, boot = found.get("launched"), found.get("boot_id")
        page = pack([each.split(" ") for each in found["record"]])
        facts = {
            "alive": False,
            "launched": launched,
            "record": Record.read(page),
            "failure": [each.split(" ") for each in found.get("failure") or ()],
            "sizes": dict.fromkeys(self.streams, 0),
            "last_ns": found.get("last_ns") or 0,
            "gone": bool(found.get("gone")),
            "boot_id": boot or launched[2],
            "mono_ns": 0,
            "spool": self.path,
            "courier": to_json(found.get("callback") or {}).encode(),
            "stdin": found.get("stdin"),
        }
        return dict(state_of(self.request, facts), archived_time=iso(self.line.folded))


def of_runbook(request):
    return bool((request.get("origin") or {}).get("runbook"))


def line_of(run, end_ns):
    """Return the line of a run that has ended, as bytes; `end_ns` is for one of unknown end.

    None for a run that hasn't ended, that is guarded, or whose collector lacks some of it.
    """
    facts = run.facts()
    state = state_of(run.request, facts)
    owed = state["callback"] and not state["callback"].get("completed")
    if state["state"] not in FINAL or facts["alive"] or owed:
        return None
    request = {
        key: value for key, value in run.request.items() if key not in ("prog_id", "created")
    }
    record, created = facts["record"] or Record(), int(run.request.get("created") or 0)
    # The length of what was written until the guards died is that of the file.
    record.lengths = {**facts["sizes"], **record.lengths}
    kept = {
        "request": request,
        "record": [
            " ".join(words) for words in unpack(record.page()) or () if words[0] in RECORD_KEPT
        ],
        "launched": facts["launched"],
        "failure": [" ".join(words) for words in facts["failure"] or ()],
        "gone": facts["gone"],
        "last_ns": facts["last_ns"],
        "stdin": facts["stdin"],
        "callback": delivered(facts["courier"]) if request.get("callback") else None,
        "boot_id": facts["boot_id"]
        if not facts["launched"] or facts["launched"][2] != facts["boot_id"]
        else None,
    }
    if record.outcome:
        end_ns = record.outcome[1]
    words = (run.prog_id, created, end_ns, now_ns(), word_of(state))
    body = to_json({key: value for key, value in kept.items() if value})
    return sealed(("%s %d %d %d %s " % words + body).encode())
