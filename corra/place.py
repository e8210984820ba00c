"""The agent, brought to a host and spoken to: one exec places it, starts it and carries all that follows.

The remote command is a constant, so nothing a user says can meet a shell. It finds a Python and has it execute the beginning of stdin, the
LOADER, whose length is part of the command; all else is data on the same stdin:

    exec('...the loader...');run()
    <nonce> <sha256 of agent.py> <verb>
    <bytes>                                 the request, as JSON of that many bytes

The loader imports `<cache>/<sha256>/agent.py` if its bytes have that hash and nobody else could have put them there. Else it answers
`corra 1 <nonce> need`, takes `<bytes>` and the source from stdin, and checks the hash before anything runs. Whatever a login shell
prints first is noise, told apart by the nonce.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import secrets
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from . import errors, sudo
from .channel import Channel, LinkLost, NoAnswer, Runner, Silent, first_line
from .program import Host, Mode
from .stream import STATE_MAX

PROTOCOL = b"corra 1 "
NOISE_MAX = 1 << 20
REPLY_MAX = STATE_MAX
# Written in one go; the host's pipe and ssh's window take this much without a pause.
PAYLOAD_STEP = 256 * 1024

PYTHONS = (
    "python3",
    "/usr/libexec/platform-python",
    *(f"python3.{minor}" for minor in range(14, 5, -1)),
)

# Runs on Python 3.6 and later, before anything is known about the host. What the command's `stdin` has read too far it takes over, and hands
# what it has read too far itself to the agent. `_sha256` and `_sha2`: hashlib alone would cost 5 ms at each call.
LOADER = r"""
import posix as os, sys

