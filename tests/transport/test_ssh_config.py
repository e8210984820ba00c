"""All of ssh_config on the default link, against a real sshd: the link honours each directive or
the host goes through ssh, and none is ignored in silence.
"""

import gzip
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_transports import add_key, everything, fails, ssh_agent

from corra.errors import Auth, CorraError, HostKey, Misuse, NotStarted
from corra.model.host import Host
from corra.remote.checkup import examine_host
from corra.transport.choose import choose_runner
from corra.transport.ssh_config import RULES, Care, ssh_settings
from sshd import Sshd, new_key, public, user

DOCS = Path(__file__).parents[2] / "docs" / "hosts.md"
MANUAL = Path("/usr/share/man/man5/ssh_config.5.gz")

Open = Callable[..., Any]


@pytest.fixture
def link(home: Path) -> Iterator[Open]:
    """Return a function that opens the default link to a host; the fixture closes it."""
    opened = []

    def make(name: str = "h", **how: Any) -> Any:
        opened.append(choose_runner(Host.parse(name), **how))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


def works(target: Any) -> bool:
    return everything(target, "echo in")[0] == b"in\n"


def by_ssh(target: Any) -> bool:
    return target._ssh is not None


def transport_of(target: Any) -> Any:
    return target._fabric._open[0].transport


# ---- the table


def test_every_directive_of_this_machines_ssh_has_a_rule() -> None:
    ruled = {name.lower() for rule in RULES for name in rule.names}
    said = subprocess.run(
        ["ssh", "-F", "none", "-G", "h"], capture_output=True, text=True, check=True, timeout=20
    )
    shown = {line.split()[0].lower() for line in said.stdout.splitlines()}
    assert shown - ruled == set()


def test_every_directive_of_the_manual_has_a_rule() -> None:
    if not MANUAL.exists():
        pytest.skip("no manual page of ssh_config on this machine")
    ruled = {name.lower() for rule in RULES for name in rule.names}
    text = gzip.decompress(MANUAL.read_bytes()).decode()
    named = re.findall(r"^\.It Cm ([A-Z]\w+)$", text, re.MULTILINE)
    assert len(named) > 90
    assert {name.lower() for name in named} - ruled == set()


def test_no_directive_has_two_rules() -> None:
    names = [name.lower() for rule in RULES for name in rule.names]
    assert len(names) == len(set(names))


def test_the_documented_table_is_the_one_that_is_used() -> None:
    rows = [
        f"| {' '.join(f'`{name}`' for name in rule.names)} | {rule.care.value} | {rule.note} |"
        for rule in RULES
    ]
    section = DOCS.read_text().partition("## ssh_config")[2].partition("\n## ")[0]
    table = [line for line in section.splitlines() if line.startswith("| `")]
    assert table == rows


