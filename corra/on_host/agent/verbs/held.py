"""A run that gc leaves alone while it is read."""

import errno
import fcntl
import posix as os

from ..run import Run


class HeldRun(Run):
    """A run in ROOT/runs that isn't folded away until it is closed, or this process has ended.

    gc folds away a run only while it alone has the lock of the run's `index`.
    """

    def __init__(self, root, prog_id):
        """Raises OSError: FileNotFoundError for a run that is not there, or not any more."""
        Run.__init__(self, root, prog_id)
        self.hold = -1
        try:
            self.hold = os.open("index", os.O_RDONLY | os.O_NOFOLLOW, dir_fd=self.directory)
            fcntl.flock(self.hold, fcntl.LOCK_SH)
        except OSError:
            pass  # somebody has removed the file: gc leaves such a run alone
        try:
            there = os.stat(self.path, follow_symlinks=False)
        except FileNotFoundError:
            there = None
        found = os.fstat(self.directory)
        if there is None or (there.st_dev, there.st_ino) != (found.st_dev, found.st_ino):
            self.close()
            raise FileNotFoundError(errno.ENOENT, "it was folded away just now", self.path)

    def close(self):
        if self.hold >= 0:
            os.close(self.hold)
        Run.close(self)
