"""Folding away: a run that has ended becomes a line of the archive, and its directory goes."""

import errno
import fcntl
import posix as os

from ..files import discard, exists
from ..paths import join
from ..run import Run
from .archive import append, lock_archive, make_archive, month_of
from .archived import line_of
from .ended import held_by
from .month import UNCOVERED_MAX

# Folded away with one sync. Whoever wants to read one of them waits for that.
BATCH = 32
# What was taken out of ROOT/runs and is being removed.
GONE = ".gone-"


class Ended:
    """A run that has ended, locked against watchers until it is let go."""

    def __init__(self, known):
        """Raises OSError: BlockingIOError where somebody watches it."""
        self.known, self.run = known, Run(known.root, known.prog_id)
        # O_CREAT: without the file nobody could hold the run.
        self.index = os.open(
            "index", os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600, dir_fd=self.run.directory
        )
        try:
            fcntl.flock(self.index, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.line = line_of(self.run, known.ended_ns())
            known.held = held_by(self.run)
        except BaseException:
            self.let_go()
            raise

    def let_go(self):
        os.close(self.index)
        self.run.close()

    def drop_output(self):
        """Empty the files that grow. Readers find their lengths in the record."""
        for name in self.run.streams + ["index", "stdin"]:
            if exists(self.run.directory, name):
                file = os.open(name, os.O_WRONLY | os.O_NOFOLLOW, dir_fd=self.run.directory)
                os.ftruncate(file, 0)
                os.close(file)


def lockable(due):
    """Yield an Ended for each Known in `due` that nothing keeps from being folded away."""
    for known in due:
        try:
            found = Ended(known)
        except OSError:
            continue  # watched, removed since, or damaged: its output is all that is left of it
        if found.line is None:
            found.let_go()
        else:
            yield found


def fold(root, due, over):
    """Fold away the Known in `due`, which are all of `root`, until `over()`.

    Return (those that were, those whose output is removed and whose record has no place in the
    archive, those that are left).
    """
    folded, emptied = [], []
    if not due:
        return folded, emptied, due
    try:
        archive = make_archive(root)
    except OSError:
        archive = None
    runs = os.open(join(root, "runs"), os.O_RDONLY | os.O_DIRECTORY)
    try:
        for at in range(0, len(due), BATCH):
            if over():
                return folded, emptied, due[at:]
            # Others fold as well, or forget, between two batches.
            if archive:
                lock_archive(archive)
            batch = list(lockable(due[at : at + BATCH]))
            try:
                moved = fold_batch(archive, runs, batch)
            except OSError:
                moved = None
            finally:
                for each in batch:
                    each.let_go()
            (emptied if moved is None else folded).extend(each.known for each in batch)
            for name in moved or ():
                try:
                    discard(runs, name)
                except OSError:
                    pass  # the next gc removes it
            if archive:
                fcntl.flock(archive.directory, fcntl.LOCK_UN)
        return folded, emptied, []
    finally:
        os.close(runs)
        if archive:
            archive.close()


def fold_batch(archive, runs, batch):
    """Take runs out of ROOT/runs, and return the names under which they are to be removed.

    The archive is locked; None stands for one that can't be written. Raises OSError: a line has no
    room; output was removed then, and the records stay where they are.
    """
    lines = {}
    try:
        for each in batch:
            name = month_of(each.run.prog_id, each.known.created)
            month = archive.fresh_month(name) if archive else None
            # It may be there: somebody was killed before the directory was removed.
            if not (month and month.with_id(each.run.prog_id)):
                lines.setdefault(name, []).append(each.line)
        write_lines(archive, lines)
    except OSError:
        # On a full disk, what is to be freed must be freed first.
        for each in batch:
            each.drop_output()
        write_lines(archive, lines)
    moved = [move_away(runs, each.run.prog_id) for each in batch]
    # What isn't in ROOT/runs any more must not be back after a power cut, half removed.
    os.fsync(runs)
    for name in lines:
        cover(archive.month(name))
    return moved


def write_lines(archive, lines):
    """Append lines, {month: [line]}; what was appended is taken out of `lines`. Raises OSError."""
    if archive is None:
        raise OSError(errno.EACCES, "there is no archive")
    for name, several in lines.items():
        if several:
            append(archive, name, several)
            lines[name] = []


def cover(month):
    """Write the month's index anew where much stands behind it."""
    behind = month.size - (month.index.covered if month.index else 0)
    if behind > max(UNCOVERED_MAX, month.size // 8):
        try:
            month.write_index()
        except OSError:
            pass  # no room: what is behind it is read


def move_away(runs, prog_id):
    """Take a run out of ROOT/runs in one step; return the name under which it is removed."""
    name = "%s%s-%s" % (GONE, prog_id, os.urandom(4).hex())
    os.rename(prog_id, name, src_dir_fd=runs, dst_dir_fd=runs)
    return name


def remove_claim(root, prog_id):
    """Remove a claim that nobody has launched, of an id that the archive has.

    Raises OSError: FileNotFoundError where there is none; EBUSY where it has guards, as those of an
    older agent, which knows of no archive.
    """
    runs = os.open(join(root, "runs"), os.O_RDONLY | os.O_DIRECTORY)
    try:
        claim = os.open(prog_id, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=runs)
        try:
            # As a guard does it: who has this lock decides what becomes of the run.
            fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if exists(claim, "launched"):
                raise OSError(errno.EBUSY, "it was launched", prog_id)
            name = move_away(runs, prog_id)
        finally:
            os.close(claim)
        discard(runs, name)
    finally:
        os.close(runs)
