"""Folding away: a run that has ended becomes a line of the archive, and its directory goes."""

import errno
import fcntl
import posix as os

from ..files import discard, exists
from ..paths import join
from ..run import Run
from .archive import Archive, append, make_archive, month_of
from .archived import line_of
from .ended import held_by
from .month import UNCOVERED_MAX
from .starter import give_up

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

    def settle(self):
        """Make sure that nobody launches it any more; return whether it may be folded away.

        A guard that was stopped for long could take the claim after the clock was set.
        """
        directory = self.run.directory
        if not exists(directory, "launched") and exists(directory, "exit"):
            give_up(self.run, ChildProcessError(), "its guards died before they started it")
            self.line = line_of(self.run, self.known.ended_ns())
        self.launched = exists(directory, "launched")
        return self.line is not None

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


def settled(due):
    """Yield those that are lockable and that nobody launches any more."""
    for each in lockable(due):
        try:
            sure = each.settle()
        except OSError:
            sure = False
        if sure:
            yield each
        else:
            each.let_go()


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
                archive.lock()
            batch = list(settled(due[at : at + BATCH]))
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
                archive.unlock()
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
    try:
        months = archive_lines(archive, batch)
    except OSError:
        # On a full disk, what is to be freed must be freed first.
        for each in batch:
            each.drop_output()
        months = archive_lines(archive, batch)
    moved = []
    for each in batch:
        try:
            moved.append(move_away(runs, each.run.prog_id))
        except FileNotFoundError:
            pass  # somebody has removed it by hand
    # What isn't in ROOT/runs any more must not be back after a power cut, half removed.
    os.fsync(runs)
    for name in months:
        month = archive.month(name)
        # Each look-up reads what stands behind an index; to write it for each batch is dear.
        cover(month, month.size // 8)
    return moved


def archive_lines(archive, batch):
    """Have a line in the archive for each run; return the months that were written to.

    Raises OSError: some may have none.
    """
    if archive is None:
        raise OSError(errno.EACCES, "there is no archive")
    lines = {}
    for each in batch:
        created = int(each.run.request.get("created") or 0)
        # It may be there: somebody was killed before the directory was removed.
        there = archive.with_id(each.run.prog_id)
        # A claim that nobody launched adds nothing to an id that is there; what an older agent has
        # run once more does.
        if there is None or (each.launched and there.created != created):
            lines.setdefault(month_of(each.run.prog_id, created), []).append(each.line)
    for name, several in lines.items():
        append(archive, name, several)
    return list(lines)


def cover(month, bearable=0):
    """Write the month's index anew where much stands behind it: more than `bearable` bytes."""
    behind = month.size - (month.index.covered if month.index else 0)
    if behind > max(UNCOVERED_MAX, bearable):
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
    archive = Archive(root)
    try:
        archive.lock()
        remove_unlaunched(root, prog_id)
    finally:
        archive.close()


def remove_unlaunched(root, prog_id):
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
