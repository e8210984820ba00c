"""The exchange with the client: the request on stdin, the reply on stdout."""

import errno
import posix as os
import select

from ..contract import PROTOCOL, REQUEST_MAX, SPLICE
from ..kernel import splice
from ..records import from_json, to_json


class Input:
    """stdin without a buffer, since frames may follow the request. `ahead` was read before."""

    def __init__(self, fd=0, ahead=b""):
        self.fd, self.ahead = fd, ahead

    def some(self, size):
        if self.ahead:
            data, self.ahead = self.ahead[:size], self.ahead[size:]
            return data
        return os.read(self.fd, size)

    def exactly(self, size):
        parts = []
        while size:
            data = self.some(min(size, 1 << 20))
            if not data:
                raise EOFError("stdin ended %d bytes too early" % size)
            parts.append(data)
            size -= len(data)
        return b"".join(parts)

    def pour(self, file, size, digest=None):
        """Move the next `size` bytes into a file, and through a digest. Raises EOFError."""
        while size:
            moved = None
            if not self.ahead and digest is None:
                try:
                    moved = splice(self.fd, file, min(size, SPLICE))
                except BlockingIOError:
                    select.select([self.fd], [], [])
                    continue
                except OSError as error:
                    if error.errno != errno.EINVAL:
                        raise
            if moved is None:
                # A larger read takes memory of its own each time.
                data = self.some(min(size, 65536))
                moved = len(data)
                if digest is not None:
                    digest.update(data)
                while data:
                    data = data[os.write(file, data) :]
            if not moved:
                raise EOFError("stdin ended %d bytes too early" % size)
            size -= moved

    def line(self, limit=32):
        text = b""
        while not text.endswith(b"\n"):
            data = self.some(1)
            if not data or len(text) >= limit:
                raise EOFError("not a request: %r" % text)
            text += data
        return text

    def request(self):
        """Return (the request, whether frames may follow on stdin). Raises ValueError, EOFError."""
        first = self.some(1)
        if first == b"{":
            parts = [first]
            while parts[-1]:
                parts.append(self.some(1 << 16))
            return from_json(b"".join(parts)), False
        size = int(first + self.line())
        if not 0 <= size <= REQUEST_MAX:
            raise ValueError("a request of %d bytes" % size)
        return from_json(self.exactly(size)), True


class Reply:
    """stdout: the line with the nonce, one JSON value, then the verb's frames or bytes."""

    def __init__(self, out, nonce):
        self.out, self.nonce = out, nonce

    def first_line(self, more=""):
        if self.nonce:
            self.write(("corra %d %s%s\n" % (PROTOCOL, self.nonce, more)).encode())

    def send(self, value):
        self.send_text(to_json(value))

    def send_text(self, text):
        """Send one value that is JSON already."""
        self.first_line()
        self.write(text.encode() + b"\n")

    def frame(self, value):
        data = to_json(value).encode()
        self.write(b"S %d\n" % len(data) + data)

    def write(self, data):
        self.out.write(data)
        self.out.flush()
