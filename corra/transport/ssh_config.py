"""What ssh_config means for a host, as ssh itself reads it.

`ssh -G` knows Include, Match and canonical names, which no parser in Python does (paramiko#1609),
and takes 4 ms. Where there is no ssh program, paramiko's parser reads ssh_config.

RULES says of each directive what the default link makes of it. No directive that is set is ignored
in silence: a host whose directives Fabric can't do is reached through the ssh program.
"""

from __future__ import annotations

import enum
import fnmatch
import os
import pwd
import re
import socket
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from corra.errors import NotStarted
from corra.model.host import Host

from .channel import first_line

SSH_PORT = 22
# The logins that the default link can do, in the order in which ssh tries them.
METHODS = ("publickey", "keyboard-interactive", "password")


class Care(enum.Enum):
    """What the default link makes of a directive."""

    DONE = "done"
    DEFAULT_ONLY = "else through ssh"
    ON_NEED = "through ssh on need"
    HARMLESS = "means nothing to corra"


class Rule(NamedTuple):
    """What the default link makes of some directives.

    `defaults` are the values that `ssh -G` shows for a directive that isn't set. Where it is empty,
    `ssh -G` shows the directive only if it is set.
    """

    care: Care
    names: tuple[str, ...]
    note: str
    defaults: tuple[str, ...] = ()


