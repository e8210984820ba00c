"""A run as a tar: its State, its streams, and the SHA-256 of each file."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Mapping
from typing import IO, Any

from corra.model.frames import Gap, Output

# Smaller outputs never touch the disk of this machine but in the archive itself.
_IN_MEMORY = 4 << 20


class _Writer(io.RawIOBase):
    """What tarfile writes to."""

    def __init__(self, write: Callable[[bytes], int]) -> None:
        self._write = write

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return self._write(bytes(data))


def write_tar(
    write: Callable[[bytes], int],
    events: Iterable[Output | Gap],
    *,
    folder: str,
    state: Mapping[str, Any],
    facts: Callable[[], Mapping[str, Any]],
    time_s: float,
) -> None:
    """Write a .tar.gz: `folder`/state.json, a file a stream, export.json and SHA256SUMS.

    `facts` is asked last, when all hits are counted; its object and the gaps are export.json. The
    streams wait in files without a name, since a tar says a file's size before its bytes.
    """
    with contextlib.ExitStack() as opened:
        files: dict[str, tuple[IO[bytes], Any]] = {}
        gaps: list[dict[str, Any]] = []
        for stream in state.get("streams") or ():
            files[stream] = _new_file(opened)
        for event in events:
            if isinstance(event, Gap):
                gaps.append(event._asdict())
                continue
            if event.stream not in files:
                files[event.stream] = _new_file(opened)
            file, sha = files[event.stream]
            file.write(event.data)
            sha.update(event.data)
        with tarfile.open(fileobj=_Writer(write), mode="w|gz", format=tarfile.PAX_FORMAT) as tar:
            sums = []
            for name, value in (
                ("state.json", state),
                ("export.json", {**facts(), "gaps": gaps}),
            ):
                data = (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode(
                    "utf-8", "replace"
                )
                _add(tar, f"{folder}/{name}", io.BytesIO(data), len(data), time_s)
                sums.append((hashlib.sha256(data).hexdigest(), name))
            for stream, (file, sha) in files.items():
                size = file.tell()
                file.seek(0)
                _add(tar, f"{folder}/{stream}", file, size, time_s)
                sums.append((sha.hexdigest(), stream))
            data = "".join(f"{sha}  {name}\n" for sha, name in sums).encode()
            _add(tar, f"{folder}/SHA256SUMS", io.BytesIO(data), len(data), time_s)


def _new_file(opened: contextlib.ExitStack) -> tuple[IO[bytes], Any]:
    file = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY)  # noqa: SIM115 - `opened` closes it
    return opened.enter_context(file), hashlib.sha256()


def _add(tar: tarfile.TarFile, name: str, file: IO[bytes], size: int, time_s: float) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode, member.mtime = size, 0o600, int(time_s)
    tar.addfile(member, file)
