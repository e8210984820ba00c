"""A month of ROOT/archive: a file of lines that only grows, and the index beside it, a cache.

An index is blocks of BLOCK bytes, each with a checksum: a first one about the file, then sorted
keys with the places of their lines. Each block that a look-up reads is checked, and what the file
has behind the part that the index covers is read from the file. So an index that is missing,
damaged, cut off or of another file costs a reading of the file, and misses no line.

    c CREATED ID OFFSET   the runs by their age: all of an archive, the newest first
    n CRC CREATED OFFSET  those that have a name, by its checksum: the newest of a name
    t TAIL OFFSET         all by what people type of an id, which leads to ids as well
"""

import posix as os
import zlib

from ..files import exists, fill
from ..records import from_json, to_json
from .archived import of_runbook, read_line
from .ended import lines_between, open_own, sync
from .ids import tail_of
from .known import Known

BLOCK = 4096
# What stands behind the index is read by each look-up. 64 KiB are read in 1 ms.
UNCOVERED_MAX = 1 << 16
# So many fit into the first block; there are few more exit codes.
WORDS_MAX = 100
# So many bytes of it may be the counts of people.
PEOPLE_MAX = 1500


def age_key(line):
    return b"c %019d %s " % (line.created, line.prog_id.encode())


def name_key(name):
    return b"n %08x " % zlib.crc32(to_json(name).encode())


def tail_key(prog_id):
    return b"t %s " % tail_of(prog_id).encode()


class Index:
    """The sorted keys of a month, for a part of its file from the beginning on.

    Its methods raise ValueError where what they read is damaged.
    """

    def __init__(self, directory, name, month):
        """Raises OSError; ValueError for an index that is damaged or of another file."""
        self.file = open_own(directory, name + ".index", os.O_RDONLY)
        self.last = (-1, ())
        try:
            found = from_json(self.block(0)[0])
            self.covered, self.blocks = found["covered"], found["blocks"]
            # Of the lines that it covers: {word: how many}, the same for each person, the first and
            # last end, and how many are of runbooks.
            self.words, self.people = found["words"], found["people"]
            self.books = found["books"]
            self.oldest, self.newest = found["oldest"], found["newest"]
            if (
                self.covered > month.size
                or os.pread(month.file, 8, found["last"]) != found["sign"].encode()
                or os.pread(month.file, 1, self.covered - 1) != b"\n"
            ):
                raise ValueError("of another file")
        except (KeyError, TypeError, ValueError, RecursionError):
            self.close()
            raise ValueError("damaged, or of another file") from None

    def close(self):
        os.close(self.file)

    def block(self, number):
        """Return the entries of a block."""
        if self.last[0] != number:
            data = os.pread(self.file, BLOCK, number * BLOCK)
            if len(data) != BLOCK or data[:9] != b"%08x\n" % zlib.crc32(data[9:]):
                raise ValueError("a damaged block")
            self.last = (number, data[9:].rstrip(b"\n").split(b"\n"))
        return self.last[1]

    def place(self, key):
        """Return the number of the last block that begins below `key`, else of the first one."""
        low, high = 1, self.blocks
        while low < high:
            middle = (low + high + 1) // 2
            if self.block(middle)[0] < key:
                low = middle
            else:
                high = middle - 1
        return low

    def upwards(self, prefix):
        """Yield the entries that begin with `prefix`, in their order."""
        for number in range(self.place(prefix), self.blocks + 1):
            for entry in self.block(number):
                if entry.startswith(prefix):
                    yield entry
                elif entry > prefix:
                    return

    def downwards(self, prefix):
        """Yield the entries that begin with `prefix`, the last one first."""
        for number in range(self.place(prefix + b"\xff"), 0, -1):
            for entry in reversed(self.block(number)):
                if entry.startswith(prefix):
                    yield entry
                elif entry < prefix:
                    return


def offset_in(entry):
    return int(entry.rpartition(b" ")[2])