_NO = ("no", "false")
# As in ssh_config(5) of OpenSSH 9.2 to 10.2 with Debian's and Fedora's own directives.
# docs/hosts.md shows the same table.
RULES = (
    Rule(
        Care.DONE,
        ("Host", "Match", "Include", "IgnoreUnknown", "Tag"),
        "`ssh -G` reads them",
    ),
    Rule(
        Care.DONE,
        (
            "CanonicalizeHostname",
            "CanonicalDomains",
            "CanonicalizeFallbackLocal",
            "CanonicalizeMaxDots",
            "CanonicalizePermittedCNAMEs",
        ),
        "`ssh -G` looks the name up",
    ),
    Rule(
        Care.DONE,
        ("Hostname", "Port", "User", "AddressFamily", "ConnectTimeout"),
        "`--connect-timeout` goes before ConnectTimeout",
    ),
    Rule(
        Care.DONE,
        ("ProxyJump", "ProxyCommand"),
        "each host on the way has its own ssh_config; a command that fails is quoted, with its "
        "exit code, which `ssh` itself (`--via openssh`) doesn't tell",
    ),
    Rule(
        Care.DONE,
        ("IdentityFile", "IdentitiesOnly", "IdentityAgent"),
        "with the certificate beside a key; FIDO keys on need",
    ),
    Rule(
        Care.DONE,
        (
            "PreferredAuthentications",
            "PubkeyAuthentication",
            "PasswordAuthentication",
            "KbdInteractiveAuthentication",
            "NumberOfPasswordPrompts",
            "BatchMode",
        ),
        "a list that names gssapi-with-mic or hostbased goes through ssh",
    ),
    Rule(
        Care.DONE,
        ("StrictHostKeyChecking", "HostKeyAlias", "UserKnownHostsFile", "GlobalKnownHostsFile"),
        "hosts with a `@cert-authority` line, and files with a blank in the name, go through ssh",
    ),
    Rule(Care.DONE, ("HashKnownHosts",), "for `accept-new`"),
    Rule(
        Care.DONE,
        ("Ciphers", "MACs", "KexAlgorithms", "HostKeyAlgorithms", "PubkeyAcceptedAlgorithms"),
        "what Fabric has of the list, AES-GCM first; through ssh if that is nothing",
    ),
    Rule(Care.DONE, ("CASignatureAlgorithms",), "certificates of hosts go through ssh"),
    Rule(Care.DONE, ("RequiredRSASize", "RSAMinSize"), "for the host's key and for yours"),
    Rule(Care.DONE, ("SendEnv", "SetEnv"), "as ssh sends them"),
    Rule(Care.DEFAULT_ONLY, ("RevokedHostKeys", "KnownHostsCommand"), "not set"),
    Rule(
        Care.DEFAULT_ONLY,
        ("CheckHostIP", "VerifyHostKeyDNS", "NoHostAuthenticationForLocalhost"),
        "no",
        _NO,
    ),
    Rule(Care.DEFAULT_ONLY, ("GSSAPIKeyExchange", "GSSAPIDelegateCredentials"), "no", _NO),
    Rule(
        Care.DEFAULT_ONLY, ("CertificateFile", "PKCS11Provider", "KbdInteractiveDevices"), "not set"
    ),
    Rule(Care.DEFAULT_ONLY, ("BindAddress", "BindInterface"), "not set"),
    Rule(
        Care.DEFAULT_ONLY,
        ("ProxyUseFdpass", "Compression", "Tunnel"),
        "no",
        _NO,
    ),
    Rule(Care.DEFAULT_ONLY, ("ConnectionAttempts",), "1", ("1",)),
    Rule(Care.DEFAULT_ONLY, ("RekeyLimit",), "default none", ("0 0",)),
    Rule(
        Care.DEFAULT_ONLY,
        ("IPQoS",),
        "none, or the default",
        ("none none", "lowdelay throughput", "af21 cs1", "ef none", "ef cs0"),
    ),
    Rule(
        Care.DEFAULT_ONLY,
        ("ChannelTimeout", "RefuseConnection", "VersionAddendum"),
        "not set",
    ),
    Rule(
        Care.ON_NEED,
        (
            "GSSAPIAuthentication",
            "GSSAPIClientIdentity",
            "GSSAPIServerIdentity",
            "GSSAPITrustDns",
            "GSSAPIRenewalForcesRekey",
            "GSSAPIKexAlgorithms",
        ),
        "if the host offers Kerberos and takes none of your keys",
    ),
    Rule(
        Care.ON_NEED,
        ("HostbasedAuthentication", "HostbasedAcceptedAlgorithms", "EnableSSHKeysign"),
        "if the host offers it and takes none of your keys",
    ),
    Rule(
        Care.ON_NEED, ("SecurityKeyProvider",), "if a FIDO key is named and no other key is taken"
    ),
    Rule(
        Care.ON_NEED,
        ("ControlMaster", "ControlPath", "ControlPersist"),
        "if a master is there and no key is taken; always with `--via openssh`",
    ),
    Rule(
        Care.HARMLESS,
        (
            "ForwardAgent",
            "ForwardX11",
            "ForwardX11Timeout",
            "ForwardX11Trusted",
            "XAuthLocation",
            "LocalForward",
            "RemoteForward",
            "DynamicForward",
            "GatewayPorts",
            "ClearAllForwardings",
            "ExitOnForwardFailure",
            "PermitRemoteOpen",
            "StreamLocalBindMask",
            "StreamLocalBindUnlink",
            "TunnelDevice",
        ),
        "corra forwards nothing",
    ),
    Rule(
        Care.HARMLESS,
        (
            "LocalCommand",
            "PermitLocalCommand",
            "RemoteCommand",
            "RequestTTY",
            "SessionType",
            "StdinNull",
            "ForkAfterAuthentication",
            "EscapeChar",
            "EnableEscapeCommandline",
            "ObscureKeystrokeTiming",
        ),
        "corra runs its own command, without a terminal of ssh's",
    ),
    Rule(
        Care.HARMLESS,
        ("ServerAliveInterval", "ServerAliveCountMax", "TCPKeepAlive"),
        "corra asks for a sign of life by itself",
    ),
    Rule(Care.HARMLESS, ("AddKeysToAgent", "UpdateHostKeys"), "only ssh itself learns keys"),
    Rule(
        Care.HARMLESS,
        (
            "LogLevel",
            "LogVerbose",
            "SyslogFacility",
            "VisualHostKey",
            "FingerprintHash",
            "WarnWeakCrypto",
        ),
        "what ssh prints and logs",
    ),
)
_RULE_OF = {name.lower(): (name, rule) for rule in RULES for name in rule.names}
# What would keep a command from running through the ssh program, and the values that don't.
_IN_THE_WAY = {"StdinNull": "no", "ForkAfterAuthentication": "no", "SessionType": "default"}

_STRICT = {
    "true": "yes",
    "yes": "yes",
    "ask": "ask",
    "accept-new": "accept-new",
    "false": "no",
    "no": "no",
    "off": "no",
}
_TOKEN = re.compile(r"%(.?)|\$\{(\w+)\}")