# For each directive a value that isn't its default. None: the directive needs more than a line, and
# has its own test below.
VALUES: dict[str, str | None] = {
    "Host": None,
    "Match": None,
    "Include": None,
    "IgnoreUnknown": "NoSuchThing",
    "Tag": "x",
    "CanonicalizeHostname": "none",
    "CanonicalDomains": "invalid",
    "CanonicalizeFallbackLocal": "no",
    "CanonicalizeMaxDots": "0",
    "CanonicalizePermittedCNAMEs": "*.invalid:*.invalid",
    "Hostname": "127.0.0.1",
    "Port": None,
    "User": None,
    "AddressFamily": "inet",
    "ConnectTimeout": "9",
    "ProxyJump": None,
    "ProxyCommand": None,
    "IdentityFile": None,
    "IdentitiesOnly": "no",
    "IdentityAgent": "/nonexistent",
    "PreferredAuthentications": "password,publickey",
    "PubkeyAuthentication": "yes",
    "PasswordAuthentication": "no",
    "KbdInteractiveAuthentication": "no",
    "NumberOfPasswordPrompts": "1",
    "BatchMode": "yes",
    "StrictHostKeyChecking": "ask",
    "HostKeyAlias": None,
    "UserKnownHostsFile": None,
    "GlobalKnownHostsFile": "/nonexistent",
    "HashKnownHosts": "yes",
    "Ciphers": "aes256-ctr",
    "MACs": "hmac-sha2-512,hmac-sha2-256",
    "KexAlgorithms": "ecdh-sha2-nistp384",
    "HostKeyAlgorithms": "ssh-ed25519",
    "PubkeyAcceptedAlgorithms": "ssh-ed25519",
    "CASignatureAlgorithms": "ssh-ed25519",
    "RequiredRSASize": "2048",
    "RSAMinSize": None,
    "SendEnv": "LANG LC_*",
    "SetEnv": "A=b",
    "RevokedHostKeys": "/dev/null",
    "KnownHostsCommand": "/bin/true",
    "CheckHostIP": "yes",
    "VerifyHostKeyDNS": "yes",
    "NoHostAuthenticationForLocalhost": "yes",
    "GSSAPIKeyExchange": "yes",
    "GSSAPIDelegateCredentials": "yes",
    "CertificateFile": "/nonexistent",
    "PKCS11Provider": "/nonexistent.so",
    "KbdInteractiveDevices": "pam",
    "BindAddress": "127.0.0.1",
    "BindInterface": "lo",
    "ProxyUseFdpass": None,
    "Compression": "yes",
    "Tunnel": None,
    "ConnectionAttempts": "2",
    "RekeyLimit": "1G",
    "IPQoS": "cs1",
    "ChannelTimeout": "session=9999s",
    "RefuseConnection": None,
    "VersionAddendum": "x",
    "GSSAPIAuthentication": "yes",
    "GSSAPIClientIdentity": "x",
    "GSSAPIServerIdentity": "x",
    "GSSAPITrustDns": "yes",
    "GSSAPIRenewalForcesRekey": "yes",
    "GSSAPIKexAlgorithms": "gss-group14-sha256-",
    "HostbasedAuthentication": "yes",
    "HostbasedAcceptedAlgorithms": "ssh-ed25519",
    "EnableSSHKeysign": "yes",
    "SecurityKeyProvider": "/nonexistent",
    "ControlMaster": "auto",
    "ControlPath": "~/.ssh/control-%C",
    "ControlPersist": "10",
    "ForwardAgent": "yes",
    "ForwardX11": "yes",
    "ForwardX11Timeout": "9m",
    "ForwardX11Trusted": "yes",
    "XAuthLocation": "/nonexistent",
    "LocalForward": "127.0.0.1:1 127.0.0.1:1",
    "RemoteForward": "127.0.0.1:1 127.0.0.1:1",
    "DynamicForward": "127.0.0.1:1",
    "GatewayPorts": "yes",
    "ClearAllForwardings": "yes",
    "ExitOnForwardFailure": "yes",
    "PermitRemoteOpen": "none",
    "StreamLocalBindMask": "0077",
    "StreamLocalBindUnlink": "yes",
    "TunnelDevice": "1:1",
    "LocalCommand": "false",
    "PermitLocalCommand": "yes",
    "RemoteCommand": "false",
    "RequestTTY": "force",
    "SessionType": "none",
    "StdinNull": "yes",
    "ForkAfterAuthentication": "yes",
    "EscapeChar": "none",
    "EnableEscapeCommandline": "yes",
    "ObscureKeystrokeTiming": "no",
    "ServerAliveInterval": "7",
    "ServerAliveCountMax": "7",
    "TCPKeepAlive": "no",
    "AddKeysToAgent": "yes",
    "UpdateHostKeys": "no",
    "LogLevel": "QUIET",
    "LogVerbose": "*",
    "SyslogFacility": "LOCAL1",
    "VisualHostKey": "yes",
    "FingerprintHash": "md5",
    "WarnWeakCrypto": "no",
}


def test_each_directive_has_a_value_to_be_tried() -> None:
    assert list(VALUES) == [name for rule in RULES for name in rule.names]


def known_to_ssh(directive: str, value: str) -> bool:
    said = subprocess.run(
        ["ssh", "-F", "none", f"-o{directive}={value}", "-G", "h"],
        capture_output=True,
        timeout=20,
        check=False,
    )
    return said.returncode == 0