def load():
    ahead = bytearray(stdin.peek())
    me = os.geteuid()

    def more():
        data = os.read(0, 65536)
        if not data:
            sys.exit(2)
        ahead.extend(data)

    def line():
        while ahead.find(b"\n", 0, 256) < 0:
            if len(ahead) > 256:
                sys.exit(2)
            more()
        return exactly(ahead.find(b"\n") + 1)

    def exactly(size):
        while len(ahead) < size:
            more()
        data = bytes(ahead[:size])
        del ahead[:size]
        return data

    def say(text):
        sys.stdout.buffer.write(b"corra 1 " + nonce + text)
        sys.stdout.buffer.flush()

    def sha256(data):
        try:
            from _sha256 import sha256
        except ImportError:
            try:
                from _sha2 import sha256
            except ImportError:
                from hashlib import sha256
        return sha256(data).hexdigest()

    def refuse(why, path):
        raise OSError(1, why, path)

    def real(path, links=40):
        # As os.path.realpath, of which a run's guards would keep 150 to 440 kB.
        at = "/"
        parts = path.split("/")
        if path[:1] != "/":
            parts = os.getcwd().split("/") + parts
        while parts:
            part = parts.pop(0)
            if part == "..":
                at = above(at)
            elif part not in ("", "."):
                try:
                    target = os.readlink(at.rstrip("/") + "/" + part)
                except OSError:
                    at = at.rstrip("/") + "/" + part
                    continue
                links -= 1
                if links < 0:
                    refuse("has too many links", path)
                if target[:1] == "/":
                    at = "/"
                parts[:0] = target.split("/")
        return at

    def above(path):
        return path.rpartition("/")[0] or "/"

    def decoded(path):
        return path.decode(sys.getfilesystemencoding(), "surrogateescape")

    def trust_above(path):
        path = real(path)
        while True:
            found = os.stat(path)
            if found.st_uid not in (0, me):
                refuse("belongs to somebody else", path)
            if found.st_mode & 0o022 and not found.st_mode & 0o1000:
                refuse("others may write there", path)
            if path == "/":
                return
            path = above(path)

    def own(path, make):
        try:
            found = os.lstat(path)
        except FileNotFoundError:
            if not make:
                raise
            try:
                os.mkdir(path, 0o700)
            except FileExistsError:
                pass
            found = os.lstat(path)
        if found.st_mode & 0o170000 != 0o040000:
            refuse("is not a directory", path)
        if found.st_uid != me:
            refuse("belongs to somebody else", path)
        if found.st_mode & 0o022:
            refuse("others may write there", path)
        return path

    def place(root, make):
        base, names = root
        if make:
            try:
                os.mkdir(base, 0o700)
            except FileExistsError:
                pass
        trust_above(base)
        path = real(base)
        for name in names + (digest,):
            path = own(path + "/" + name, make)
        return path

    def is_there(path):
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "rb") as file:
            found = os.fstat(fd)
            if found.st_mode & 0o170000 != 0o100000 or found.st_uid != me or found.st_mode & 0o022:
                return False
            return sha256(file.read(1 << 24)) == digest

    def put(path, source):
        new = "%s.%d.%s" % (path, os.getpid(), nonce.decode())
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            with open(fd, "wb") as file:
                file.write(source)
            os.rename(new, path)
        except OSError:
            os.unlink(new)
            raise

    nonce, digest, verb = line().split()
    digest = digest.decode()
    mask = os.umask(0o077)
    home = decoded(os.environ.get(b"HOME", b""))
    if not home:
        try:
            import pwd
            home = pwd.getpwuid(me).pw_dir
        except KeyError:
            home = "/nonexistent"
    cache = decoded(os.environ.get(b"XDG_CACHE_HOME", b""))
    roots = [
        (cache if cache[:1] == "/" else home + "/.cache", ("corra",)),
        ("/var/tmp", ("corra-%d" % me, "cache")),
    ]
    where = None
    for root in roots:
        try:
            path = place(root, False)
            if is_there(path + "/agent.py"):
                where = path
                break
        except OSError:
            pass
    if where is None:
        size = line()
        request = size + exactly(int(size))
        say(b" need\n")
        source = exactly(int(line()))
        tried = []
        if sha256(source) != digest:
            say(b'\n{"error": "bad_request", "message": "the agent that came is not the one announced"}\n')
            return 1
        for root in roots:
            try:
                path = place(root, True)
                put(path + "/agent.py", source)
                where = path
                break
            except OSError as error:
                shown = "/".join((root[0],) + root[1])
                message = error.strerror
                if error.filename and error.errno == 1:
                    message = "%s %s" % (error.filename, message)
                tried.append({"dir": shown, "errno": error.errno, "message": message})
        if where is None:
            import json
            reply = {"error": "no_room", "what": "agent", "message": "no room for the agent", "tried": tried}
            say(b"\n" + json.dumps(reply).encode() + b"\n")
            return 1
        ahead[:0] = request
    sys.path.insert(0, where)
    try:
        import agent
    except (EOFError, ValueError, TypeError):
        # Python before 3.12.8 and 3.13.1 leaves a .pyc cut short where a disk is full or ulimit -f is low, and then trips over it.
        cache = where + "/__pycache__/"
        for name in os.listdir(cache):
            os.unlink(cache + name)
        sys.dont_write_bytecode = True
        import agent
    os.umask(mask)
    return agent.main([verb.decode()], agent.Input(0, bytes(ahead)), sys.stdout.buffer)

def run():
    code = load()
    sys.stdout.flush()
    os._exit(code)
"""

# For an answer that leaves nothing behind: modules come packed on stdin, and the last of them has the verb.
VISITOR = r"""
import json, os, sys, types, zlib

nonce, verb, size, *modules = stdin.readline().decode().split()
request = json.loads(stdin.read(int(size)).decode())
for each in modules:
    name, size = each.split(":")
    module = sys.modules[name] = types.ModuleType(name)
    exec(compile(zlib.decompress(stdin.read(int(size))), name + ".py", "exec"), module.__dict__)