class SshSettings(NamedTuple):
    """The directives that decide how a host is reached. `strict` is yes, ask, accept-new or no."""

    hostname: str
    port: int
    user: str
    address_family: int = socket.AF_UNSPEC
    identity_files: tuple[str, ...] = ()
    identities_only: bool = False
    identity_agent: str | None = None
    user_known_hosts: tuple[str, ...] = ()
    global_known_hosts: tuple[str, ...] = ()
    hash_known_hosts: bool = False
    host_key_alias: str | None = None
    strict: str = "ask"
    proxy_jump: str | None = None
    proxy_command: str | None = None
    connect_timeout_s: float | None = None
    alive_interval_s: float = 0.0
    control_path: str | None = None
    control_persist: bool = False
    # None stands for all that Fabric has.
    ciphers: tuple[str, ...] | None = None
    macs: tuple[str, ...] | None = None
    key_exchanges: tuple[str, ...] | None = None
    host_key_types: tuple[str, ...] | None = None
    user_key_types: tuple[str, ...] | None = None
    rsa_bits_min: int = 0
    methods: tuple[str, ...] = METHODS
    batch: bool = False
    prompts: int = 3
    send_env: tuple[str, ...] = ()
    set_env: tuple[str, ...] = ()
    # The directives that only the ssh program can do, and the ways to log in that only it has.
    beyond_fabric: tuple[str, ...] = ()
    other_methods: tuple[str, ...] = ()
    # Options that the ssh program must be given so that a command runs.
    for_a_command: tuple[str, ...] = ()

    @property
    def known_as(self) -> str:
        """The name that known_hosts has for this host."""
        if self.host_key_alias:
            return self.host_key_alias
        name = self.hostname.lower()
        return name if self.port == SSH_PORT else f"[{name}]:{self.port}"

    @property
    def known_without_port(self) -> str:
        """The name under which ssh looks for the key if known_hosts doesn't have `known_as`."""
        return self.host_key_alias or self.hostname.lower()

    def environment(self) -> list[tuple[str, str]]:
        """Return the variables of this process that SendEnv names, then those of SetEnv."""
        sent = [
            (name, value)
            for name, value in os.environ.items()
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in self.send_env)
        ]
        pairs = (each.partition("=") for each in self.set_env)
        return sent + [(name, value) for name, _, value in pairs]


def config_path(config: Any = None) -> str | None:
    """Return the ssh_config to be used instead of the usual ones, or None.

    It is Fabric's `ssh_config_path`, or $CORRA_SSH_CONFIG.
    """
    path = config.get("ssh_config_path") if config is not None else None
    path = path or os.environ.get("CORRA_SSH_CONFIG")
    return os.path.expanduser(path) if path else None


def ssh_settings(host: Host, path: str | None = None) -> SshSettings:
    """Return the settings for `host`; what `host` says itself goes before ssh_config.

    Raises NotStarted if ssh can't read ssh_config.
    """
    return Question(host, path).answer()


class Question:
    """An `ssh -G` that runs in the background until `answer` waits for it."""

    def __init__(self, host: Host, path: str | None = None) -> None:
        self.host = host
        self.path = path
        self._ssh: subprocess.Popen[bytes] | None = None
        self._failed: OSError | None = None
        try:
            self._ssh = _ask_ssh(host, path)
        except (FileNotFoundError, PermissionError):
            pass  # no ssh on this machine
        except OSError as error:
            self._failed = error

    def answer(self) -> SshSettings:
        """Return the settings, once. Raises NotStarted if ssh fails or can't be started."""
        if self._failed is not None:
            raise NotStarted(
                f"ssh -G {self.host.name}: {self._failed.strerror}", host=self.host.name
            )
        if self._ssh is None:
            return _read(self.host, _by_paramiko(self.host, self.path))
        found = _answer_of(self._ssh, self.host)
        settings = _read(self.host, found)
        if not settings.beyond_fabric:
            return settings
        # A newer ssh may have other defaults, and other directives. It is asked for them only here.
        usual = _answer_of(_ask_ssh(self.host, "none"), self.host)
        return _read(self.host, found, usual)


