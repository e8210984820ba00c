"""The stdin that is sent with a start, as a file that can be read again until the host confirms."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import tempfile
from typing import IO, Any, BinaryIO, cast


def payload_of(
    stdin: str | bytes | IO[bytes] | IO[str], *, named: bool
) -> tuple[dict[str, Any], BinaryIO]:
    """Return the Program's `stdin`, and its bytes as a file that a repeated start can read again.

    `named`: the caller chose the id and may use it again, so a hash of the bytes is compared as
    well. The hash costs a pass over the bytes here and one there; an id made by corra needs none.
    """
    if isinstance(stdin, (str, bytes)):
        data = stdin.encode("utf-8", "surrogateescape") if isinstance(stdin, str) else stdin
        return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}, io.BytesIO(data)
    source: Any = getattr(stdin, "buffer", stdin)
    if _is_regular(source):
        begin = source.tell()
        size = max(0, os.fstat(source.fileno()).st_size - begin)
        part = cast("BinaryIO", _Part(source, begin, size))
        return {"bytes": size, **({"sha256": _sha256(part)} if named else {})}, part
    # A pipe gives its bytes once, and its length is known only at its end.
    spooled = cast("BinaryIO", tempfile.TemporaryFile())  # noqa: SIM115 - the Launch closes it
    size = _pour(source, spooled)
    spooled.seek(0)
    return {"bytes": size, **({"sha256": _sha256(spooled)} if named else {})}, spooled


def _sha256(source: BinaryIO) -> str:
    """Return the hash of all of `source`.

    The same id with other bytes is a conflict, and the host notices a file that changes meanwhile.
    """
    source.seek(0)
    digest = hashlib.sha256()
    while data := source.read(1 << 20):
        digest.update(data)
    source.seek(0)
    return digest.hexdigest()


def _is_regular(source: Any) -> bool:
    try:
        return stat.S_ISREG(os.fstat(source.fileno()).st_mode) and source.seekable()
    except (OSError, AttributeError, ValueError):
        return False


def _pour(source: Any, target: BinaryIO) -> int:
    size = 0
    while data := source.read(1 << 20):
        data = data.encode("utf-8", "surrogateescape") if isinstance(data, str) else data
        target.write(data)
        size += len(data)
    return size


class _Part(io.RawIOBase):
    """`size` bytes of a file from `begin` on: bytes appended meanwhile weren't announced."""

    def __init__(self, source: BinaryIO, begin: int, size: int) -> None:
        self._source, self._begin, self._size = source, begin, size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        assert whence == os.SEEK_SET
        return self._source.seek(self._begin + offset) - self._begin

    def readinto(self, buffer: Any) -> int:
        left = self._begin + self._size - self._source.tell()
        data = self._source.read(max(0, min(len(buffer), left)))
        buffer[: len(data)] = data
        return len(data)


def shared_descriptor(payload: BinaryIO) -> int:
    """Return a new descriptor of a file with all of `payload`, for many readers by offset."""
    if isinstance(payload, (io.BytesIO, _Part)):
        with tempfile.TemporaryFile() as file:
            payload.seek(0)
            _pour(payload, file)
            file.flush()
            return os.dup(file.fileno())
    return os.dup(payload.fileno())
