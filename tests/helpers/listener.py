"""A collector that misbehaves on request, over real sockets and real TLS, and a private certificate
authority for it.

Without such a request it does what a collector does: it appends by offset, answers a hole with 409,
and takes the end once all bytes are in.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import ipaddress
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

DEADLINE_S = 30.0


@dataclass(frozen=True)
class Seen:
    """One request as it came, and the status of its answer (0: no answer)."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes
    status: int
    at: float


@dataclass
class Held:
    """What the listener has kept of one run."""

    streams: dict[str, bytearray] = field(default_factory=dict)
    gaps: list[tuple[str, int, int]] = field(default_factory=list)
    completed: list[dict[str, Any]] = field(default_factory=list)
    states: list[dict[str, Any]] = field(default_factory=list)


# An odd answer to a request: (status, headers, body), or a function that gets the connection to
# itself.
Odd = tuple[int, Mapping[str, str], bytes] | Callable[["Listener", socket.socket], None]


class Listener:
    """`odd` holds the answers to the next requests, in order; `odd_for(path, answer)` answers every
    request for that path.
    """

    def __init__(
        self,
        *,
        tls: ssl.SSLContext | None = None,
        token: str | None = "secret-token",
        port: int = 0,
    ) -> None:
        self.tls, self.token = tls, token
        self.held = Held()
        self.seen: list[Seen] = []
        self.odd: list[Odd] = []
        self.always: Odd | None = None
        self.body_max = 1 << 30
        self.changed = threading.Condition()
        self.server = socket.create_server(("127.0.0.1", port), backlog=64)
        self.port = self.server.getsockname()[1]
        self.open: set[socket.socket] = set()
        self.closed = False
        threading.Thread(target=self.accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}/api/v1/agent/PROG-ID"

    def output(self, name: str = "stdout") -> bytes:
        return bytes(self.held.streams.get(name, b""))

    def wait(self, what: Callable[[Listener], Any], why: str = "") -> Any:
        """Return the first true value of `what(self)`."""
        until = time.monotonic() + DEADLINE_S
        with self.changed:
            while not (found := what(self)):
                assert self.changed.wait(max(0.0, until - time.monotonic())), why or [
                    (each.path, each.status) for each in self.seen[-8:]
                ]
        return found

    def statuses(self) -> list[int]:
        return [each.status for each in self.seen]

    def accept(self) -> None:
        while True:
            try:
                connection, _ = self.server.accept()
            except OSError:
                return
            threading.Thread(target=self.serve, args=(connection,), daemon=True).start()

    def serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError):
            if self.tls:
                connection = self.tls.wrap_socket(connection, server_side=True)
            self.open.add(connection)
            with connection, connection.makefile("rb") as reader:
                while self.one(connection, reader):
                    pass
        self.open.discard(connection)

    def one(self, connection: socket.socket, reader: Any) -> bool:
        """Serve one request; return whether the connection stays open."""
        words = reader.readline().decode("ascii").split()
        if len(words) != 3:
            return False
        headers = {}
        while line := reader.readline().decode("latin-1").strip():
            name, _, value = line.partition(":")
            headers[name.title()] = value.strip()
        odd = self.odd.pop(0) if self.odd else self.always
        size = int(headers.get("Content-Length", 0))
        body = reader.read(size)
        if callable(odd):
            self.note(Seen(words[0], words[1], headers, body, 0, time.monotonic()))
            odd(self, connection)
            return False
        status, more, text = odd or self.answer(words[1], headers, body)
        self.note(Seen(words[0], words[1], headers, body, status, time.monotonic()))
        lines = [
            f"HTTP/1.1 {status} x",
            f"Content-Length: {len(text)}",
            *(f"{name}: {value}" for name, value in more.items()),
        ]
        connection.sendall("\r\n".join([*lines, "", ""]).encode() + text)
        return True

    def note(self, seen: Seen) -> None:
        with self.changed:
            self.seen.append(seen)
            self.changed.notify_all()

    def answer(
        self, path: str, headers: Mapping[str, str], body: bytes
    ) -> tuple[int, Mapping[str, str], bytes]:
        if self.token is not None and headers.get("Authorization") != f"Bearer {self.token}":
            return 401, {}, b""
        if len(body) > self.body_max:
            return 413, {}, b""
        verb, _, name = path.partition("/api/v1/agent/")[2].partition("/")[2].partition("/")
        if verb == "output":
            return self.append(name, int(headers["Upload-Offset"]), body, headers.get("Upload-Gap"))
        value = json.loads(body)
        if verb == "state":
            self.held.states.append(value)
            return 200, {}, b""
        lacks = {
            each: len(self.output(each))
            for each, facts in value["streams"].items()
            if len(self.output(each)) < facts["length"]
        }
        if lacks:
            return 409, {}, json.dumps({"expected": lacks}).encode()
        self.held.completed.append(value)
        return 200, {}, b""

    def append(
        self, name: str, offset: int, body: bytes, gap: str | None
    ) -> tuple[int, Mapping[str, str], bytes]:
        held = self.held.streams.setdefault(name, bytearray())
        if gap is not None and int(gap) == len(held):
            self.held.gaps.append((name, int(gap), offset))
            held += bytes(offset - len(held))
        if offset > len(held):
            return 409, {"Upload-Offset": str(len(held))}, b""
        held += body[len(held) - offset :]
        return 200, {"Upload-Offset": str(len(held))}, b""

    def stop(self) -> None:
        """Stop listening, and cut every open connection."""
        with contextlib.suppress(OSError):
            self.server.shutdown(socket.SHUT_RDWR)
        self.server.close()
        for each in list(self.open):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