def _ask_ssh(host: Host, path: str | None) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [
            *("ssh", "-G"),
            *(["-F", path] if path else []),
            *host.ssh_options,
            *("--", host.ssh_name),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def _answer_of(ssh: subprocess.Popen[bytes], host: Host) -> dict[str, list[str]]:
    with ssh:
        try:
            out, err = ssh.communicate(timeout=60)  # a Match exec in it may take its time
        except subprocess.TimeoutExpired as error:
            ssh.kill()
            raise NotStarted(f"ssh -G {host.name}: no answer in 60 s", host=host.name) from error
    if ssh.returncode:
        raise NotStarted(f"ssh -G {host.name}: {first_line(err)}", host=host.name)
    found: dict[str, list[str]] = {}
    for line in out.decode(errors="surrogateescape").split("\n")[:-1]:
        key, _, value = line.partition(" ")
        found.setdefault(key.lower(), []).append(value)
    return found


def _by_paramiko(host: Host, path: str | None) -> dict[str, list[str]]:
    from paramiko import SSHConfig

    config = SSHConfig()
    for each in [path] if path else ["~/.ssh/config", "/etc/ssh/ssh_config"]:
        try:
            with open(os.path.expanduser(each), encoding="utf-8", errors="surrogateescape") as file:
                config.parse(file)
        except FileNotFoundError:
            continue
    found = {
        key: value if isinstance(value, list) else [value]
        for key, value in config.lookup(host.ssh_name).items()
    }
    # A directive that ssh itself doesn't know stands there behind an IgnoreUnknown.
    found = {key: values for key, values in found.items() if key in _RULE_OF}
    if host.ssh_port:
        found["port"] = [str(host.ssh_port)]
    if host.ssh_login:
        found["user"] = [host.ssh_login]
    if host.ssh_key:
        found["identityfile"] = [host.ssh_key, *found.get("identityfile", ())]
    home = _home()
    found.setdefault(
        "identityfile", [f"{home}/.ssh/id_{kind}" for kind in ("rsa", "ecdsa", "ed25519")]
    )
    found.setdefault("userknownhostsfile", [f"{home}/.ssh/known_hosts {home}/.ssh/known_hosts2"])
    found.setdefault("globalknownhostsfile", ["/etc/ssh/ssh_known_hosts /etc/ssh/ssh_known_hosts2"])
    return found


def _read(
    host: Host, found: Mapping[str, Sequence[str]], usual: Mapping[str, Sequence[str]] | None = None
) -> SshSettings:
    """Return what `found` means; `usual` is what ssh says where nothing is set."""
    beyond = _beyond_fabric(found, usual)

    def one(key: str, default: str = "") -> str:
        return found[key][0] if found.get(key) else default

    def set_or_none(key: str) -> str | None:
        value = one(key)
        return None if value.lower() in {"", "none"} else value

    def is_on(key: str, default: str = "no") -> bool:
        return one(key, default).lower() in {"yes", "true"}

    me = pwd.getpwuid(os.getuid()).pw_name
    hostname, port, user = (
        one("hostname", host.ssh_name),
        int(one("port", str(SSH_PORT))),
        one("user", me),
    )
    alias = set_or_none("hostkeyalias")
    tokens = {
        "%": "%",
        "d": _home(),
        "h": hostname,
        "i": str(os.getuid()),
        "k": alias or host.ssh_name,
        "L": socket.gethostname().partition(".")[0],
        "l": socket.gethostname(),
        "n": host.ssh_name,
        "p": str(port),
        "r": user,
        "u": me,
    }

    def expanded(directive: str, text: str, variables: Mapping[str, str] | None) -> str:
        try:
            return expand(text, tokens, variables)
        except KeyError as error:
            beyond.append(f"{directive} with {error.args[0]}")
            return text

    def paths(directive: str, texts: Sequence[str]) -> tuple[str, ...]:
        return tuple(
            _expand_home(expanded(directive, text, os.environ))
            for text in texts
            if text.lower() != "none"
        )

    def files(directive: str) -> tuple[str, ...]:
        # ssh -G shows names with a blank as it shows two names.
        text = one(directive.lower())
        names = text.split()
        if any(_looks_cut(names[:end], names[end:]) for end in range(1, len(names))):
            beyond.append(f"{directive} with a blank in a name")
        return paths(directive, names)

    def listed(directive: str) -> tuple[str, ...] | None:
        if not (text := one(directive.lower())):
            return None
        if text[0] in "+-^":  # only ssh can tell what that is added to
            beyond.append(directive)
        return tuple(text.split(","))

    def methods() -> tuple[str, ...]:
        allowed = {
            "publickey": one("pubkeyauthentication", "yes").lower() not in {"no", "false"},
            "keyboard-interactive": is_on("kbdinteractiveauthentication", "yes"),
            "password": is_on("passwordauthentication", "yes"),
        }
        if one("pubkeyauthentication").lower() in {"unbound", "host-bound"}:
            beyond.append("PubkeyAuthentication")
        preferred = one("preferredauthentications")
        wanted = preferred.split(",") if preferred else METHODS
        if {"gssapi-with-mic", "gssapi-keyex", "hostbased"} & set(wanted):
            beyond.append("PreferredAuthentications")
        return tuple(each for each in wanted if allowed.get(each))

    def other_methods() -> tuple[str, ...]:
        return tuple(
            method
            for method, directive in (
                ("gssapi-with-mic", "gssapiauthentication"),
                ("hostbased", "hostbasedauthentication"),
            )
            if is_on(directive) and not one("preferredauthentications")
        )

    def socket_of_agent() -> str | None:
        text = one("identityagent", "SSH_AUTH_SOCK")
        if text == "SSH_AUTH_SOCK":
            return os.environ.get(text)
        if re.fullmatch(r"\$\w+", text):
            return os.environ.get(text[1:])
        return next(iter(paths("IdentityAgent", [text])), None)

    timeout, proxy = set_or_none("connecttimeout"), set_or_none("proxycommand")
    return SshSettings(
        hostname=hostname,
        port=port,
        user=user,
        address_family={"inet": socket.AF_INET, "inet6": socket.AF_INET6}.get(
            one("addressfamily"), socket.AF_UNSPEC
        ),
        identity_files=paths("IdentityFile", found.get("identityfile", ())),
        identities_only=is_on("identitiesonly"),
        identity_agent=socket_of_agent(),
        user_known_hosts=files("UserKnownHostsFile"),
        global_known_hosts=files("GlobalKnownHostsFile"),
        hash_known_hosts=is_on("hashknownhosts"),
        host_key_alias=alias,
        strict=_STRICT.get(one("stricthostkeychecking"), "ask"),
        proxy_jump=set_or_none("proxyjump"),
        # The shell expands its variables.
        proxy_command=expanded("ProxyCommand", proxy, None) if proxy else None,
        connect_timeout_s=float(timeout) if timeout else None,
        alive_interval_s=float(one("serveraliveinterval", "0")),
        control_path=set_or_none("controlpath"),
        control_persist=one("controlpersist", "no") != "no",
        ciphers=listed("Ciphers"),
        macs=listed("MACs"),
        key_exchanges=listed("KexAlgorithms"),
        host_key_types=listed("HostKeyAlgorithms"),
        user_key_types=listed("PubkeyAcceptedAlgorithms"),
        rsa_bits_min=int(one("requiredrsasize") or one("rsaminsize") or 0),
        methods=methods(),
        batch=is_on("batchmode"),
        prompts=int(one("numberofpasswordprompts", "3")),
        send_env=tuple(name for each in found.get("sendenv", ()) for name in each.split()),
        set_env=tuple(found.get("setenv", ())),
        other_methods=other_methods(),
        for_a_command=tuple(
            f"-o{name}={value}"
            for name, value in _IN_THE_WAY.items()
            if one(name.lower(), value) != value
        ),
        beyond_fabric=tuple(dict.fromkeys(beyond)),
    )


def _beyond_fabric(
    found: Mapping[str, Sequence[str]], usual: Mapping[str, Sequence[str]] | None
) -> list[str]:
    """Return the directives in `found` that are set to what only the ssh program can do."""
    beyond = []
    for key, values in found.items():
        name, rule = _RULE_OF.get(key, (key, None))
        if rule is not None:
            if rule.care is not Care.DEFAULT_ONLY or values[0].lower() in {"", "none"}:
                continue
            if values[0].lower() in rule.defaults:
                continue
        if usual is None or usual.get(key) != values:
            beyond.append(name)
    return beyond


def _looks_cut(before: Sequence[str], after: Sequence[str]) -> bool:
    """Whether two names of files may be one name with a blank in it."""
    if not after[0].startswith(("/", "~", "%", "$")):
        return True
    whole = _expand_home(" ".join([before[-1], after[0]]))
    return os.path.exists(whole)


def expand(text: str, tokens: Mapping[str, str], variables: Mapping[str, str] | None = None) -> str:
    """Replace ssh_config's %h, and ${NAME} by `variables`. Raises KeyError for an unknown one."""

    def value(match: re.Match[str]) -> str:
        token, variable = match.groups()
        if variable is not None:
            return match.group() if variables is None else variables[variable]
        if token not in tokens:
            raise KeyError(match.group())
        return tokens[token]

    return _TOKEN.sub(value, text)


def _home() -> str:
    # As ssh does: from the passwd entry, whatever $HOME says.
    return pwd.getpwuid(os.getuid()).pw_dir


def _expand_home(path: str) -> str:
    return _home() + path[1:] if path.startswith("~/") else os.path.expanduser(path)