@pytest.mark.parametrize("care", Care, ids=lambda care: care.name.lower())
def test_each_directive_goes_the_way_that_the_table_says(
    sshd: Sshd, link: Open, care: Care
) -> None:
    wrong = []
    for rule in RULES:
        for name in rule.names if rule.care is care else ():
            value = VALUES[name]
            if value is None or not known_to_ssh(name, value):
                continue
            target = link(sshd.add_host(f"with-{name}", **{name: value}))
            if not works(target):
                wrong.append(f"{name}: no answer")
            if by_ssh(target) != (care is Care.DEFAULT_ONLY):
                wrong.append(f"{name}: {target.remark}")
            if by_ssh(target) and name not in target.remark:
                wrong.append(f"{name}: {target.remark}")
            target.close()
    assert wrong == []


@pytest.mark.parametrize("care", Care, ids=lambda care: care.name.lower())
def test_no_directive_keeps_a_command_from_the_ssh_program(
    sshd: Sshd, link: Open, care: Care
) -> None:
    wrong = []
    for rule in RULES:
        for name in rule.names if rule.care is care else ():
            value = VALUES[name]
            if value is None or not known_to_ssh(name, value) or name == "ControlMaster":
                continue
            # BindAddress sends each of these hosts through ssh.
            add = {name: value, "BindAddress": "127.0.0.1"}
            target = link(sshd.add_host(f"with-{name}", **add))
            if not (works(target) and by_ssh(target)):
                wrong.append(name)
    assert wrong == []


# The settings for every host in /etc/ssh/ssh_config of Debian 12 and of Fedora 41 (with its crypto
# policy DEFAULT).
DEBIAN = """
    SendEnv LANG LC_*
    HashKnownHosts yes
    GSSAPIAuthentication yes
"""
FEDORA = """
    GSSAPIAuthentication yes
    ForwardX11Trusted yes
    SendEnv LANG LC_CTYPE LC_NUMERIC LC_TIME LC_COLLATE LC_MONETARY LC_MESSAGES
    SendEnv LC_PAPER LC_NAME LC_ADDRESS LC_TELEPHONE LC_MEASUREMENT
    SendEnv LC_IDENTIFICATION LC_ALL LANGUAGE
    SendEnv XMODIFIERS
    Ciphers aes256-gcm@openssh.com,chacha20-poly1305@openssh.com,aes256-ctr,\
aes128-gcm@openssh.com,aes128-ctr
    MACs hmac-sha2-256-etm@openssh.com,hmac-sha1-etm@openssh.com,umac-128-etm@openssh.com,\
hmac-sha2-512-etm@openssh.com,hmac-sha2-256,hmac-sha1,umac-128@openssh.com,hmac-sha2-512
    KexAlgorithms curve25519-sha256,curve25519-sha256@libssh.org,ecdh-sha2-nistp256,\
ecdh-sha2-nistp384,ecdh-sha2-nistp521,diffie-hellman-group-exchange-sha256,\
diffie-hellman-group14-sha256,diffie-hellman-group16-sha512,diffie-hellman-group18-sha512
    PubkeyAcceptedAlgorithms ecdsa-sha2-nistp256,ecdsa-sha2-nistp256-cert-v01@openssh.com,\
sk-ecdsa-sha2-nistp256@openssh.com,ecdsa-sha2-nistp384,ecdsa-sha2-nistp521,ssh-ed25519,\
ssh-ed25519-cert-v01@openssh.com,sk-ssh-ed25519@openssh.com,rsa-sha2-256,rsa-sha2-512
    HostKeyAlgorithms ecdsa-sha2-nistp256,ecdsa-sha2-nistp384,ecdsa-sha2-nistp521,ssh-ed25519,\
ssh-ed25519-cert-v01@openssh.com,rsa-sha2-256,rsa-sha2-512
    CASignatureAlgorithms ecdsa-sha2-nistp256,ssh-ed25519,rsa-sha2-256,rsa-sha2-512
    RequiredRSASize 2048
"""


@pytest.mark.parametrize("everybodys", [DEBIAN, FEDORA], ids=["debian", "fedora"])
def test_what_a_distribution_sets_for_every_host_leaves_it_on_fabric(
    sshd: Sshd, link: Open, everybodys: str
) -> None:
    sshd.ssh_config.write_text(sshd.ssh_config.read_text() + "Host *" + everybodys)
    target = link()
    assert works(target)
    assert not by_ssh(target)
    assert target.remark == ""


