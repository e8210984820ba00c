"""A file that is there when it is whole, and only its owner's."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from corra.errors import NOT_WRITTEN, CorraError
from corra.model.words import errno_words

FATE = "NOT EXPORTED"


class PrivateFile:
    """What is written, and the number and the SHA-256 of its bytes."""

    def __init__(self, file: BinaryIO, path: str) -> None:
        self._file = file
        self._path = path
        self.size = 0
        self._hash = hashlib.sha256()

    def write(self, data: bytes) -> int:
        with _errors_said(self._path):
            self._file.write(data)
        self.size += len(data)
        self._hash.update(data)
        return len(data)

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


def refuse_present(path: str, *, force: bool) -> None:
    """Raise CorraError where a file is at `path` that mustn't be replaced."""
    if os.path.isdir(path):
        raise CorraError(f"{path} is a directory", fate=FATE)
    if not force and os.path.lexists(path):
        raise CorraError(f"{path} is there already;  replace it: --force", fate=FATE)


@contextlib.contextmanager
def private_file(path: str, *, force: bool = False) -> Iterator[PrivateFile]:
    """Open a file of mode 0600 under another name, and give it its name in the end.

    A reader finds all of it or nothing, and what fails leaves nothing behind. `force` replaces what
    is there. Raises CorraError, code 121, where it can't be written here.
    """
    target = Path(path)
    refuse_present(path, force=force)
    new = target.with_name(f".{target.name}.{secrets.token_hex(6)}")
    with _errors_said(path):
        fd = os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    try:
        file = open(fd, "wb")  # noqa: SIM115 - its last write is its close, whose errors count
        try:
            yield PrivateFile(file, path)
            with _errors_said(path):
                file.flush()
                os.fsync(fd)
        finally:
            with contextlib.suppress(OSError):
                file.close()
        with _errors_said(path):
            _name(new, target, force=force)
    finally:
        with contextlib.suppress(FileNotFoundError):
            new.unlink()


@contextlib.contextmanager
def _errors_said(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        why = f"{path} can't be written here: {errno_words(error.errno)}"
        raise CorraError(why, fate=FATE, code=NOT_WRITTEN) from error


def _name(new: Path, target: Path, *, force: bool) -> None:
    """Give the file at `new` the name `target`; a link replaces nothing, as a rename would."""
    if force:
        new.replace(target)
        return
    try:
        os.link(new, target)
    except FileExistsError:
        refuse_present(str(target), force=False)
    except OSError:  # no hard links there: FAT, and some mounts of the network
        refuse_present(str(target), force=False)
        new.replace(target)