code = module.main(verb, request, nonce, sys.stdout.buffer)
sys.stdout.flush()
os._exit(code)
"""

# run() stands outside: while exec runs a text it keeps what it was parsed into, 300 kB that a run's guards would be forked with. (compile()
# makes a class for each kind of syntax, 200 kB.)
_FIRST = b"exec(%s);run()\n" % repr(LOADER).encode("ascii")
_VISIT = b"exec(%s)\n" % repr(VISITOR).encode("ascii").ljust(len(_FIRST) - len("exec()\n"))
# By its length, since a line would be read byte by byte: 7 ms of each verb.
READ = f'stdin=open(0,"rb",{len(_FIRST)},closefd=0);exec(stdin.read({len(_FIRST)}))'


def command(*first: str) -> str:
    """Return the constant command; `first` are Pythons to be tried before the usual ones."""
    find = with_python('"$0"', *first)
    return f"""exec /bin/sh -c '{find}echo corra 1 no-python; exit 127' '{READ}'"""


def with_python(words: str, *first: str) -> str:
    """Return shell text that becomes a Python which executes `words`, code and what that is given; what stands behind it runs where none is."""
    names = " ".join(
        [*(path for path in first if re.fullmatch(r"[A-Za-z0-9/._+-]+", path)), *PYTHONS]
    )
    # No `!`, no backslash, no newline, no quote inside quotes: sh, bash, zsh, fish and tcsh read it alike.
    return (
        f"""for p in {names}; do case $("$p" -V 2>/dev/null) in "Python 3."[6-9]*|"Python 3."[1-9][0-9]*) """
        f"""exec "$p" -ISE -OO -c {words};; esac; done; """
    )


COMMAND = command()


@functools.cache
def agent_source() -> bytes:
    """Return the agent as it is sent: this version's agent.py."""
    return Path(__file__).with_name("agent.py").read_bytes()


@functools.cache
def courier_source() -> str:
    """Return the courier as it is sent along with a start that asks for a callback."""
    return Path(__file__).with_name("courier.py").read_text(encoding="utf-8")


@functools.cache
def _visitors() -> tuple[tuple[str, bytes], ...]:
    """Return the modules of a visit, packed: who looks, and the agent whose ways it knows."""
    doctor = Path(__file__).with_name("doctor.py").read_bytes()
    return (("agent", zlib.compress(agent_source())), ("doctor", zlib.compress(doctor)))


