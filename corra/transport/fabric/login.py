"""Decides which keys are tried, and says why none fitted.

paramiko's own way fails for a missing IdentityFile, tries each key of the ssh-agent even where
IdentitiesOnly forbids it, and reports only the last error.
"""

from __future__ import annotations

import base64
import contextlib
import os
import socket
from collections.abc import Iterator
from typing import Any

from corra.errors import Auth
from corra.model.host import Host
from corra.transport.ssh_config import SshSettings

# An ssh-agent may have to ask its user, or wait until a token is touched. sshd itself waits no
# longer than this (LoginGraceTime).
SIGN_S = 120.0


class Login:
    """paramiko's `auth_strategy`: the keys that ssh would try, few of the server's MaxAuthTries.

    First comes the key that the caller gave, then the ssh-agent's keys that ssh_config names, then
    key files, and then the rest of the ssh-agent's keys unless IdentitiesOnly is set.
    """

    def __init__(self, host: Host, user: str, known: SshSettings, kwargs: dict[str, Any]) -> None:
        self._host = host
        self._user = user
        self._known = known
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

    def authenticate(self, transport: Any) -> None:
        """Log in, or raise Auth with what was tried."""
        with contextlib.ExitStack() as self._agent:
            self._authenticate(transport)

    def _authenticate(self, transport: Any) -> None:
        from paramiko import AuthenticationException, BadAuthenticationType, SSHException

        methods = ["publickey"]
        try:
            for name, key in self._keys():
                self._tried.append(name)
                try:
                    more = transport.auth_publickey(self._user, key)
                except BadAuthenticationType as error:
                    methods = list(error.allowed_types)
                    break
                except AuthenticationException:
                    continue
                except (
                    TimeoutError
                ) as error:  # of the agent's socket: paramiko itself waits on events
                    raise self._refused([f"the ssh-agent didn't sign in {SIGN_S:g} s"]) from error
                if not more:
                    return
                methods = list(more)
                break
            if self._password is not None:
                self._tried.append("password")
                with contextlib.suppress(BadAuthenticationType):
                    if not transport.auth_password(self._user, self._password):
                        return
        except AuthenticationException:
            pass
        except (SSHException, EOFError) as error:
            if transport.is_active() and "uthentication" not in str(error):
                raise
            methods = ["too many keys were tried"] if len(self._tried) > 1 else methods
        raise self._refused(methods)

    def _refused(self, methods: list[str]) -> Auth:
        tried = ", ".join(_short(name) for name in self._tried) or "none, there is none"
        hint = [f"keys tried: {tried}"]
        if self._locked:
            hint.append(f"a passphrase is in the way:  ssh-add {_short(self._locked[0])}")
        hint.append(f"does  ssh {self._host} true  let you in?  then  --via openssh")
        return Auth(
            f"{self._user} may not log in ({', '.join(methods)})", host=self._host.name, hint=hint
        )

    def _keys(self) -> Iterator[tuple[str, Any]]:
        if self._pkey is not None:
            yield "the key given", self._pkey
        agent = self._agent_keys() if self._allow_agent and self._known.identity_agent else []
        named = {blob for path in self._files if (blob := _public_blob(path))}
        for key in agent:
            if key.asbytes() in named:
                yield f"agent's {key.comment or key.get_name()}", key
        held = {key.asbytes() for key in agent}
        for path in self._files:
            if _public_blob(path) not in held and (private := self._load(path)) is not None:
                yield path, private
        if not self._known.identities_only:
            for key in agent:
                if key.asbytes() not in named:
                    yield f"agent's {key.comment or key.get_name()}", key

    def _load(self, path: str) -> Any:
        """Return the private key in a file, with its certificate, or None if it can't be used."""
        from paramiko import ECDSAKey, Ed25519Key, PasswordRequiredException, RSAKey, SSHException

        if not os.access(path, os.R_OK):  # ssh_config may name a file for another machine
            return None
        for kind in (Ed25519Key, ECDSAKey, RSAKey):
            try:
                key = kind.from_private_key_file(path, self._passphrase)
            except PasswordRequiredException:
                break
            except (SSHException, ValueError, OSError):
                continue
            if os.path.exists(path + "-cert.pub"):
                key.load_certificate(path + "-cert.pub")
            return key
        else:
            return None
        self._locked.append(path)
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
