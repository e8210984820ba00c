"""The runs of a spool, without reading those that have ended: the cache ROOT/ended.

A final State never changes. So whoever reads a run for a list, a look-up or gc, and finds it final,
unguarded and owed to no collector, appends what they ask of it to ROOT/ended. A line has a
checksum, and the time of change of the run's directory: a torn line is no line, and a directory
that was made anew or written to is read again. What is lost of the file costs a reading of the
runs.
"""

import posix as os
import zlib

from ..contract import FINAL, Refusal
from ..files import exists, fill
from ..kernel import now_ns
from ..paths import join
from ..records import Record, from_json, to_json, unpack
from ..spool import roots, secure
from .held import HeldRun
from .ids import valid_id
from .known import About, Known, word_of

CHUNK = 1 << 18
FLUSHED = 256  # lines


def unreadable(root, error):
    return Refusal(
        "unreadable", "%s can't be read: %s" % (root, error.strerror), dir=root, errno=error.errno
    )


def spools(request):
    """Yield the Spool of each root that has runs. Raises Refusal: a root is unreadable."""
    for root in roots(request):
        try:
            yield Spool(root)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise unreadable(root, error) from None


def sealed(text):
    """Return `text` (bytes) as a line that begins with its checksum."""
    return b"%08x %s\n" % (zlib.crc32(text), text)


def unsealed(line):
    """Return the text of a line, or None for one that is torn or was written by somebody else."""
    text = line[9:]
    return text if line[:9] == b"%08x " % zlib.crc32(text) else None


def lines_between(file, begin, end):
    """Yield (offset, line without its end) of the whole lines of a file from `begin` to `end`."""
    kept = b""
    while begin < end:
        data = os.pread(file, min(CHUNK, end - begin), begin)
        if not data:
            return
        lines = (kept + data).split(b"\n")
        at, begin, kept = begin - len(kept), begin + len(data), lines.pop()
        for line in lines:
            yield at, line
            at += len(line) + 1


def open_own(directory, name, flags):
    """Open a file of this user's that nobody else can write to. Raises OSError."""
    fd = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600, dir_fd=directory)
    found = os.fstat(fd)
    if found.st_uid != os.geteuid() or found.st_mode & 0o170022 != 0o100000:
        os.close(fd)
        raise PermissionError(1, "others can write to it or own it", name)
    return fd


def sync(directory, name):
    """Have a file or a directory on the disk. Raises OSError."""
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=directory)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def held_by(run):
    """Return how many bytes of the disk the files take that grow."""
    found = 0
    for name in run.streams + ["index", "stdin"]:
        if exists(run.directory, name):
            found += os.stat(name, dir_fd=run.directory, follow_symlinks=False).st_blocks * 512
    return found


