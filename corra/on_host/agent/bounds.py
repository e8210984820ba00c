"""Bounded streams: `keep_output` gives a stream's beginning back to the disk."""

import errno
import posix as os
import struct

from .contract import BOUND_MIN, BOUND_STEP, FULL, PAGE
from .files import fill_in_place, read_file
from .kernel import punch

HEAD = struct.Struct("<QQ")  # an offset and its complement, so that a torn record shows
HEAD_MASK = (1 << 64) - 1


def prepare_bound(directory, names):
    """Make the file `heads`. Raises OSError: EOPNOTSUPP where the file system has no holes."""
    fill_in_place(directory, "heads", HEAD.pack(0, HEAD_MASK) * (len(names) + 1))
    file = os.open("index", os.O_WRONLY, dir_fd=directory)
    try:
        punch(file, PAGE)
    except OSError as error:
        raise OSError(
            error.errno, "its file system can't give back the beginning of a file"
        ) from None
    finally:
        os.close(file)


def read_heads(directory, names):
    """Return {name: offset of its first byte} for the streams `names` and the index.

    It is {} where no stream is bounded.
    """
    names = list(names) + ["index"]
    for _ in range(100):
        data = read_file(directory, "heads", HEAD.size * len(names))
        if data is None:
            return {}
        found = [head for head, check in HEAD.iter_unpack(data) if head ^ check == HEAD_MASK]
        if len(found) == len(names):
            return dict(zip(names, found))
    # The machine went down during a write. Run.heads asks the files themselves then.
    return dict.fromkeys(names, 0)


def first_data(directory, name):
    """Return where a file's first data begins, as the file system says.

    This is true after a power cut; `heads` may not be.
    """
    try:
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=directory)
    except FileNotFoundError:
        return 0
    try:
        return os.lseek(file, 0, os.SEEK_DATA)
    except OSError as error:
        # ENXIO: the file has nothing but holes.
        return os.fstat(file).st_size if error.errno == errno.ENXIO else 0
    finally:
        os.close(file)


class Bound:
    """Keeps the last `keep` bytes of a growing file, and up to a sixteenth more.

    What is before them is punched out. The file's new beginning is written to `heads` before the
    hole is made: a reader that reads bytes first and `heads` afterwards knows whether those bytes
    may have been a hole. After a keeper's death the next keeper punches from the beginning anew.
    """

    def __init__(self, number, file, heads, keep):
        self.number, self.file, self.heads, self.keep = number, file, heads, keep
        self.spare = min(max(keep // 16, BOUND_MIN), BOUND_STEP)
        head, check = HEAD.unpack(os.pread(heads, HEAD.size, number * HEAD.size))
        self.head = head if head ^ check == HEAD_MASK else 0

    def trim(self):
        """Punch out what is more than `keep`, once it is more by `spare`."""
        self.cut(self.keep, self.spare)

    def give_way(self):
        """Punch out a sixteenth of `keep` as well, for a full disk; return how many bytes.

        Else a stream at its bound could never write again on that disk.
        """
        return self.cut(max(0, self.keep - max(self.keep // 16, PAGE)), 0)

    def cut(self, keep, spare):
        end = (os.fstat(self.file).st_size - keep) // PAGE * PAGE
        if end - self.head <= spare:
            return 0
        try:
            os.pwrite(self.heads, HEAD.pack(end, end ^ HEAD_MASK), self.number * HEAD.size)
            punch(self.file, end)
        except OSError as error:
            if error.errno not in FULL:
                raise
            return 0  # to make room takes room, and there is none: try the next time
        freed, self.head = end - self.head, end
        return freed
