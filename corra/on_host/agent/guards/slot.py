"""The keeper's record, in memory and in the file `exit`, and state.json, which follows from it."""

import posix as os

from ..contract import PAGE
from ..files import read_file
from ..kernel import mono_ns, now_ns
from ..processes import boot_id, oom_kills, process
from ..records import Record, to_json, unpack
from ..run import living_guards, state_of
from ..spool import launched_by, stdin_facts


class Slot:
    """The first page of `exit` and the Record that it is written from."""

    def __init__(self, directory, files, request, streams):
        self.directory, self.files, self.request = directory, files, request
        self.streams = streams  # of the Pump
        self.record = Record.read(os.pread(files["exit"], PAGE, 0)) or Record()
        if self.record.ooms is None:
            self.record.ooms = oom_kills()
        self.pids = None  # of the guards, the outermost first
        self.dirty = True  # the record says more than the page

    def save(self):
        """Write the record; a full disk doesn't matter, since the page is there already."""
        self.name_guards()
        try:
            os.pwrite(self.files["exit"], self.record.page(), 0)
            self.dirty = False
            if self.record.outcome:
                os.fsync(self.files["exit"])
            return True
        except OSError:
            return False

    def name_guards(self):
        """Put the guards into the record. A run that only waits never needs their start times looked up."""
        if not self.record.guards:
            self.record.guards = [
                (pid, found[2])
                for pid, found in [(pid, process(pid)) for pid in self.pids]
                if found
            ]

    def log(self, name, number, to, by):
        """Add a signal to those that were sent."""
        self.record.sent.append((now_ns(), "SIG" + name, number, to, by))
        self.dirty = True

    def launched(self):
        """Return who was launched, or None."""
        return launched_by(self.directory, self.files)

    def failure(self):
        """Return why the program was not started, as the second page says it, or None."""
        return unpack(os.pread(self.files["exit"], PAGE, PAGE))

    def tell(self):
        """Write state.json, a copy for people: nothing depends on it. Where it can't be written the old one goes, as it would be untrue."""
        try:
            fd = os.open(
                "state.json.tmp",
                os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW,
                0o600,
                dir_fd=self.directory,
            )
            try:
                os.write(fd, (to_json(state_of(self.request, self.facts())) + "\n").encode())
            finally:
                os.close(fd)
            os.rename(
                "state.json.tmp", "state.json", src_dir_fd=self.directory, dst_dir_fd=self.directory
            )
        except OSError:
            for name in ("state.json.tmp", "state.json"):
                try:
                    os.unlink(name, dir_fd=self.directory)
                except OSError:
                    pass

    def facts(self):
        """Return what the State follows from, as Run.facts does."""
        return {
            "alive": True,
            "launched": self.launched(),
            "record": self.record,
            "failure": self.failure(),
            "sizes": {stream.name: stream.length() for stream in self.streams},
            "heads": {stream.name: stream.bound.head for stream in self.streams if stream.bound},
            "last_ns": max(os.fstat(stream.file).st_mtime_ns for stream in self.streams),
            "gone": False,
            "boot_id": boot_id(),
            "mono_ns": mono_ns(),
            "spool": self.request["path"],
            "courier": read_file(self.directory, "courier.json", PAGE),
            "stdin": stdin_facts(self.directory) if "senders" in self.files else None,
            "standbys": [pid for pid in living_guards(self.record) if pid != self.record.agent],
        }
