"""Decides which keys are tried, and says why none fitted.

paramiko's own way fails for a missing IdentityFile, tries each key of the ssh-agent even where
IdentitiesOnly forbids it, and reports only the last error.
"""

from __future__ import annotations

import base64
import contextlib
import os
import re
import socket
from collections.abc import Iterator, Sequence
from typing import Any

from corra.errors import Auth
from corra.model.host import Host
from corra.transport.questions import Ask, terminal_to_ask
from corra.transport.ssh_config import SshSettings

from .beyond import BeyondFabric

# An ssh-agent may have to ask its user, or wait until a token is touched. sshd itself waits no
# longer than this (LoginGraceTime).
SIGN_S = 120.0
# A person may look for the code. sshd waits no longer either.
ANSWER_S = 120.0


RSA_HASHES = ("rsa-sha2-512", "rsa-sha2-256")


class _Refused(Exception):
    """The host doesn't take this key, or this answer."""


class NobodyToAsk(Exception):
    """The operator must be asked, which is for the thread that waits for the connection."""


class Answers:
    """What the operator has answered, so that a link that breaks asks for no password again.

    `begun` says that the connection is made beside other work: nothing may be asked then.
    """

    def __init__(self) -> None:
        self._given: dict[tuple[str, str], str] = {}
        self._ask: Ask | None = None
        self.begun = False

    def allow(self) -> None:
        """Have the terminal asked from here on, if there is one."""
        self.begun = False
        self._ask = terminal_to_ask()

    def forbid(self) -> None:
        """Ask no more: a program's output is on the terminal by now."""
        self._ask = None

    def begin(self) -> None:
        """Note that a connection is begun beside other work; `allow` ends that."""
        self.begun = terminal_to_ask() is not None

    @property
    def can_ask(self) -> bool:
        return self.begun or self._ask is not None

    def to(self, host: str, prompt: str, echo: bool, again: bool) -> str:
        """Return the answer to `prompt`. Raises EOFError if there is none, and NobodyToAsk."""
        about = (host, prompt)
        if not again and about in self._given:
            return self._given[about]
        if self.begun:
            raise NobodyToAsk
        if self._ask is None:
            raise EOFError
        named = prompt if not host or host in prompt else f"({host}) {prompt}"
        answer = self._ask(named, echo)
        # A code is good for one login only.
        if re.search("passw|passphrase", prompt, re.IGNORECASE):
            self._given[about] = answer
        return answer


