"""Journals on a host: files that only grow, one line an event. Nothing runs between two calls.

The client places it and speaks to it as to agent.py (corra/remote/agent_client.py), or imports it
where the journal is on this machine. Standard library only, Python 3.6 and later.

    append {book, key, at, lines}  add whole lines, then answer as `read` from `at` on, so that a
                                   writer learns what others wrote meanwhile
    read   {book, key, at}         {"start": AT, "end": SIZE}, then those bytes
    list   {}                      {"books": [{"book", "key", "size", "time"}]}
    boot   {}                      {"boot_id": ID}

    ${XDG_STATE_HOME:-~/.local/state}/corra/books/BOOK/KEY.jsonl
    /var/tmp/corra-UID/books/BOOK/KEY.jsonl                 where the home can't be written

A line is on the disk before its append is answered. If a power cut left part of a line, the next
append closes it with a line end, so it spoils nothing but itself. `book` and `key` are file names:
the client has quoted the text that they were made of.

A refusal is {"error": KIND, "message": TEXT}. Exit codes are the agent's: 0 answered, 1 refused,
2 the request could not be read.
"""

import contextlib
import fcntl
import json
import os
import stat

SUFFIX = ".jsonl"
REQUEST_MAX = 64 << 20


class Refusal(Exception):
    """An answer that isn't what was asked for."""

    def __init__(self, kind, message, **facts):
        super().__init__(message)
        self.facts = dict(facts, error=kind, message=message)


class Input:
    """stdin without a buffer. `ahead` are bytes that were read before."""

    def __init__(self, fd=0, ahead=b""):
        self.fd, self.ahead = fd, ahead

    def some(self, size):
        if self.ahead:
            data, self.ahead = self.ahead[:size], self.ahead[size:]
            return data
        return os.read(self.fd, size)

    def exactly(self, size):
        data = b""
        while len(data) < size:
            more = self.some(size - len(data))
            if not more:
                raise EOFError("stdin ended too early")
            data += more
        return data

    def request(self):
        size = b""
        while not size.endswith(b"\n"):
            size += self.exactly(1)
            if len(size) > 16:
                raise ValueError("not a request: %r" % size)
        if int(size) > REQUEST_MAX:
            raise ValueError("a request of %d bytes" % int(size))
        return json.loads(self.exactly(int(size)).decode())


# Where


def roots():
    """Return the directories that may hold journals, best first."""
    found = []
    state = os.environ.get("XDG_STATE_HOME", "")
    if not os.path.isabs(state):
        state = os.path.join(os.path.expanduser("~"), ".local", "state")
    if os.path.isabs(state):
        found.append(os.path.join(state, "corra", "books"))
    return found + ["/var/tmp/corra-%d/books" % os.geteuid()]


def named(book, key):
    """Return the path of a journal below a root. Raises Refusal for a name that is no file name."""
    for name in (book, key):
        if (
            not isinstance(name, str)
            or not name
            or name.startswith(".")
            or "/" in name
            or "\0" in name
        ):
            raise Refusal("bad_request", "not a file name: %r" % (name,))
    return os.path.join(book, key + SUFFIX)


def there(name):
    """Return the root that has the journal, or None.

    A root that can't be read is refused, since it may have the journal.
    """
    for root in roots():
        try:
            if stat.S_ISREG(os.lstat(os.path.join(root, name)).st_mode):
                return root
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as error:
            raise Refusal(
                "unreadable",
                "%s can't be read: %s" % (root, error.strerror),
                dir=root,
                errno=error.errno,
            ) from None
    return None


def make(root, name):
    """Make the directories above a journal. Raises PermissionError if others may write there."""
    # Each by itself, with its own rights: makedirs leaves the rights of all but the last to the
    # umask, which all threads of a runbook share.
    path = missing = os.path.dirname(os.path.join(root, name))
    lacking = []
    while not os.path.isdir(missing):
        lacking.append(missing)
        missing = os.path.dirname(missing)
    for each in reversed(lacking):
        with contextlib.suppress(FileExistsError):
            os.mkdir(each, 0o700)
    for each in (root, path):
        found = os.lstat(each)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
            raise PermissionError(1, "others can write to it or own it", each)