class Spool:
    """ROOT/runs as a reader sees it."""

    def __init__(self, root):
        """Raises OSError."""
        self.root, self.path = root, join(root, "runs")
        self.runs = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        self.fresh = []  # lines for the cache

    def close(self):
        self.flush()
        os.close(self.runs)

    def each(self):
        """Yield (prog_id, its Known by the cache, else None) of each run."""
        seen = set()
        for known in self.cached():
            if known.prog_id not in seen:
                seen.add(known.prog_id)
                yield known.prog_id, known
        with os.scandir(self.path) as entries:
            for entry in entries:
                if entry.name not in seen and valid_id(entry.name):
                    yield entry.name, None

    def cached(self):
        """Yield the Known of each line of the cache that still holds."""
        try:
            root = secure(self.root)
        except OSError:
            return
        try:
            file = open_own(root, "ended", os.O_RDONLY)
        except OSError:
            return
        finally:
            os.close(root)
        try:
            for known, _ in self.lines_that_hold(file):
                yield known
        finally:
            os.close(file)

    def lines_that_hold(self, file):
        """Yield (Known, line) of each line of the cache whose run is there as it was noted."""
        me = os.geteuid()
        for _, line in lines_between(file, 0, os.fstat(file).st_size):
            text = unsealed(line)
            words = text.split(b" ", 8) if text is not None else ()
            if len(words) < 9:
                continue
            prog_id = words[0].decode()
            try:
                found = os.stat(prog_id, dir_fd=self.runs, follow_symlinks=False)
            except OSError:
                continue
            if b"%d" % found.st_ctime_ns == words[1] and found.st_uid == me:
                yield self.of_line(prog_id, words), line + b"\n"

    def of_line(self, prog_id, words):
        known = Known(
            self.root,
            prog_id,
            int(words[2]),
            int(words[3]),
            words[5].decode(),
            lambda: self.about(prog_id, words[8]),
        )
        known.noted, known.held, known.keep_s = int(words[4]), int(words[6]), float(words[7])
        return known

    def about(self, prog_id, data):
        about = About(*from_json(data))
        if about.command is not None:
            return about
        run = HeldRun(self.root, prog_id)
        run.close()
        return About.of(run.request)

    def read_if(self, prog_id, name):
        """Return the Known of a run that isn't in the cache; None for an open one of another name.

        Raises OSError.
        """
        run = HeldRun(self.root, prog_id)
        try:
            if run.request.get("name") != name and run.alive():
                return None
        finally:
            run.close()
        return self.read(prog_id)

    def read(self, prog_id):
        """Return the Known of a run by reading it. Raises OSError: EBADMSG where it is damaged."""
        run = HeldRun(self.root, prog_id)
        try:
            # Before the run is read: what changes later makes the line void.
            changed = os.fstat(run.directory).st_ctime_ns
            state = run.state(sure=True)
            about, word = About.of(run.request), word_of(state)
            pages = run.pages() or (b"", b"")
            record = Record.read(pages[0]) or Record()
            created = int(run.request.get("created") or 0)
            end = (
                0
                if state["state"] not in FINAL
                else record.outcome[1]
                if record.outcome
                else created * (state["state"] == "not_started")
            )
            known = Known(self.root, prog_id, created, end, word, about)
            known.text = to_json(state)
            # That nobody has launched a claim in time is said by the clock, which may be set.
            proved = exists(run.directory, "launched") or unpack(pages[1]) is not None
            owed = state["callback"] and not state["callback"]["completed"]
            if proved and not owed and state["state"] in FINAL and state["supervisor"] == "gone":
                known.noted, known.held = now_ns(), held_by(run)
                known.keep_s = (run.request.get("run") or {}).get("keep") or 0
                self.note(known, changed)
            return known
        finally:
            run.close()

    def note(self, known, changed):
        words = (known.prog_id, changed, known.created, known.end, known.noted, known.word)
        more = (known.held, known.keep_s, to_json(known.about().fields()))
        self.fresh.append(sealed(" ".join(map(str, words + more)).encode()))
        if len(self.fresh) == FLUSHED:
            self.flush()

    def flush(self):
        """Append to the cache what was read. Where that fails it is read again."""
        data, self.fresh = b"".join(self.fresh), []
        if not data:
            return
        try:
            root = secure(self.root)
            try:
                file = open_own(root, "ended", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
                os.write(file, data)
                os.close(file)
            finally:
                os.close(root)
        except OSError:
            pass  # no room, or only for reading

    def compact(self):
        """Write the cache anew where much of it doesn't hold any more. Raises OSError.

        What others append meanwhile is lost, and read again.
        """
        root = secure(self.root)
        new = ".ended.%s" % os.urandom(4).hex()
        try:
            file = open_own(root, "ended", os.O_RDONLY)
            size, kept, parts = os.fstat(file).st_size, 0, {}
            for known, line in self.lines_that_hold(file):
                parts[known.prog_id] = line
                kept += len(line)
            os.close(file)
            if kept * 2 < size:
                fill(root, new, b"".join(parts.values()))
                os.rename(new, "ended", src_dir_fd=root, dst_dir_fd=root)
        except OSError:
            if exists(root, new):
                os.unlink(new, dir_fd=root)
            raise
        finally:
            os.close(root)