# -- Ways to misbehave


def drop(listener: Listener, connection: socket.socket) -> None:
    """Close the connection without an answer, though the listener may have kept the bytes."""


def keep_and_drop(listener: Listener, connection: socket.socket) -> None:
    """Keep the bytes and lose the answer."""
    seen = listener.seen[-1]
    listener.answer(seen.path, seen.headers, seen.body)


def garbage(listener: Listener, connection: socket.socket) -> None:
    connection.sendall(b"\x00\x01SSH-2.0-not-http\r\n\r\n")


def drip(listener: Listener, connection: socket.socket) -> None:
    """Send one byte of an answer every 50 ms, for ever. No single read takes long."""
    for byte in b"HTTP/1.1 200 OK\r\nX-Slow: " + b"x" * 10**6:
        time.sleep(0.05)
        connection.sendall(bytes([byte]))


def flood(listener: Listener, connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 500 x\r\nContent-Length: 9999999999\r\n\r\n")
    with contextlib.suppress(OSError):
        while True:
            connection.sendall(b"x" * 65536)


# -- A private authority


class Authority:
    """A certificate authority made for one test."""

    def __init__(self, directory: Path, name: str = "test authority") -> None:
        self.directory, self.key = directory, ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        usage = x509.KeyUsage(
            digital_signature=True, key_cert_sign=True, crl_sign=True, content_commitment=False,
            key_encipherment=False,
            data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
        )  # fmt: skip
        builder = self.builder(self.name, self.key.public_key(), days=10).add_extension(
            x509.BasicConstraints(True, 0), critical=True
        )
        self.certificate = builder.add_extension(usage, critical=True).sign(
            self.key, hashes.SHA256()
        )
        self.pem = self.certificate.public_bytes(serialization.Encoding.PEM).decode()
        self.file = directory / f"{name.replace(' ', '-')}.pem"
        self.file.write_text(self.pem)

    def builder(self, subject: x509.Name, key: Any, *, days: int) -> x509.CertificateBuilder:
        now = dt.datetime.now(dt.timezone.utc)
        builder = x509.CertificateBuilder(self.name, subject, key, x509.random_serial_number())
        return builder.not_valid_before(now - dt.timedelta(days=20)).not_valid_after(
            now + dt.timedelta(days=days)
        )

    def server(self, host: str = "127.0.0.1", *, days: int = 9) -> tuple[Path, Path]:
        """Return the files of a certificate for `host` and of its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, host)])
        try:
            alternative: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(host))
        except ValueError:
            alternative = x509.DNSName(host)
        builder = self.builder(subject, key.public_key(), days=days).add_extension(
            x509.SubjectAlternativeName([alternative]), critical=False
        )
        identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        certificate = builder.add_extension(identifier, critical=False).sign(
            self.key, hashes.SHA256()
        )
        paths = self.directory / f"{host}-{days}.crt", self.directory / f"{host}-{days}.key"
        paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        paths[1].write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return paths

    def context(self, host: str = "127.0.0.1", *, days: int = 9) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*self.server(host, days=days))
        return context


@contextlib.contextmanager
def listening(**how: Any) -> Iterator[Listener]:
    listener = Listener(**how)
    try:
        yield listener
    finally:
        listener.stop()