def test_without_an_ssh_program_a_directive_that_needs_it_is_said(
    sshd: Sshd, link: Open, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    sshd.add_host("strict", RevokedHostKeys="/dev/null", Ciphers="-aes128-cbc")
    monkeypatch.setenv("PATH", str(home))
    error = fails(link("strict"))
    assert isinstance(error, NotStarted)
    assert error.why == "ssh_config sets RevokedHostKeys, Ciphers, which takes the ssh program"
    assert works(link("h"))


def test_the_doctor_says_why_a_host_is_reached_through_ssh(sshd: Sshd, home: Path) -> None:
    found = examine_host(sshd.add_host("strict", RevokedHostKeys="/dev/null"))
    (way,) = [check.what for check in found if check.name == "ssh"]
    assert way.endswith(", by way of the ssh program: ssh_config sets RevokedHostKeys")


# ---- trust

VIAS = ["fabric", "openssh"]


@pytest.mark.parametrize("via", VIAS)
def test_a_host_whose_key_is_revoked_is_refused(sshd: Sshd, link: Open, via: str) -> None:
    revoked = sshd.directory / "revoked"
    revoked.write_text(sshd.host_public + "\n")
    sshd.add_host("revoked", RevokedHostKeys=str(revoked))
    error = fails(link("revoked", via=via))
    assert isinstance(error, HostKey)
    assert error.why == f"host key REVOKED: ED25519 {sshd.fingerprint}"
    assert "Accepted publickey" not in " ".join(sshd.log)


def test_a_key_of_the_hosts_may_come_from_a_command(sshd: Sshd, link: Open) -> None:
    script = sshd.directory / "keys"
    script.write_text(f"#!/bin/sh\necho '[127.0.0.1]:{sshd.port} {sshd.host_public}'\n")
    script.chmod(0o755)
    sshd.known_hosts.write_text("")
    assert isinstance(fails(link()), HostKey)
    assert works(link(sshd.add_host("commanded", KnownHostsCommand=f"{script} %H")))


@pytest.mark.parametrize("via", VIAS)
def test_a_known_host_without_its_port_is_known_by_that_key_only(
    sshd: Sshd, link: Open, via: str, tmp_path: Path
) -> None:
    sshd.known_hosts.write_text("")
    sshd.trust(sshd.host_public, "127.0.0.1")
    assert works(link(via=via))
    sshd.known_hosts.write_text("")
    sshd.trust(public(new_key(tmp_path / "other")), "127.0.0.1")
    error = fails(link(via=via))
    assert isinstance(error, HostKey)
    assert "unknown" in error.why


def test_a_revoked_key_without_the_port_is_refused(sshd: Sshd, link: Open) -> None:
    sshd.known_hosts.write_text(f"@revoked 127.0.0.1 {sshd.host_public}\n")
    error = fails(link(accept_new_key=True))
    assert isinstance(error, HostKey)
    assert "REVOKED" in error.why


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    return new_key(tmp_path / "authority")


def signed(authority: Path, key: Path, principal: str, *flags: str) -> Path:
    """Have `authority` sign the public key beside `key`; return the certificate's path."""
    subprocess.run(
        ["ssh-keygen", "-q", "-s", authority, "-I", "it", "-n", principal, *flags, f"{key}.pub"],
        check=True,
        capture_output=True,
        timeout=20,
    )
    return key.with_name(key.name + "-cert.pub")


def test_a_host_certificate_is_believed_if_its_authority_is_known(
    new_sshd: Callable[..., Sshd], link: Open, authority: Path
) -> None:
    server = new_sshd()
    certificate = signed(authority, server.host_key, "127.0.0.1", "-h")
    server.stop()
    server.options["HostCertificate"] = str(certificate)
    server.start()
    server.known_hosts.write_text(f"@cert-authority * {public(authority)}\n")
    target = link()
    assert works(target)
    assert target.remark == "by way of the ssh program: known_hosts has @cert-authority"
    server.known_hosts.write_text(f"@cert-authority elsewhere {public(authority)}\n")
    assert isinstance(fails(link()), HostKey)


@pytest.mark.parametrize("name", ["a b", "it's", 'say "hi"', "back\\slash"])
def test_a_known_hosts_file_of_any_name_is_read(sshd: Sshd, link: Open, name: str) -> None:
    file = sshd.directory / name
    file.write_text(sshd.known_hosts.read_text())
    sshd.known_hosts.write_text("")
    quoted = str(file).replace("\\", "\\\\").replace('"', '\\"')
    sshd.add_host("named", UserKnownHostsFile=f'"{quoted}"')
    said = ssh_settings(Host("named"), str(sshd.ssh_config))
    assert works(link("named")), said


def test_a_known_hosts_file_may_be_named_by_a_hash(sshd: Sshd, link: Open) -> None:
    file = sshd.directory / "%C"
    settings = subprocess.run(
        ["ssh", "-F", sshd.ssh_config, "-oControlPath=%C", "-G", "h"],
        capture_output=True,
        text=True,
        check=True,
        timeout=20,
    ).stdout
    found = re.search(r"^controlpath (\w+)$", settings, re.MULTILINE)
    assert found is not None
    sshd.add_host("hashed", UserKnownHostsFile=str(file))
    error = fails(link("hashed"))
    assert isinstance(error, HostKey)
    for target in ("h", "hashed"):
        said = subprocess.run(
            ["ssh", "-F", sshd.ssh_config, "-oControlPath=%C", "-G", target],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        ).stdout
        found = re.search(r"^controlpath (\w+)$", said, re.MULTILINE)
        assert found is not None
        shutil.copy(sshd.known_hosts, sshd.directory / found.group(1))
    assert works(link("hashed"))


def test_a_host_key_of_rsa_that_is_too_short_is_refused(
    new_sshd: Callable[..., Sshd], link: Open, tmp_path: Path
) -> None:
    server = new_sshd()
    server.stop()
    rsa = tmp_path / "rsa"
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "rsa", "-b", "2048", "-N", "", "-f", rsa], check=True, timeout=60
    )
    server.options["HostKey"] = str(rsa)
    server.start()
    server.known_hosts.write_text("")
    server.trust(public(rsa))
    assert works(link())
    error = fails(link(server.add_host("long", RequiredRSASize=3072)))
    assert isinstance(error, HostKey)
    assert "2048" in error.why and "3072" in error.why