class Refused(Exception):
    """The host answered `{"error": KIND, ...}`; nothing was done beyond what `facts` say."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self.facts = dict(facts)
        self.kind = str(self.facts.get("error"))
        super().__init__(str(self.facts.get("message", self.kind)))


class BadReply(NoAnswer):
    """What came isn't corra's protocol."""


class Link:
    """An answered verb: its reply, and the bytes that follow in either direction."""

    def __init__(self, channel: Channel, reply: dict[str, Any], ahead: bytes, placed: int) -> None:
        self.reply = reply
        self.placed = placed
        self._channel = channel
        self._ahead = ahead

    def read(self, timeout_s: float | None) -> bytes:
        """Return the bytes that came, b"" at the end. Raises TimeoutError, LinkLost."""
        if self._ahead:
            data, self._ahead = self._ahead, b""
            return data
        return self._channel.read(timeout_s)

    def send(self, data: bytes) -> None:
        """Send all of `data`, whole against what other threads send. Raises LinkLost."""
        self._channel.write(data)

    def close(self) -> None:
        """Leave at once; a `read` in another thread ends with LinkLost."""
        self._channel.close()


class Agent:
    """The agent on one host, as one user. Nothing happens before the first verb."""

    def __init__(self, runner: Runner, source: bytes | None = None) -> None:
        self._runner = runner
        self._source = agent_source() if source is None else source
        self._digest = hashlib.sha256(self._source).hexdigest()

    @property
    def host(self) -> Host:
        return self._runner.host

    @property
    def runner(self) -> Runner:
        """What carries its bytes."""
        return self._runner

    @property
    def digest(self) -> str:
        """The hash it has on the host."""
        return self._digest

    @property
    def user(self) -> str:
        """Who its runs belong to there: whom sudo makes of us, else who logs in."""
        return self.host.user or self._runner.login

    def beside(self, source: bytes) -> Agent:
        """Return another file for the same host, placed and spoken to in the same way, over the same connection."""
        return Agent(self._runner, source)

    def begin(self) -> None:
        """Start connecting, beside what the caller still has to do before the first verb."""
        self._runner.begin()

    def call(
        self, verb: str, request: Mapping[str, Any], *, timeout_s: float = 15.0
    ) -> dict[str, Any]:
        """Return the reply of a verb that has nothing more to say. Raises Refused, CorraError, LinkLost."""
        link = self.stream(verb, request, timeout_s=timeout_s)
        link.close()
        return link.reply

    def stream(
        self,
        verb: str,
        request: Mapping[str, Any],
        *,
        payload: BinaryIO | None = None,
        timeout_s: float = 15.0,
        sending: Callable[[], None] | None = None,
    ) -> Link:
        """Return the Link once the reply has come; `payload` is sent where the verb asks for it.

        `timeout_s` is how long the host may be silent before the reply. `sending` is called before the first byte goes out; what it raises
        keeps that byte back. Raises Refused, CorraError, LinkLost.
        """
        return self._ask(
            lambda exchange: exchange.reply_to(request, self._digest, self._source, payload),
            verb,
            timeout_s,
            sending,
        )

    def visit(self, verb: str, request: Mapping[str, Any], *, timeout_s: float = 15.0) -> Link:
        """Return the Link of a verb of doctor.py, of which nothing stays there. Raises what `stream` does."""
        return self._ask(
            lambda exchange: exchange.reply_to_visit(request, _visitors()), verb, timeout_s
        )

    def _ask(
        self,
        ask: Callable[[_Exchange], Link],
        verb: str,
        timeout_s: float,
        sending: Callable[[], None] | None = None,
    ) -> Link:
        channel = self._runner.open(self._command)
        try:
            if sending is not None:
                sending()
            link = ask(_Exchange(self._runner, channel, verb, timeout_s))
        except BaseException:
            channel.close()
            raise
        if "error" in link.reply:
            link.close()
            raise Refused(link.reply)
        return link

    @property
    def _command(self) -> str:
        # Here we are a Python that will do; cron's PATH, say, may lead to none.
        return command(sys.executable) if self._runner.host.mode is Mode.LOCAL else COMMAND

    def close(self) -> None:
        """Let go of the connection. Runs go on."""
        self._runner.close()


def place(runner: Runner, *, source: bytes | None = None) -> Agent:
    """Return the agent behind `runner`; it is placed there when the first verb finds it missing."""
    return Agent(runner, source)


class _Exchange:
    """From the first byte of a channel to the end of the reply's line."""

    def __init__(self, runner: Runner, channel: Channel, verb: str, timeout_s: float) -> None:
        self._runner = runner
        self._channel = channel
        self._verb = verb
        self._timeout_s = timeout_s
        self._held = bytearray()
        self._spoke = False

    def reply_to(
        self, request: Mapping[str, Any], digest: str, source: bytes, payload: BinaryIO | None
    ) -> Link:
        nonce = secrets.token_hex(8)
        body = json.dumps({**request, "nonce": nonce}).encode()
        placed = 0
        self._send(_FIRST + f"{nonce} {digest} {self._verb}\n{len(body)}\n".encode() + body)
        while word := self._answer(PROTOCOL + nonce.encode()):
            self._spoke = True
            if word == b" need" and not placed:
                placed = len(source)
                self._send(b"%d\n%s" % (len(source), source))
            elif word == b" send" and payload is not None:
                self._send_all(payload)
                payload = None
            else:
                raise BadReply(f"{self._runner.host.name} asked for {word[:20]!r}")
        return Link(self._channel, self._object(), bytes(self._held), placed)

    def reply_to_visit(
        self, request: Mapping[str, Any], modules: Sequence[tuple[str, bytes]]
    ) -> Link:
        nonce, body = secrets.token_hex(8), json.dumps(request).encode()
        sizes = " ".join(f"{name}:{len(data)}" for name, data in modules)
        self._send(
            _VISIT
            + f"{nonce} {self._verb} {len(body)} {sizes}\n".encode()
            + body
            + b"".join(data for _, data in modules)
        )
        if word := self._answer(PROTOCOL + nonce.encode()):
            raise BadReply(f"{self._runner.host.name} asked for {word[:20]!r}")
        return Link(self._channel, self._object(), bytes(self._held), 0)

    def _send(self, data: bytes) -> bool:
        """Send `data`; where the other side has gone, what it said before that is what counts, so that the next read tells."""
        try:
            self._channel.write(data)
        except LinkLost:
            return False
        return True

    def _send_all(self, payload: BinaryIO) -> None:
        while data := payload.read(PAYLOAD_STEP):
            if not self._send(data):
                return

    def _answer(self, marker: bytes) -> bytes:
        """Return what follows the nonce in its line: b"" before the reply, b" need" or b" send"; noise before it is dropped."""
        none = PROTOCOL + b"no-python\n"
        while True:
            at = self._held.find(marker)
            end = self._held.find(b"\n", at) if at >= 0 else -1
            if end >= 0:
                word = bytes(self._held[at + len(marker) : end])
                del self._held[: end + 1]
                return word
            if none in self._held:
                raise errors.NoPython(
                    f"no Python 3.6 or later (tried {PYTHONS[0]}, {PYTHONS[2]} ..)",
                    host=self._runner.host.name,
                    hint=[
                        f"keep it from here:  {errors.typed()} run --via chaperone --host {self._runner.host} -- ..",
                        "or install one there:  apt-get install python3-minimal",
                    ],
                )
            if len(self._held) > NOISE_MAX:
                raise BadReply(
                    f"{self._runner.host.name} printed {NOISE_MAX} bytes before any reply: {first_line(bytes(self._held))!r}"
                )
            self._more()

    def _object(self) -> dict[str, Any]:
        searched = 0
        while (end := self._held.find(b"\n", searched)) < 0:
            searched = len(self._held)
            if searched > REPLY_MAX:
                raise BadReply(
                    f"{self._runner.host.name} sent a reply of more than {REPLY_MAX} bytes"
                )
            self._more()
        text = bytes(self._held[:end])
        del self._held[: end + 1]
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadReply(
                f"{self._runner.host.name} sent a reply that isn't JSON: {text[:80]!r}"
            ) from error
        if not isinstance(value, dict):
            raise BadReply(
                f"{self._runner.host.name} sent a reply that isn't an object: {text[:80]!r}"
            )
        return value

    def _more(self) -> None:
        try:
            data = self._channel.read(self._timeout_s)
        except TimeoutError:
            raise Silent(
                f"{self._runner.host.name} gave no answer in {self._timeout_s:g} s"
            ) from None
        if not data:
            raise self._no_reply()
        self._held += data

    def _no_reply(self) -> Exception:
        """Return what it means that the command ended without a reply."""
        status = self._channel.exit_status()
        said = self._channel.stderr()
        name = self._runner.host.name
        if refusal := sudo.refusal(
            said.decode(errors="replace"), self._runner.host, lambda: self._runner.login
        ):
            return refusal
        if b"Traceback (most recent call last)" in said:
            # The agent broke down while it worked, so what it had done by then is anybody's guess.
            last = said.decode(errors="replace").strip().splitlines()[-1]
            return BadReply(f"the agent on {name} broke down: {last[:200]}")
        quoted = first_line(said) or first_line(bytes(self._held)) or "nothing was said"
        if status is None:
            return LinkLost(f"{name} closed the channel: {quoted}")
        if self._spoke or status > 128:
            # Whatever was killed may have been killed behind the start.
            return NoAnswer(
                f"the command on {name} ended with exit {status} before it answered: {quoted}"
            )
        return errors.NotStarted(f"the login there ended with exit {status}: {quoted}", host=name)
