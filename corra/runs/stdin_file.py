"""What a program reads from its start on, as a file that can be read again for as long as the start isn't confirmed."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import tempfile
from typing import IO, Any, BinaryIO, cast


def payload_of(
    stdin: str | bytes | IO[bytes] | IO[str] | None, *, named: bool
) -> tuple[dict[str, Any] | None, BinaryIO | None]:
    """Return what Program says of `stdin`, and the bytes as a file that can be read again if the start has to be repeated.

    `named`: the run's id is somebody else's idea, who may give it again: then the bytes are part of what is compared, by their hash. It takes a
    pass over them here and one there, which a gigabyte of a run that nobody can confuse with another needn't wait for.
    """
    if stdin is None:
        return None, None
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
    spooled = cast("BinaryIO", tempfile.TemporaryFile())  # noqa: SIM115 - read again for as long as the start isn't confirmed
    size = _pour(source, spooled)
    spooled.seek(0)
    return {"bytes": size, **({"sha256": _sha256(spooled)} if named else {})}, spooled


def _sha256(source: BinaryIO) -> str:
    """Return the hash of all of `source`: the same id with other bytes is another run, and a file that changes meanwhile is noticed."""
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
    """`size` bytes of a file from where it stood when it was given: what is appended to it meanwhile wasn't announced."""

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
