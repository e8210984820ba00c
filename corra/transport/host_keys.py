"""Checks a host's key against known_hosts, which it reads as ssh does.

Fabric checks no host key, and paramiko forgets which line holds which key. A host that known_hosts
knows by another key is refused, also where new hosts are accepted. The one exception is
StrictHostKeyChecking no.
"""

from __future__ import annotations

import base64
import binascii
import fnmatch
import hashlib
import hmac
import os
import shlex
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from corra.errors import HostKey
from corra.model.host import Host

from .ssh_config import SshSettings

_KINDS = {"ssh-ed25519": "ED25519", "ssh-rsa": "RSA", "ssh-dss": "DSA"}


class Key(NamedTuple):
    """A public key: its type as in known_hosts, its fingerprint as ssh shows it, and its bytes.

    The bytes are empty where only the fingerprint is known.
    """

    type: str
    fingerprint: str
    blob: bytes = b""

    @classmethod
    def of(cls, key_type: str, blob: bytes) -> Key:
        return cls(
            key_type,
            "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("="),
            blob,
        )

    def __str__(self) -> str:
        kind = _KINDS.get(self.type) or ("ECDSA" if self.type.startswith("ecdsa-") else self.type)
        return f"{kind} {self.fingerprint}"

    @property
    def rsa_bits(self) -> int | None:
        """The length of an RSA key."""
        if self.type != "ssh-rsa" or not self.blob:
            return None
        rest = self.blob
        for _ in range(3):  # its type, e and n
            size = int.from_bytes(rest[:4], "big")
            value, rest = rest[4 : 4 + size], rest[4 + size :]
        return int.from_bytes(value, "big").bit_length()

    @property
    def short(self) -> str:
        """The key for a message's first line; the whole fingerprint stands in a line below."""
        whole = str(self)
        return f"{whole[:-37]}..{whole[-3:]}" if self.fingerprint.startswith("SHA256:") else whole


class Known(NamedTuple):
    """One line of a known_hosts file."""

    key: Key
    file: str
    line: int
    marker: bytes

    @property
    def revoked(self) -> bool:
        return self.marker == b"@revoked"

    @property
    def authority(self) -> bool:
        return self.marker == b"@cert-authority"


def known(name: str, files: Iterable[str]) -> list[Known]:
    """Return the lines about `name`, which is `host` or `[host]:port`."""
    return [entry for file in files for entry in _read(name, file)]


def _lines(file: str) -> list[bytes]:
    try:
        with open(file, "rb") as lines:
            return lines.read().splitlines()
    except OSError:  # to ssh too, a file that it can't read is an empty one
        return []


def _read(name: str, file: str) -> Iterator[Known]:
    for number, line in enumerate(_lines(file), 1):
        marker, *fields = line.split() if line.startswith(b"@") else [b"", *line.split()]
        if len(fields) < 3 or fields[0].startswith(b"#"):
            continue
        if _matches(name, fields[0].decode(errors="replace")):
            try:
                key = Key.of(fields[1].decode("ascii"), base64.b64decode(fields[2]))
            except (binascii.Error, UnicodeDecodeError):
                continue
            yield Known(key, file, number, marker)


def _matches(name: str, patterns: str) -> bool:
    if patterns.startswith("|1|"):
        try:
            _, _, salt, digest = patterns.split("|")
            return hmac.compare_digest(
                hmac.digest(base64.b64decode(salt), name.encode(), "sha1"), base64.b64decode(digest)
            )
        except (ValueError, binascii.Error):
            return False
    hits = [
        pattern for pattern in patterns.lower().split(",") if _like(name, pattern.removeprefix("!"))
    ]
    return bool(hits) and not any(pattern.startswith("!") for pattern in hits)


def _like(name: str, pattern: str) -> bool:
    # A square bracket belongs to `[host]:port` and begins no set of characters.
    return fnmatch.fnmatchcase(name, pattern.replace("[", "[[]"))


def check(
    offered: Key,
    host: Host,
    settings: SshSettings,
    *,
    accept_new: bool = False,
    config: str | None = None,
) -> None:
    """Return if `host` is known by the key `offered`, or is a new host that may be remembered.

    A new host's key is written into known_hosts. `config` is the ssh_config in use, for the
    commands in the hints. Raises HostKey.
    """
    if (bits := offered.rsa_bits) is not None and bits < settings.rsa_bits_min:
        raise HostKey(
            f"host key too short: RSA of {bits} bits, and RequiredRSASize is"
            f" {settings.rsa_bits_min}",
            host=host.name,
        )
    entries = lines_about(settings) or _without_port(offered, settings)
    refusal = verdict(offered, entries, host, settings, config=config)
    if refusal is None:
        return
    if entries or not (accept_new or settings.strict in {"accept-new", "no"}):
        raise refusal
    if settings.user_known_hosts:
        remember_key(offered, settings)