def test_a_host_key_algorithm_that_is_not_listed_is_not_used(
    new_sshd: Callable[..., Sshd], link: Open, tmp_path: Path
) -> None:
    server = new_sshd()
    server.stop()
    rsa = new_key(tmp_path / "rsa", "rsa")
    server.options["HostKey"] = f"{rsa}\nHostKey {server.host_key}"
    server.start()
    server.trust(public(rsa))
    target = link(server.add_host("rsa", HostKeyAlgorithms="rsa-sha2-512"))
    assert works(target)
    assert transport_of(target).host_key_type == "rsa-sha2-512"
    assert works(
        target := link(
            server.add_host(
                "none", HostKeyAlgorithms="ssh-ed25519-cert-v01@openssh.com,ssh-ed25519"
            )
        )
    )
    assert transport_of(target).host_key_type == "ssh-ed25519"


def test_ciphers_macs_and_key_exchanges_are_those_that_are_listed(sshd: Sshd, link: Open) -> None:
    sshd.add_host(
        "chosen",
        Ciphers="aes256-ctr",
        MACs="hmac-sha2-512",
        KexAlgorithms="ecdh-sha2-nistp521",
    )
    target = link("chosen")
    assert works(target)
    used = transport_of(target)
    assert used.local_cipher == used.remote_cipher == "aes256-ctr"
    assert used.local_mac == used.remote_mac == "hmac-sha2-512"
    assert used.get_security_options().kex == ("ecdh-sha2-nistp521",)


@pytest.mark.parametrize(
    ("directive", "value"),
    [
        ("Ciphers", "chacha20-poly1305@openssh.com"),
        ("MACs", "umac-64@openssh.com"),
        ("KexAlgorithms", "diffie-hellman-group18-sha512"),
    ],
)
def test_a_list_with_nothing_that_fabric_has_goes_through_ssh(
    sshd: Sshd, link: Open, directive: str, value: str
) -> None:
    target = link(sshd.add_host("foreign", **{directive: value}))
    assert works(target)
    assert target.remark == f"by way of the ssh program: ssh_config sets {directive}"


def test_a_host_that_has_no_algorithm_of_fabrics_is_reached_through_ssh(
    new_sshd: Callable[..., Sshd], link: Open
) -> None:
    new_sshd(options={"Ciphers": "chacha20-poly1305@openssh.com"})
    target = link()
    assert works(target)
    assert by_ssh(target)


# ---- the login