class Month:
    """The lines of one file. Its methods raise OSError where the file can't be read."""

    def __init__(self, root, directory, name):
        self.root, self.directory, self.name = root, directory, name
        self.file = open_own(directory, name, os.O_RDONLY)
        self.index = self.behind = None
        self.look()

    def look(self):
        """Take note of what others have appended since."""
        self.forget_index()
        self.size = os.fstat(self.file).st_size
        try:
            self.index = Index(self.directory, self.name, self)
        except (OSError, ValueError):
            pass  # the file itself is read

    def forget_index(self):
        if self.index:
            self.index.close()
        self.index = self.behind = None

    def close(self):
        self.forget_index()
        os.close(self.file)

    def lines(self, begin=0, having=()):
        """Yield the Lines of the file from the offset `begin` on, in the order of folding.

        Only those in whose bytes each of `having` is: the others aren't taken apart.
        """
        for offset, data in lines_between(self.file, begin, self.size):
            for each in having:
                if each not in data:
                    break
            else:
                line = read_line(self.root, offset, data)
                if line is not None:
                    yield line

    def uncovered(self):
        """Return the Lines behind what the index covers."""
        if self.behind is None:
            self.behind = list(self.lines(self.index.covered if self.index else 0))
        return self.behind

    def line_at(self, offset):
        """Return the Line at `offset`. Raises ValueError where none is: the index is wrong."""
        data = os.pread(self.file, 2048, offset)
        while b"\n" not in data:
            more = os.pread(self.file, 1 << 16, offset + len(data))
            if not more:
                break
            data += more
        line = read_line(self.root, offset, data.partition(b"\n")[0])
        if line is None:
            raise ValueError("no line there")
        return line

    def ask(self, by_index, fits):
        """Return the Lines that `by_index` finds in the index, and those behind it that fit."""
        found = []
        if self.index:
            try:
                found = [self.line_at(offset_in(entry)) for entry in by_index(self.index)]
            except ValueError:
                self.forget_index()
                found = []
        return found + [line for line in self.uncovered() if fits(line)]

    def with_id(self, prog_id):
        """Return the Line of exactly this id, or None."""
        key = tail_key(prog_id)
        found = self.ask(lambda index: index.upwards(key), lambda line: line.prog_id == prog_id)
        return next((line for line in reversed(found) if line.prog_id == prog_id), None)

    def with_tail(self, text, most):
        """Return the Lines whose tail begins with `text`, of more than `most` only so many."""

        def first(index):
            found = []
            for entry in index.upwards(b"t %s" % text.encode()):
                found.append(entry)
                if len(found) > most:
                    break
            return found

        return self.ask(first, lambda line: tail_of(line.prog_id).startswith(text))

    def with_name(self, name):
        """Return the newest Line of this name, or None."""
        quoted = to_json(name).encode()

        def fits(line):
            return quoted in line.data and line.about().name == name

        def newest(index):
            for entry in index.downwards(name_key(name)):
                if fits(self.line_at(offset_in(entry))):
                    return [entry]
            return []

        return max(self.ask(newest, fits), key=Known.key, default=None)

    def newest_first(self):
        """Yield all Lines, the newest first."""
        last, whole = None, False
        while not whole:
            behind = sorted(self.uncovered(), key=Known.key)
            try:
                for line in self.merged(behind):
                    if last is None or line.key() < last:
                        last = line.key()
                        yield line
                whole = True
            except ValueError:
                self.forget_index()  # and go on with what the file itself has

    def merged(self, behind):
        """Yield the Lines of the index and those `behind` it, which are the oldest first."""
        for entry in self.index.downwards(b"c ") if self.index else ():
            line = self.line_at(offset_in(entry))
            while behind and behind[-1].key() > line.key():
                yield behind.pop()
            yield line
        while behind:
            yield behind.pop()

    def ends(self):
        """Return the first and the last end of a run in it, in ns; (0, 0) where it is empty."""
        ends = [line.end for line in self.uncovered()]
        if self.index:
            ends += [self.index.oldest, self.index.newest]
        return (min(ends), max(ends)) if ends else (0, 0)

    def words(self):
        """Return {word: how many}."""
        if self.index and self.index.words is None:
            found, lines = {}, self.lines()
        else:
            found, lines = dict(self.index.words if self.index else {}), self.uncovered()
        for line in lines:
            found[line.word] = found.get(line.word, 0) + 1
        return found

    def people(self):
        """Return {(user, host) of who started them: {word: how many}}; None: it takes a reading."""
        if self.index and self.index.people is None:
            return None
        found = {}
        for user, host, words in self.index.people if self.index else ():
            found[user, host] = dict(words)
        for line in self.uncovered():
            about = line.about()
            words = found.setdefault((about.user, about.host), {})
            words[line.word] = words.get(line.word, 0) + 1
        return found

    def books(self):
        """Return how many of the Lines are of runbooks."""
        covered = self.index.books if self.index else 0
        return covered + sum(of_runbook(line.request()) for line in self.uncovered())

    def write_index(self):
        """Make the index cover all Lines; whoever has the archive's lock may. Raises OSError."""
        entries = []
        try:
            for number in range(1, self.index.blocks + 1 if self.index else 1):
                entries += self.index.block(number)
        except ValueError:
            self.forget_index()
            entries = []
        behind = self.uncovered()
        if not behind:
            return
        for line in behind:
            place = b"%d" % line.offset
            entries.append(age_key(line) + place)
            entries.append(tail_key(line.prog_id) + place)
            if line.about().name is not None:
                entries.append(name_key(line.about().name) + b"%019d %s" % (line.created, place))
        blocks = in_blocks(sorted(entries))
        oldest, newest = self.ends()
        words, people = self.words(), self.people()
        counts = people and [[*person, people[person]] for person in people]
        facts = {
            "covered": behind[-1].after,
            "last": behind[-1].offset,
            "sign": os.pread(self.file, 8, behind[-1].offset).decode(),
            "blocks": len(blocks),
            "words": words if len(words) <= WORDS_MAX else None,
            "people": counts if len(to_json(counts)) <= PEOPLE_MAX else None,
            "oldest": oldest,
            "newest": newest,
            "books": self.books(),
        }
        new = ".%s.%s" % (self.name, os.urandom(4).hex())
        try:
            fill(self.directory, new, b"".join([sealed_block(to_json(facts).encode())] + blocks))
            sync(self.directory, new)
            os.rename(
                new, self.name + ".index", src_dir_fd=self.directory, dst_dir_fd=self.directory
            )
        except OSError:
            if exists(self.directory, new):
                os.unlink(new, dir_fd=self.directory)
            raise
        self.look()


def sealed_block(body):
    """Return a block of `body`. Raises ValueError where that is too long."""
    if len(body) > BLOCK - 9:
        raise ValueError("too long for a block")
    body = body.ljust(BLOCK - 9, b"\n")
    return b"%08x\n" % zlib.crc32(body) + body


def in_blocks(entries):
    """Return blocks of the entries, in their order."""
    blocks, body, size = [], [], 0
    for entry in entries:
        if size + len(entry) + 1 > BLOCK - 9:
            blocks.append(sealed_block(b"\n".join(body)))
            body, size = [], 0
        body.append(entry)
        size += len(entry) + 1
    return blocks + [sealed_block(b"\n".join(body))]