def opened(name):
    """Return (descriptor, path) of a journal, opened for writing. Raises Refusal.

    A journal that is nowhere yet is made in the first root that takes it.
    """
    known = there(name)
    tried = []
    for root in [known] if known else roots():
        path = os.path.join(root, name)
        try:
            make(root, name)
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
            return os.open(path, flags, 0o600), path
        except OSError as error:
            tried.append({"dir": root, "errno": error.errno, "message": error.strerror})
    raise Refusal(
        "no_room", "no room for a journal: %s" % tried[0]["message"], what="journal", tried=tried
    )


# Verbs: request -> (reply, the bytes that follow it)


def append(request):
    """Add lines, and return the journal from `at` on."""
    data = request["lines"].encode("utf-8", "surrogateescape")
    if data and not data.endswith(b"\n"):
        raise Refusal("bad_request", "the last line has no end")
    fd, path = opened(named(request["book"], request["key"]))
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        size = os.fstat(fd).st_size
        if not size:
            sync(os.path.dirname(path))
        elif os.pread(fd, 1, size - 1) != b"\n":
            data = b"\n" + data
        try:
            add(fd, data)
        except OSError as error:
            # Part of a line is no event: take it back, which needs no room.
            os.ftruncate(fd, size)
            raise Refusal(
                "no_room", "journal %s: %s" % (path, error.strerror), errno=error.errno, tried=[]
            ) from None
        return part(fd, request.get("at", 0))
    finally:
        os.close(fd)


def add(fd, data):
    while data:
        data = data[os.write(fd, data) :]
    os.fsync(fd)


def sync(path):
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def part(fd, at):
    end = os.fstat(fd).st_size
    start = min(max(0, int(at)), end)
    parts = []
    while start + sum(map(len, parts)) < end:
        got = start + sum(map(len, parts))
        parts.append(os.pread(fd, end - got, got))
    return {"start": start, "end": end}, b"".join(parts)


def read(request):
    """Return the bytes from `at` on; none if there is no such journal."""
    name = named(request["book"], request["key"])
    root = there(name)
    if root is None:
        return {"start": 0, "end": 0}, b""
    fd = os.open(os.path.join(root, name), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)
        return part(fd, request.get("at", 0))
    finally:
        os.close(fd)


def catalogue(request):
    """Return every journal of this user here, each once."""
    found = {}
    for root in reversed(roots()):
        for book in listed(root):
            for file in listed(os.path.join(root, book)):
                facts = os.lstat(os.path.join(root, book, file))
                if file.endswith(SUFFIX) and stat.S_ISREG(facts.st_mode):
                    key = file[: -len(SUFFIX)]
                    found[book, key] = {
                        "book": book,
                        "key": key,
                        "size": facts.st_size,
                        "time": facts.st_mtime,
                    }
    return {"books": [found[each] for each in sorted(found)]}, b""


def listed(path):
    try:
        return os.listdir(path)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise Refusal(
            "unreadable",
            "%s can't be read: %s" % (path, error.strerror),
            dir=path,
            errno=error.errno,
        ) from None


def boot(request):
    """Return the id of this boot, which changes only when the host has been down."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return {"boot_id": file.read().strip()}, b""


VERBS = {"append": append, "read": read, "list": catalogue, "boot": boot}


def answer(verb, request):
    """Carry out one verb in this process."""
    return VERBS[verb](request)


def main(argv, stdin, stdout):
    """Carry out one verb; return the exit code."""
    try:
        request = stdin.request()
        verb = VERBS[argv[0]]
    except (EOFError, KeyError, IndexError, ValueError):
        return 2
    code, more = 0, b""
    try:
        reply, more = verb(request)
    except Refusal as refusal:
        code, reply = 1, refusal.facts
    except (OSError, KeyError, TypeError, ValueError) as error:
        code, reply = 1, {"error": "failed", "message": "%s: %s" % (type(error).__name__, error)}
    stdout.write(
        b"corra 1 %s\n%s\n" % (str(request.get("nonce", "")).encode(), json.dumps(reply).encode())
    )
    stdout.write(more)
    stdout.flush()
    return code