def test_no_key_is_tried_where_keys_are_forbidden(sshd: Sshd, link: Open) -> None:
    for name, options in (
        ("off", {"PubkeyAuthentication": "no"}),
        ("elsewise", {"PreferredAuthentications": "password"}),
        ("other-type", {"PubkeyAcceptedAlgorithms": "rsa-sha2-512"}),
    ):
        error = fails(link(sshd.add_host(name, **options)))
        assert isinstance(error, Auth)
        assert error.hint[0] == "no key was tried: none was found"
    assert not [line for line in sshd.log if "Accepted" in line or "Failed publickey" in line]


def test_a_method_that_only_ssh_has_goes_through_ssh(sshd: Sshd, link: Open) -> None:
    sshd.add_host("kerberos", PreferredAuthentications="gssapi-with-mic,publickey")
    target = link("kerberos")
    assert works(target)
    assert "PreferredAuthentications" in target.remark


def test_a_user_key_that_is_too_short_is_not_tried(sshd: Sshd, link: Open, home: Path) -> None:
    key = home / "short"
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "rsa", "-b", "2048", "-N", "", "-f", key], check=True, timeout=60
    )
    sshd.authorized_keys.write_text(public(key) + "\n")
    assert works(link(sshd.add_host("enough", IdentityFile=str(key), RequiredRSASize=2048)))
    error = fails(link(sshd.add_host("short", IdentityFile=str(key), RequiredRSASize=3072)))
    assert isinstance(error, Auth)


def test_a_host_that_wants_two_keys_is_given_two(
    new_sshd: Callable[..., Sshd], link: Open, home: Path
) -> None:
    server = new_sshd(options={"AuthenticationMethods": "publickey,publickey"})
    second = new_key(home / "second")
    with server.authorized_keys.open("a") as keys:
        keys.write(public(second) + "\n")
    server.add_host("two", IdentityFile=f"{server.user_key}\n  IdentityFile {second}")
    target = link("two")
    assert works(target)
    assert not by_ssh(target)
    assert isinstance(fails(link("h")), Auth)


def only_certificates(new_sshd: Callable[..., Sshd], authority: Path) -> Sshd:
    server = new_sshd(options={"TrustedUserCAKeys": f"{authority}.pub"})
    server.authorized_keys.write_text("")
    return server


def test_a_certificate_beside_a_key_that_only_the_agent_has_is_used(
    new_sshd: Callable[..., Sshd], link: Open, authority: Path, home: Path
) -> None:
    server = only_certificates(new_sshd, authority)
    key = new_key(home / "mine")
    signed(authority, key, user())
    with ssh_agent(home) as path:
        # Hide the certificate, which ssh-add would add as well.
        (home / "hidden").mkdir()
        certificate = (home / "mine-cert.pub").rename(home / "hidden" / "mine-cert.pub")
        add_key(path, key)
        certificate.rename(home / "mine-cert.pub")
        key.unlink()
        server.add_host("agent", IdentityAgent=path, IdentityFile=str(key))
        target = link("agent")
        assert works(target)
        assert not by_ssh(target)


def test_a_certificate_of_another_name_is_used(
    new_sshd: Callable[..., Sshd], link: Open, authority: Path, home: Path
) -> None:
    server = only_certificates(new_sshd, authority)
    key = new_key(home / "mine")
    certificate = signed(authority, key, user()).rename(home / "paper")
    server.add_host("certified", IdentityFile=str(key), CertificateFile=str(certificate))
    assert works(link("certified"))


def test_a_certificate_that_is_not_taken_is_followed_by_its_plain_key(
    sshd: Sshd, link: Open, authority: Path, home: Path
) -> None:
    key = new_key(home / "mine")
    signed(authority, key, user())
    sshd.authorized_keys.write_text(public(key) + "\n")
    target = link(sshd.add_host("plain", IdentityFile=str(key)))
    assert works(target)
    assert not by_ssh(target)