def verdict(
    offered: Key,
    entries: Sequence[Known],
    host: Host,
    settings: SshSettings,
    *,
    config: str | None = None,
) -> HostKey | None:
    """Return what is wrong with `offered` by the lines of known_hosts about `host`, or None."""
    ssh = " ".join(
        [
            "ssh",
            *(["-F", shlex.quote(config)] if config else []),
            *(["-p", str(host.ssh_port)] if host.ssh_port else []),
        ]
    )
    ssh += f" {host.ssh_login}@{host.ssh_name} true" if host.ssh_login else f" {host.ssh_name} true"
    same = [entry for entry in entries if entry.key.fingerprint == offered.fingerprint]
    if any(entry.revoked for entry in same):
        return HostKey(
            f"host key REVOKED: {offered}",
            host=host.name,
            hint=["known_hosts has it marked @revoked: stop, report it"],
        )
    others = [entry for entry in entries if not entry.revoked]
    if same or (others and settings.strict == "no"):
        return None
    if not others:
        return HostKey(
            f"host key unknown: {offered.short}",
            host=host.name,
            hint=[
                f"whole: {offered}",
                f"compare it, then  {ssh}  (asks, remembers), or --accept-new-key",
            ],
        )
    # The line that contradicts `offered`: one of the same type if there is one.
    entry = next((each for each in others if each.key.type == offered.type), others[0])
    usual = os.path.expanduser("~/.ssh/known_hosts")
    where = "known_hosts" if entry.file == usual else entry.file
    file = "" if entry.file == usual else f" -f {shlex.quote(entry.file)}"
    again = f"ssh-keygen -R {shlex.quote(settings.known_as)}{file}"
    return HostKey(
        f"HOST KEY CHANGED: not the one in {where} line {entry.line}",
        host=host.name,
        hint=[
            f"known {entry.key}",
            f"offered {offered}",
            f"rebuilt? {again}, then {ssh}.  If not: stop, report it.",
        ],
    )


def lines_about(settings: SshSettings) -> list[Known]:
    """Return the lines of known_hosts about the host's own keys."""
    entries = known(settings.known_as, _files(settings))
    return [entry for entry in entries if not entry.authority]


def has_authority(settings: SshSettings) -> bool:
    """Whether known_hosts has a @cert-authority for the host, whose certificate may be its key."""
    names = {settings.known_as, settings.known_without_port}
    lines = (line.split() for file in _files(settings) for line in _lines(file))
    return any(
        fields[0] == b"@cert-authority" and _matches(name, fields[1].decode(errors="replace"))
        for fields in lines
        if len(fields) > 3
        for name in names
    )


def _without_port(offered: Key, settings: SshSettings) -> list[Known]:
    """Return the lines with the key `offered` that have the host's name without its port.

    As in ssh, such a line counts where none has the port, and another key in it proves nothing.
    """
    if settings.known_as == settings.known_without_port:
        return []
    entries = known(settings.known_without_port, _files(settings))
    return [
        entry
        for entry in entries
        if entry.key.fingerprint == offered.fingerprint and not entry.authority
    ]


def keys_to_ask_for(settings: SshSettings) -> list[Known]:
    """Return the lines whose keys the host is to answer with, if it has several."""
    return lines_about(settings) or known(settings.known_without_port, _files(settings))


def _files(settings: SshSettings) -> tuple[str, ...]:
    return (*settings.user_known_hosts, *settings.global_known_hosts)


def remember_key(key: Key, settings: SshSettings) -> None:
    """Add the host to the first UserKnownHostsFile, its name hashed if HashKnownHosts says so."""
    name = settings.known_as
    if settings.hash_known_hosts:
        salt = os.urandom(20)
        digest = hmac.digest(salt, name.encode(), "sha1")
        name = f"|1|{base64.b64encode(salt).decode()}|{base64.b64encode(digest).decode()}"
    file = settings.user_known_hosts[0]
    try:
        os.makedirs(os.path.dirname(file) or ".", mode=0o700, exist_ok=True)
        _append(file, f"{name} {key.type} {base64.b64encode(key.blob).decode()}\n".encode())
    except OSError:  # as with ssh: the host is new again next time
        return


def _append(file: str, line: bytes) -> None:
    fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        size = os.fstat(fd).st_size
        torn = b"\n" if size and os.pread(fd, 1, size - 1) != b"\n" else b""
        os.write(fd, torn + line)
    finally:
        os.close(fd)


def types_first(types: Iterable[str], entries: Iterable[Known]) -> list[str]:
    """Return the host key algorithms `types`, those of known keys first.

    Else a host that has several keys might answer with one that known_hosts doesn't hold.
    """
    wanted = set()
    for entry in entries:
        wanted |= (
            {"rsa-sha2-512", "rsa-sha2-256", "ssh-rsa"}
            if entry.key.type == "ssh-rsa"
            else {entry.key.type}
        )
    return sorted(types, key=lambda each: each not in wanted)
