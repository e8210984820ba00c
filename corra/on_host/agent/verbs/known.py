"""What is known of a run without its State, and which runs a list asks for."""

from ..contract import Refusal
from ..records import to_json
from .held import HeldRun
from .ids import valid_id

# How much of a command the cache of ended runs has; for more, the run is read.
COMMAND_KEPT = 300
SAFE = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789@%_-+=:,./")


def word_of(state):
    """Return what a State comes to in one word, such as `running`, `done`, `failed_3`, `lost`."""
    if state["state"] != "exited":
        return state["state"]
    if state["reason"] == "timeout":
        return "timeout"
    if state["signal"]:
        return "killed"
    return "failed_%d" % state["return_code"] if state["return_code"] else "done"


def kind_of(word):
    """Return `failed` for `failed_3`, and any other word as it is."""
    return "failed" if word.startswith("failed") else word


def state_word(word):
    """Return the state of which `word` was made."""
    return word if word in ("starting", "running", "not_started", "lost") else "exited"


def command_line(argv):
    """Return a command as it would be typed into a shell."""
    return " ".join(
        each if each and SAFE.issuperset(each) else "'" + each.replace("'", "'\"'\"'") + "'"
        for each in argv
    )


class About:
    """What a request says of its run that a list may ask for. `command` is None if it is long."""

    __slots__ = ("command", "host", "link", "name", "user")

    def __init__(self, name, user, host, link, command):
        self.name, self.user, self.host = name, user, host  # user and host of the starter
        self.link, self.command = link, command

    @classmethod
    def of(cls, request):
        origin = request.get("origin") or {}
        return cls(
            request.get("name"),
            origin.get("user"),
            origin.get("host"),
            request["program"].get("host"),
            command_line(request["program"]["argv"]),
        )

    def fields(self):
        long = len(self.command) > COMMAND_KEPT
        return [self.name, self.user, self.host, self.link, None if long else self.command]


class Known:
    """A run as lists and look-ups find it: it was read, or a line of a file has this of it."""

    __slots__ = ("created", "end", "held", "keep_s", "noted", "prog_id", "root", "said", "text",
                 "word")  # fmt: skip

    def __init__(self, root, prog_id, created, end, word, said):
        self.root, self.prog_id, self.word = root, prog_id, word
        self.created, self.end = created, end  # ns; end is 0 while it is open or isn't known
        self.said = said  # an About, or a function that reads one
        self.text = None  # the State as JSON, where it was read
        # Of one that has ended: when that was noted (ns), what its files take of the disk (bytes),
        # and `run.keep`.
        self.noted = self.held = self.keep_s = 0

    def key(self):
        return self.created, self.prog_id

    def ended_ns(self):
        """Return when it ended; where nobody knows that, when it was first seen to have ended."""
        return self.end or self.noted or self.created

    def open(self):
        """Return the run. Raises OSError."""
        return HeldRun(self.root, self.prog_id)

    def about(self):
        """Return its About. Raises OSError where the run that it must be read from is gone."""
        if not isinstance(self.said, About):
            self.said = self.said()
        return self.said


class Wanted:
    """Which runs a request to list asks for."""

    def __init__(self, request):
        self.words = [each.lower().replace(" ", "_") for each in request.get("states") or ()]
        self.since_ns = None if request.get("since") is None else int(request["since"]) * 1000
        mine = request.get("mine") or {}
        self.user, self.host = mine.get("user"), mine.get("host")
        self.name, self.match = request.get("name"), request.get("match")
        self.link = request.get("link")
        self.asks_person = self.user is not None or self.host is not None
        self.asks_more = any(each is not None for each in (self.name, self.match, self.link))
        self.asks_about = self.asks_person or self.asks_more
        self.counted = request.get("count") is not False
        # What each run that fits has in its line of the archive, the request as JSON. `match` may
        # stand there in pieces, with what quotes it between.
        exact = (self.user, self.host, self.name, self.link)
        self.having = [to_json(each).encode() for each in exact if each is not None]
        pieces = "".join(each if each in SAFE else " " for each in self.match or "").split()
        self.having += [each.encode() for each in pieces]

    def within(self, known):
        """Return whether the run is one of those whose States are counted."""
        if self.since_ns is not None and known.end and known.end < self.since_ns:
            return False
        try:
            return not self.asks_about or self.fits(known)
        except OSError:
            return False  # removed since it was listed

    def is_of(self, known):
        """Return whether the person who is asked for started the run."""
        about = known.about() if self.asks_person else None
        return about is None or (
            self.user in (None, about.user) and self.host in (None, about.host)
        )

    def fits(self, known):
        about = known.about()
        return (
            (self.name is None or about.name == self.name)
            and self.is_of(known)
            and (self.link is None or about.link == self.link)
            and (
                self.match is None
                or self.match in known.prog_id
                or self.match in (about.name or "")
                or self.match in about.command
            )
        )

    def has_word(self, word):
        """Return whether a run of this word is listed, and not only counted."""
        return not self.words or any(
            word.startswith(each) or state_word(word) == each for each in self.words
        )


def read_cursor(text):
    """Return the (created ns, id) before which a page begins. Raises Refusal."""
    created, _, prog_id = text.partition(":")
    if not (created.isdigit() and valid_id(prog_id)):
        raise Refusal("bad_request", "before must be what a list gave as next")
    return int(created), prog_id


class Page:
    """The newest runs that were asked for, below a cursor, and how many there are of what kind."""

    def __init__(self, wanted, limit, before):
        self.wanted, self.limit, self.before = wanted, limit, before
        self.total = self.matching = 0  # all runs; those for this page and for later ones
        self.counts = {}  # {kind: how many}, whatever states are asked for
        self.found = []

    def offer(self, known):
        """Count a run, and take it where it is asked for."""
        self.total += 1
        self.consider(known)

    def consider(self, known):
        """Do as `offer` with a run that `total` has already."""
        if self.wanted.within(known):
            self.count(known.word, 1)
            if self.wanted.has_word(known.word):
                self.take(known)

    def count(self, word, number):
        """Count so many runs that are asked for but for their word."""
        kind = kind_of(word)
        self.counts[kind] = self.counts.get(kind, 0) + number
        if self.wanted.has_word(word):
            self.matching += number

    def take(self, known):
        """Take a run that is asked for; return whether it is below the cursor."""
        if self.before is not None and known.key() >= self.before:
            self.matching -= 1  # it was on an earlier page
            return False
        self.found.append(known)
        if len(self.found) > 2 * self.limit + 100:
            self.newest()
        return True

    def newest(self):
        """Return the runs of the page, the newest first; the others are let go."""
        # A run that is being folded away may be in both places.
        found = {known.key(): known for known in reversed(self.found)}
        self.found = [found[key] for key in sorted(found, reverse=True)[: self.limit]]
        return self.found
