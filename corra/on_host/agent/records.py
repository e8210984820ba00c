"""JSON, and the keeper's record: one page that is read and written as a whole."""

import _json
import zlib

from .contract import LAYOUT, PAGE


def to_json(value):
    """Return `value` as ASCII JSON.

    The json package would cost 25 ms and 1.2 MB, for its regular expressions.
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, dict):
        return (
            "{"
            + ", ".join(to_json(str(key)) + ": " + to_json(each) for key, each in value.items())
            + "}"
        )
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(to_json, value)) + "]"
    return _json.encode_basestring_ascii(value)


class _Scanner:
    """The settings for json's own scanner, which is written in C."""

    strict, object_hook, object_pairs_hook, parse_float, parse_int = True, None, None, float, int
    parse_constant = float  # NaN and Infinity: `complaints` refuses them by the name of their key


def from_json(data):
    """Return the value of JSON `data` (bytes, UTF-8). Raises ValueError, RecursionError."""
    text = data.decode().strip(" \t\r\n")
    try:
        value, end = _json.make_scanner(_Scanner)(text, 0)
    except (StopIteration, SystemError):
        # SystemError: the scanner's own exception is in json.decoder, which isn't imported.
        raise ValueError("not JSON") from None
    if end != len(text):
        raise ValueError("not JSON: more after its end")
    return value


def pack(lines):
    """Return a page of `lines` and their checksum; a full one loses its oldest "sent" lines."""
    lines = [" ".join(str(word) for word in line).replace("\n", " ") for line in lines]
    while True:
        body = ("\n".join(lines) + "\n").encode("utf-8", "surrogateescape")
        page = b"corra %d %08x %d\n" % (LAYOUT, zlib.crc32(body), len(body)) + body
        if len(page) <= PAGE:
            return page.ljust(PAGE, b"\n")
        oldest = next(
            (at for at, line in enumerate(lines) if line.startswith("sent ")), len(lines) - 1
        )
        if lines[oldest].startswith("sent "):
            del lines[oldest]
        else:
            lines[oldest] = lines[oldest][: len(lines[oldest]) // 2]


def unpack(page):
    """Return the lines of a page as lists of words; None for a page that is empty or torn."""
    head, _, rest = page.partition(b"\n")
    words = head.split()
    try:
        size, expected = int(words[3]), int(words[2], 16)
    except (IndexError, ValueError):
        return None
    body = rest[:size]
    if words[0] != b"corra" or zlib.crc32(body) != expected:
        return None
    return [line.split(" ") for line in body.decode("utf-8", "surrogateescape").split("\n")[:-1]]


class Record:
    """What the keeper knows and others need: the first page of the slot."""

    def __init__(self):
        self.phase = "live"
        self.agent = 0
        self.guards = []  # (pid, start), the outermost first
        self.sent = []  # (time ns, signal name, request id, to, by)
        # [request id, reason, monotonic ns of the KILL, "grace" | "killing" | "done"]
        self.stop = None
        self.survivors = []  # (pid, start)
        self.blocked = None  # (since ns, errno)
        self.outcome = None  # (status, end ns, elapsed ns, reason)
        self.usage = None
        self.lengths = {}
        self.ooms = None  # the count of oom kills at the launch
        self.courier = 0  # the courier's pid, while it lives

    def page(self):
        lines = [
            ("phase", self.phase),
            ("agent", self.agent),
            ["guards"] + ["%d/%d" % each for each in self.guards],
        ]
        lines += [("length", name, length) for name, length in sorted(self.lengths.items())]
        lines += [("outcome",) + self.outcome] if self.outcome else []
        lines += [("usage",) + tuple(self.usage)] if self.usage else []
        lines += [["stop"] + self.stop] if self.stop else []
        lines += [("blocked",) + self.blocked] if self.blocked else []
        lines += [("ooms", self.ooms)] if self.ooms is not None else []
        lines += [("courier", self.courier)] if self.courier else []
        lines += [("survivor",) + each for each in self.survivors[:32]]
        lines += [("sent",) + each for each in self.sent]
        return pack(lines)

    @classmethod
    def read(cls, page):
        """Return the record in `page`; None for a page that is empty or torn."""
        lines = unpack(page)
        if lines is None:
            return None
        record = cls()
        for key, *words in lines:
            if key == "phase":
                record.phase = words[0]
            elif key == "agent":
                record.agent = int(words[0])
            elif key == "guards":
                record.guards = [tuple(map(int, word.split("/"))) for word in words]
            elif key == "length":
                record.lengths[words[0]] = int(words[1])
            elif key == "outcome":
                record.outcome = (int(words[0]), int(words[1]), int(words[2]), words[3])
            elif key == "usage":
                record.usage = tuple(int(word) for word in words)
            elif key == "stop":
                record.stop = [words[0], words[1], int(words[2]), words[3]]
            elif key == "blocked":
                record.blocked = (int(words[0]), int(words[1]))
            elif key == "ooms":
                record.ooms = int(words[0])
            elif key == "courier":
                record.courier = int(words[0])
            elif key == "survivor":
                record.survivors.append((int(words[0]), int(words[1])))
            elif key == "sent":
                record.sent.append(
                    (int(words[0]), words[1], words[2], words[3], " ".join(words[4:]))
                )
        return record