class Login:
    """paramiko's `auth_strategy`: the keys that ssh would try, few of the server's MaxAuthTries.

    First comes the key that the caller gave, then the ssh-agent's keys that ssh_config names, then
    key files, and then the rest of the ssh-agent's keys unless IdentitiesOnly is set. `ask` asks
    the operator; without it nothing is asked. If not `alone`, the ssh program is to be tried where
    it may do better.
    """

    def __init__(
        self,
        host: Host,
        user: str,
        known: SshSettings,
        kwargs: dict[str, Any],
        *,
        answers: Answers,
        alone: bool = True,
    ) -> None:
        self._host = host
        self._user = user
        self._known = known
        # BatchMode: nobody is asked.
        self._answers = Answers() if known.batch else answers
        self._alone = alone
        self._password = kwargs.pop("password", None)
        self._passphrase = kwargs.pop("passphrase", None) or self._password
        self._pkey = kwargs.pop("pkey", None)
        files = kwargs.pop("key_filename", None) or []
        self._files = [
            os.path.expanduser(each) for each in ([files] if isinstance(files, str) else files)
        ]
        self._files += (
            [each for each in known.identity_files if each not in self._files]
            if kwargs.pop("look_for_keys", True)
            else []
        )
        self._allow_agent = kwargs.pop("allow_agent", True)
        self._agent = contextlib.ExitStack()
        self._tried: list[str] = []
        self._locked: list[str] = []
        self._strange: list[str] = []
        self._silent = False

    def authenticate(self, transport: Any) -> None:
        """Log in, or raise Auth with what was tried. Raises BeyondFabric, NobodyToAsk."""
        with contextlib.ExitStack() as self._agent:
            self._authenticate(transport)

    def _authenticate(self, transport: Any) -> None:
        keys = self._keys()
        wanted = self._known.methods
        # Each step that the host takes may lead to another one (AuthenticationMethods).
        while more := self._step(transport, wanted, keys):
            wanted = tuple(method for method in self._known.methods if method in more)

    def _step(
        self, transport: Any, wanted: Sequence[str], keys: Iterator[tuple[str, Any]]
    ) -> list[str]:
        """Log in by one of the methods `wanted`; return the methods that the host wants besides."""
        from paramiko import AuthenticationException, BadAuthenticationType, SSHException

        try:
            if "publickey" in wanted:
                with contextlib.suppress(BadAuthenticationType):
                    for name, key in keys:
                        self._tried.append(name)
                        with contextlib.suppress(_Refused):
                            return self._by_key(transport, key)
            if not transport.allowed_methods:
                with contextlib.suppress(BadAuthenticationType):
                    return list(transport.auth_none(self._user))
            if self._password is None and not self._alone and self._ssh_may_do_better(transport):
                raise BeyondFabric(
                    self._strange, self._refused(transport.allowed_methods), certain=False
                )
            for method in wanted:
                if not transport.is_active():
                    break
                if method in transport.allowed_methods and method != "publickey":
                    with contextlib.suppress(_Refused, BadAuthenticationType):
                        return self._by_words(transport, method)
        except AuthenticationException:
            pass
        except (SSHException, EOFError) as error:
            if transport.is_active() and "uthentication" not in str(error):
                raise
            many = ["too many keys were tried"] if len(self._tried) > 1 else ["publickey"]
            raise self._refused(many) from error
        raise self._refused(transport.allowed_methods or ["publickey"])

    def _by_key(self, transport: Any, key: Any) -> list[str]:
        from paramiko import AuthenticationException, BadAuthenticationType

        try:
            more: list[str] = transport.auth_publickey(self._user, key)
        except BadAuthenticationType:
            raise
        except AuthenticationException as error:
            if not transport.is_active():
                raise
            raise _Refused from error
        except TimeoutError as error:  # of the agent's socket: paramiko itself waits on events
            raise self._refused([f"the ssh-agent didn't sign in {SIGN_S:g} s"]) from error
        return more

    def _by_words(self, transport: Any, method: str) -> list[str]:
        """Log in by a password or by answers. Raises _Refused when all of them were wrong."""
        from paramiko import AuthenticationException

        transport.auth_timeout = ANSWER_S
        for attempt in range(self._known.prompts):
            again = bool(attempt)
            try:
                if method == "keyboard-interactive":
                    more = transport.auth_interactive(
                        self._user,
                        lambda title, instructions, prompts, again=again: self._given(
                            prompts, again
                        ),
                    )
                else:
                    prompt = f"{self._user}@{self._host.name}'s password: "
                    (password,) = self._given([(prompt, False)], again)
                    more = transport.auth_password(self._user, password, fallback=False)
            except AuthenticationException as error:
                if method not in self._tried:
                    self._tried.append(method)
                if self._silent or not transport.is_active():
                    raise _Refused from error
                if method not in transport.allowed_methods or not self._answers.can_ask:
                    raise _Refused from error
            else:
                return list(more)
        raise _Refused

    def _given(self, prompts: Sequence[tuple[str, bool]], again: bool) -> list[str]:
        """Return the answers to what the host asks. Raises NobodyToAsk in paramiko's place."""
        from paramiko import AuthenticationException

        given = []
        for prompt, echo in prompts:
            if self._password is not None and not echo and not again:
                given.append(str(self._password))
                continue
            try:
                given.append(self._answers.to(self._host.name, prompt, echo, again))
            except EOFError as error:
                self._silent = True
                raise AuthenticationException("no answer") from error
        return given

    def _ssh_may_do_better(self, transport: Any) -> bool:
        known = self._known
        self._strange += [
            f"the host offers {method}"
            for method in known.other_methods
            if method in transport.allowed_methods
        ]
        if known.control_path and os.path.exists(known.control_path):
            self._strange.append("there is a ControlMaster")
        return bool(self._strange)

    def _refused(self, methods: Sequence[str]) -> Auth:
        tried = ", ".join(_short(name) for name in self._tried)
        hint = [f"keys tried: {tried}" if tried else "no key was tried: none was found"]
        words = [each for each in self._known.methods if each in methods and each != "publickey"]
        if self._locked:
            hint.append(f"a passphrase is in the way:  ssh-add {_short(self._locked[0])}")
        if words and self._answers.can_ask:
            hint.append(f"asked for: {' and '.join(words)}")
        elif words:
            hint.append(f"it would ask ({', '.join(words)}), and there is no terminal")
        else:
            hint.append(f"if  ssh -oBatchMode=yes {self._host} true  works:  --via openssh")
        return Auth(
            f"{self._user} may not log in ({', '.join(methods)})", host=self._host.name, hint=hint
        )

    def _keys(self) -> Iterator[tuple[str, Any]]:
        if self._pkey is not None:
            yield "the key given", self._pkey
        agent = self._agent_keys() if self._allow_agent and self._known.identity_agent else []
        paths = {blob: path for path in self._files if (blob := _public_blob(path))}
        for key in agent:
            if (path := paths.get(key.asbytes())) is not None:
                yield from self._with_certificate(f"agent's {key.comment or path}", key, path)
        held = {key.asbytes() for key in agent}
        for path in self._files:
            if _public_blob(path) not in held and (private := self._load(path)) is not None:
                yield from self._with_certificate(path, private, path)
        if not self._known.identities_only:
            for key in agent:
                if key.asbytes() not in paths and self._accepted(key):
                    yield f"agent's {key.comment or key.get_name()}", key
        for path in list(self._locked):
            if self._answers.can_ask and (private := self._unlocked(path)) is not None:
                self._locked.remove(path)
                yield from self._with_certificate(path, private, path)

    def _with_certificate(self, name: str, key: Any, path: str) -> Iterator[tuple[str, Any]]:
        """Yield a key with the certificate that lies beside `path`, and without, as ssh does."""
        if os.path.exists(path + "-cert.pub"):
            with contextlib.suppress(ValueError, OSError):
                key.load_certificate(path + "-cert.pub")
                if self._accepted(key):
                    yield f"{name}-cert", key
            key.public_blob = None
        if self._accepted(key):
            yield name, key

    def _accepted(self, key: Any) -> bool:
        """Whether PubkeyAcceptedAlgorithms and RequiredRSASize allow a key."""
        blob = key.public_blob
        kind = blob.key_type if blob is not None else key.get_name()
        if "ssh-rsa" in kind and (key.get_bits() or 0) < self._known.rsa_bits_min:
            return False
        allowed = self._known.user_key_types
        if allowed is None:
            return True
        if "ssh-rsa" not in kind:
            return kind in allowed
        return any(kind.replace("ssh-rsa", rsa) in allowed for rsa in RSA_HASHES)

    def _unlocked(self, path: str) -> Any:
        for attempt in range(self._known.prompts):
            try:
                passphrase = self._answers.to(
                    "", f"Enter passphrase for key '{_short(path)}': ", False, bool(attempt)
                )
            except EOFError:
                return None
            if (private := self._load(path, passphrase)) is not None:
                return private
        return None

    def _load(self, path: str, passphrase: str | None = None) -> Any:
        """Return the private key in a file, or None if it can't be used."""
        from paramiko import ECDSAKey, Ed25519Key, PasswordRequiredException, RSAKey, SSHException

        if not os.access(path, os.R_OK):  # ssh_config may name a file for another machine
            return None
        for kind in (Ed25519Key, ECDSAKey, RSAKey):
            try:
                return kind.from_private_key_file(path, passphrase or self._passphrase)
            except PasswordRequiredException:
                if path not in self._locked:
                    self._locked.append(path)
                return None
            except (SSHException, ValueError, OSError):
                continue
        if passphrase is None:
            self._strange.append(f"only ssh can read {_short(path)}")
        return None

    def _agent_keys(self) -> list[Any]:
        from paramiko import SSHException
        from paramiko.agent import AgentSSH

        # paramiko's own Agent knows $SSH_AUTH_SOCK only; IdentityAgent may name another socket.
        agent = AgentSSH()
        carrier = self._agent.enter_context(socket.socket(socket.AF_UNIX))
        carrier.settimeout(5)
        try:
            carrier.connect(self._known.identity_agent or "")
            carrier.settimeout(SIGN_S)
            agent._connect(carrier)  # noqa: SLF001 - as its subclass does
            return list(agent.get_keys())
        except (SSHException, OSError):
            return []


def _public_blob(path: str) -> bytes | None:
    """Return the bytes of the public key beside a private one, or None."""
    try:
        with open(path if path.endswith(".pub") else path + ".pub", encoding="ascii") as file:
            return base64.b64decode(file.read().split()[1])
    except (OSError, ValueError, IndexError):
        return None


def _short(path: str) -> str:
    home = os.path.expanduser("~")
    return "~" + path[len(home) :] if path.startswith(home + "/") else path