def test_an_agent_may_be_named_by_a_variable(
    sshd: Sshd, link: Open, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ssh_agent(home) as path:
        add_key(path, sshd.user_key)
        monkeypatch.setenv("MY_AGENT", path)
        for name, text in (("bare", "$MY_AGENT"), ("braced", "${MY_AGENT}")):
            sshd.add_host(name, IdentityAgent=text, IdentityFile="none", IdentitiesOnly="no")
            assert works(link(name))


def test_a_master_is_used_where_no_key_lets_us_in(sshd: Sshd, link: Open, home: Path) -> None:
    sshd.add_host("m", ControlPath=str(home / "master"))
    master = subprocess.Popen(
        ["ssh", "-F", str(sshd.ssh_config), "-MN", "m"], stdin=subprocess.DEVNULL
    )
    try:
        while not (home / "master").exists():
            assert master.poll() is None
        sshd.authorized_keys.write_text("")
        target = link("m")
        assert works(target)
        assert target.remark == "by way of the ssh program: there is a ControlMaster"
    finally:
        master.terminate()
        master.wait(20)


# ---- the way to the host, and the environment sent with it


def test_the_address_to_come_from_is_the_one_that_is_set(sshd: Sshd, link: Open) -> None:
    assert works(link(sshd.add_host("bound", BindAddress="127.0.0.7")))
    assert any("from 127.0.0.7" in line for line in sshd.log)


@pytest.mark.parametrize("via", VIAS)
def test_variables_are_sent_and_set_as_ssh_does(
    new_sshd: Callable[..., Sshd], link: Open, via: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = new_sshd(options={"AcceptEnv": "SENT_* SET_*"})
    monkeypatch.setenv("SENT_ONE", "a 'b' ü")
    monkeypatch.setenv("SENT_TWO", "")
    monkeypatch.setenv("NOT_SENT", "x")
    server.add_host("vars", SendEnv="SENT_*", SetEnv='SET_ONE="1 2" SET_TWO=3')
    command = 'echo "$SENT_ONE|${SENT_TWO-none}|${NOT_SENT-none}|$SET_ONE|$SET_TWO"'
    target = link("vars", via=via)
    for _ in range(2):  # the first session is opened in another way than later ones
        assert everything(target, command)[0].decode() == "a 'b' ü||none|1 2|3\n"


def test_a_jump_host_that_needs_ssh_takes_the_whole_way_there(
    new_sshd: Callable[..., Sshd], link: Open
) -> None:
    jump, target = new_sshd("jump"), new_sshd("target")
    jump.add_host("bound-jump", BindAddress="127.0.0.9")
    target.add_host("behind", ProxyJump="bound-jump")
    reached = link("behind")
    assert works(reached)
    assert reached.remark == "by way of the ssh program: ssh_config sets BindAddress for bound-jump"
    assert any("from 127.0.0.9" in line for line in jump.log)


# ---- names


@pytest.mark.parametrize("via", VIAS)
@pytest.mark.parametrize("name", ["dev/db", "bücher", "bu\u0308cher", "a+b", "a=b", "東京"])
def test_a_name_that_ssh_takes_is_a_host(sshd: Sshd, link: Open, via: str, name: str) -> None:
    assert works(link(sshd.add_host(name), via=via))


@pytest.mark.parametrize(
    "name",
    [
        "-a",
        "",
        "a b",
        "a;b",
        "a$b",
        "`a`",
        "a'b",
        'a"b',
        "a|b",
        "a&b",
        "a>b",
        "a\nb",
        "a\x7fb",
        "a(b",
        "a{b",
        "a\\b",
        "a*",
        "a?",
        "a,b",
        "a!b",
        "a~b",
        "a#b",
        "a\u202eb",
        "a\u200bb",
        "\ufeffa",
    ],
)
def test_shell_syntax_and_what_nobody_sees_is_no_host(name: str) -> None:
    with pytest.raises(Misuse):
        Host(name)


def test_a_connection_of_fabrics_own_is_not_taken_past_its_ssh_config(
    sshd: Sshd, link: Open, home: Path
) -> None:
    import fabric

    sshd.add_host("bound", BindAddress="127.0.0.1")
    config = fabric.Config(runtime_ssh_path=str(sshd.ssh_config))
    for kwargs, said in ((None, None), ({"password": "x"}, "not with this")):
        connection = fabric.Connection("bound", config=config, connect_kwargs=kwargs)
        target = choose_runner(connection)
        try:
            if said is None:
                assert works(target)
            else:
                with pytest.raises(CorraError, match=said):
                    works(target)
        finally:
            target.close()
    assert os.environ["CORRA_SSH_CONFIG"] == str(sshd.ssh_config)
