"""The spool: the roots that hold runs, and the making of a run's directory."""

import errno
import posix as os
import struct
import time

from .bounds import prepare_bound
from .contract import END_OF_STDIN, PAGE, SENDER_RECORD, START_DEADLINE_S
from .files import discard, exists, fill, fill_in_place
from .kernel import file_system
from .paths import absolute, join, make_directories, octets, parent, present, text_of
from .records import to_json

# By statfs type: a stalled server would hold the keeper in splice, and so the program.
REMOTE_TYPES = {
    0x6969: "NFS",
    0xFF534D42: "CIFS",
    0xFE534D42: "SMB",
    0x517B: "SMB",
    0x65735546: "FUSE",
    0x5346414F: "AFS",
    0x01021997: "9P",
    0x00C36400: "Ceph",
    0x0BD00BD0: "Lustre",
    0x47504653: "GPFS",
}


def user_name(uid=None):
    import pwd

    uid = os.geteuid() if uid is None else uid
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def home():
    """Return this user's home directory, or None.

    A $HOME that belongs to another user isn't taken: sudo without -H leaves one.
    """
    import pwd

    path = text_of(os.environ.get(b"HOME", b""))
    try:
        if path.startswith("/") and os.stat(path).st_uid == os.geteuid():
            return path
    except OSError:
        pass
    try:
        return pwd.getpwuid(os.geteuid()).pw_dir or None
    except KeyError:
        return None


def roots(request):
    """Return the directories that may hold runs, the best one first."""
    if request.get("spool"):
        return [absolute(text_of(octets(request["spool"])))]
    found = []
    state = text_of(os.environ.get(b"XDG_STATE_HOME", b""))
    if not state.startswith("/"):
        at = home()
        state = join(at, ".local/state") if at else ""
    if state:
        found.append(join(state, "corra"))
    return found + ["/var/tmp/corra-%d" % os.geteuid()]


def secure(path):
    """Open a directory that is this user's and that nobody else can write to.

    Raises OSError: EPERM where another user owns it or can write to it.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    found = os.fstat(fd)
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        os.close(fd)
        raise PermissionError(errno.EPERM, "others can write to it or own it", path)
    return fd


def prepare_root(root):
    """Make ROOT/runs and return its descriptor. Raises OSError, which says what is in the way."""
    above = root
    while not present(above):
        above = parent(above)
    kind = REMOTE_TYPES.get(file_system(above))
    if kind:
        raise OSError(errno.EREMOTE, "is on a remote file system (%s)" % kind, root)
    make_directories(join(root, "runs"), 0o700)
    os.close(secure(root))
    return secure(join(root, "runs"))


def claim(runs, prog_id, request, feed, token):
    """Make the run's directory; return whether this start was the first to do so.

    It is made under another name and renamed, so that it is there as a whole or not at all.
    Raises OSError where there is no room. Nothing is left behind then.
    """
    temporary = ".new-%s-%d-%s" % (prog_id, os.getpid(), os.urandom(4).hex())
    os.mkdir(temporary, 0o700, dir_fd=runs)
    directory = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY, dir_fd=runs)
    try:
        fill_in_place(directory, "exit", b"\n" * PAGE * 2)
        fill(directory, "program.json", to_json(request).encode() + b"\n")
        os.mkdir("fifo", 0o700, dir_fd=directory)
        for name in stream_names(request):
            fill(directory, name, b"")
        for name in fifo_names(request):
            os.mkfifo("fifo/" + name, 0o600, dir_fd=directory)
        if takes_more(request):
            fill(directory, "stdin", b"")
            fill(directory, "senders", SENDER_RECORD.pack(0, 0, 0))
        fill(directory, "index", b"")
        if (request.get("run") or {}).get("keep_output"):
            prepare_bound(directory, stream_names(request))
        fill(directory, "keeper", b"")
        os.mkfifo("control", 0o600, dir_fd=directory)
        if request.get("callback"):
            fill(directory, "courier.json", b" " * PAGE)
            fill(directory, "token", octets(token or ""))
        if feed:
            feed(directory)
        fill(directory, "launched.tmp", b" " * 255 + b"\n")  # the last: `abandoned` asks its age
        try:
            os.rename(temporary, prog_id, src_dir_fd=runs, dst_dir_fd=runs)
            return True
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
        discard(runs, temporary)
        return False
    except BaseException:
        discard(runs, temporary)
        raise
    finally:
        os.close(directory)


def stream_names(request):
    return (
        ["output"]
        if request["program"].get("merge") or request["program"].get("pty")
        else ["stdout", "stderr"]
    )


def fifo_names(request):
    """Return the names of the program's ends that are FIFOs. A program on a terminal has none."""
    if request["program"].get("pty"):
        return []
    return stream_names(request) + (["stdin"] if takes_more(request) else [])


def takes_more(request):
    """Return whether the program's stdin is held open, so that bytes may be sent while it runs."""
    source = request["program"].get("stdin")
    return bool(request["program"].get("pty")) or (
        isinstance(source, dict) and bool(source.get("open"))
    )


def read_launched(text):
    """Return (pid, start, boot id, time ns, monotonic ns) of the launched program, or None."""
    words = (text or b"").split()
    return (
        (int(words[0]), int(words[1]), words[2].decode(), int(words[3]), int(words[4]))
        if len(words) == 5
        else None
    )


def launched_by(directory, files):
    """Return the launched process as `read_launched` does, or None before the program's claim.

    The claim is the name `launched`; where the whole spool was deleted, it is the open file.
    """
    launched = read_launched(os.pread(files["launched"], 256, 0))
    if launched and os.fstat(files["launched"]).st_nlink == 1 and not exists(directory, "launched"):
        return None
    return launched


def abandoned(directory):
    """Return whether nobody may launch the run any more: its claim is older than a start may take.

    It says nothing of a run that has guards or was launched. A guard asks this before it launches,
    and a reader once it has seen the lock free, so both give the same answer.
    """
    try:
        claimed_s = os.stat("launched.tmp", dir_fd=directory, follow_symlinks=False).st_mtime
    except FileNotFoundError:
        return not exists(directory, "launched")
    return abs(time.time() - claimed_s) > START_DEADLINE_S


def stdin_facts(directory):
    """Return the State's `stdin`: bytes accepted, bytes moved, and whether it has ended.

    It is None where stdin isn't held open.
    """
    try:
        fd = os.open("senders", os.O_RDONLY | os.O_NOFOLLOW, dir_fd=directory)
    except FileNotFoundError:
        return None
    try:
        length = os.stat("stdin", dir_fd=directory, follow_symlinks=False).st_size
        return {
            "length": length,
            "moved": min(length, SENDER_RECORD.unpack(os.pread(fd, 24, 0))[0]),
            "ended": end_of_stdin(fd) is not None,
        }
    except (OSError, struct.error):
        return None
    finally:
        os.close(fd)


def end_of_stdin(senders):
    """Return where a stdin that was held open ends, or None while more may come.

    No sender is accepted after the record of the end.
    """
    last = os.fstat(senders).st_size // SENDER_RECORD.size - 1
    if last < 1:
        return None
    who, offset, _ = SENDER_RECORD.unpack(
        os.pread(senders, SENDER_RECORD.size, last * SENDER_RECORD.size)
    )
    return offset if who == END_OF_STDIN else None
