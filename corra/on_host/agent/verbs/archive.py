"""ROOT/archive: the runs that were folded away, a file a month.

Whoever folds a run away appends its line, has it on the disk and reads it back, and only then takes
the run's directory out of ROOT/runs. So a run is always in one of the two or in both, and whoever
looks into ROOT/runs first, and then here, finds it.
"""

import errno
import fcntl
import posix as os
import time

from ..files import exists, fill
from ..paths import join
from ..spool import roots, secure
from .archived import of_runbook
from .ended import open_own, sync, unreadable
from .ids import tail_of
from .known import Known
from .month import Month

FIRST_LINE = (
    b"# corra: CHECKSUM ID CREATED END FOLDED WORD RECORD, a line for each run; times in ns\n"
)


def told_month(prog_id):
    """Return the month that an id tells, None for one that tells none.

    Ids of fleets and runbooks follow from names. They look like others, and their year is 0000.
    """
    told = tail_of(prog_id) != prog_id and prog_id[:4] != "0000"
    return prog_id[:4] + "-" + prog_id[4:6] if told and "01" <= prog_id[4:6] <= "12" else None


def month_of(prog_id, created_ns):
    """Return the name of the month's file that a run's line is in: what its id tells, else the
    month in which the run was made.
    """
    return told_month(prog_id) or time.strftime("%Y-%m", time.gmtime(created_ns // 10**9))


def is_month(name):
    return len(name) == 7 and name[4] == "-" and (name[:4] + name[5:]).isdigit()


def archives(request):
    """Yield the Archive of each root that has one. Raises Refusal: one can't be read."""
    for root in roots(request):
        try:
            yield Archive(root)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise unreadable(join(root, "archive"), error) from None


def in_archives(request, ask):
    """Yield what `ask` returns for the Archive of each root. Raises Refusal."""
    for archive in archives(request):
        try:
            yield ask(archive)
        except OSError as error:
            raise unreadable(join(archive.root, "archive"), error) from None
        finally:
            archive.close()


class Archive:
    """The archive of one root. Its methods raise OSError where it can't be read."""

    def __init__(self, root):
        """Raises OSError: FileNotFoundError where this user has none there."""
        self.root, self.kept = root, {}
        self.directory = os.open(
            join(root, "archive"), os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
        )
        found = os.fstat(self.directory)
        if found.st_uid != os.geteuid() or found.st_mode & 0o022:
            os.close(self.directory)
            if found.st_uid != os.geteuid():
                raise FileNotFoundError(errno.ENOENT, "it is another user's", root)
            raise PermissionError(errno.EPERM, "others can write to it", root)

    def close(self):
        for month in self.kept.values():
            month.close()
        os.close(self.directory)

    def months(self):
        """Return the Months, the newest first."""
        names = sorted(filter(is_month, os.listdir(self.directory)), reverse=True)
        return [month for month in map(self.month, names) if month]

    def month(self, name):
        """Return the Month of this name, or None."""
        if name not in self.kept:
            try:
                self.kept[name] = Month(self.root, self.directory, name)
            except FileNotFoundError:
                return None
        return self.kept[name]

    def lock(self):
        """Wait until nobody else writes to the archive, and see what others wrote until then.

        The lock ends with `unlock`, or with the descriptor.
        """
        fcntl.flock(self.directory, fcntl.LOCK_EX)
        for name, kept in list(self.kept.items()):
            try:
                found = os.stat(name, dir_fd=self.directory, follow_symlinks=False)
            except FileNotFoundError:
                found = None
            same = os.fstat(kept.file)
            if found is None or (found.st_ino, found.st_dev) != (same.st_ino, same.st_dev):
                self.kept.pop(name).close()
            elif found.st_size != kept.size:
                kept.look()

    def unlock(self):
        fcntl.flock(self.directory, fcntl.LOCK_UN)

    def with_id(self, prog_id):
        """Return the Line of exactly this id, or None."""
        told = told_month(prog_id)
        if told:
            month = self.month(told)
            return month and month.with_id(prog_id)
        found = (month.with_id(prog_id) for month in self.months())
        return next(filter(None, found), None)

    def with_name(self, name):
        """Return the newest Line of this name, or None."""
        found = filter(None, (month.with_name(name) for month in self.months()))
        return max(found, key=Known.key, default=None)

    def with_tail(self, text, most):
        """Return Lines whose tail begins with `text`; where there are more than `most`, some."""
        found = []
        for month in self.months():
            found += month.with_tail(text, most)
        return found

    def count(self):
        return sum(sum(month.words().values()) for month in self.months())


def make_archive(root):
    """Return the Archive of `root`, made if there is none yet. Raises OSError."""
    above = secure(root)
    try:
        os.mkdir("archive", 0o700, dir_fd=above)
    except FileExistsError:
        pass
    try:
        os.fsync(above)
    finally:
        os.close(above)
    return Archive(root)


def append(archive, name, lines):
    """Append lines to a month, and have them on the disk. Raises OSError, and adds nothing then."""
    file = open_own(archive.directory, name, os.O_RDWR | os.O_APPEND | os.O_CREAT)
    try:
        size = os.fstat(file).st_size
        data = b"".join(([FIRST_LINE] if not size else []) + lines)
        if size and os.pread(file, 1, size - 1) != b"\n":
            data = b"\n" + data  # somebody was killed in the middle of a line
        try:
            left = data
            while left:
                left = left[os.write(file, left) :]
            os.fsync(file)
            os.fsync(archive.directory)  # always: who made the file may have died before this
            if os.pread(file, len(data) + 1, size) != data:
                raise OSError(errno.EIO, "what was written isn't what is read")
        except OSError:
            os.ftruncate(file, size)  # which takes no room
            raise
    finally:
        os.close(file)
    archive.month(name).look()


def forget_month(archive, month, dry):
    """Remove what isn't a runbook's of a month; return the ids. The archive is locked."""
    ids, kept = [], [FIRST_LINE]
    if month.books() == sum(month.words().values()):
        return ids
    for line in month.lines():
        if of_runbook(line.request()):
            kept.append(os.pread(month.file, line.after - line.offset, line.offset))
        else:
            ids.append(line.prog_id)
    if dry or not ids:
        return ids
    if len(kept) > 1:
        new = ".%s.%s" % (month.name, os.urandom(4).hex())
        try:
            fill(archive.directory, new, b"".join(kept))
            sync(archive.directory, new)
            os.rename(new, month.name, src_dir_fd=archive.directory, dst_dir_fd=archive.directory)
        except OSError:
            if exists(archive.directory, new):
                os.unlink(new, dir_fd=archive.directory)
            raise
    else:
        os.unlink(month.name, dir_fd=archive.directory)
    os.fsync(archive.directory)
    if exists(archive.directory, month.name + ".index"):
        os.unlink(month.name + ".index", dir_fd=archive.directory)
    return ids
