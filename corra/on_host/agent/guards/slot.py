"""The slot: the keeper's record, in memory and in the file `exit`; and state.json."""

import posix as os

from ..contract import PAGE
from ..files import read_file
from ..kernel import mono_ns, now_ns
from ..processes import boot_id, oom_kills, process
from ..records import Record, to_json, unpack
from ..run import living_guards, state_of
from ..spool import launched_by, stdin_facts


class Slot:
    """The keeper's Record, and the first page of the file `exit` that it is saved to."""

    def __init__(self, directory, files, request, streams):
        self.directory, self.files, self.request = directory, files, request
        self.streams = streams  # of the Pump
        self.record = Record.read(os.pread(files["exit"], PAGE, 0)) or Record()
        if self.record.ooms is None:
            self.record.ooms = oom_kills()
        self.pids = None  # of the guards, the outermost first
        self.dirty = True  # the record has changed since the page was written

    def save(self):
        """Write the record to its page, as a full disk allows; return whether it is written."""
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
        """Put the guards into the record; a run that only waits never has to look them up."""
        if not self.record.guards:
            self.record.guards = [
                (pid, found[2])
                for pid, found in [(pid, process(pid)) for pid in self.pids]
                if found
            ]

    def log(self, name, number, to, by):
        """Add a signal to the record's sent ones."""
        self.record.sent.append((now_ns(), "SIG" + name, number, to, by))
        self.dirty = True

    def launched(self):
        """Return the launched process, or None before the program's claim."""
        return launched_by(self.directory, self.files)

    def failure(self):
        """Return why the program was not started, from the second page, or None."""
        return unpack(os.pread(self.files["exit"], PAGE, PAGE))

    def tell(self):
        """Write state.json, a copy for people; where that fails, remove the old copy."""
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
        """Return the facts for state_of, as Run.facts does."""
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
