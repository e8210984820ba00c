"""A network of the test's own: hosts with a network, a disk and an sshd each, and a place for the
client. Root only. Nothing of it is seen outside, and all of it ends with its processes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from sshd import QUICKLY, Sshd, program

PORT = 2222
DISK = "24m"
_TOOLS = ("ip", "iptables", "nsenter", "unshare")
# What a host of an island does instead of an sshd: it listens, says these bytes and nothing more.
_MUTE = """
import socket, sys
server = socket.create_server(("0.0.0.0", int(sys.argv[1])))
print("up", flush=True)
held = []
while True:
    held.append(server.accept()[0])
    held[-1].sendall(sys.argv[2].encode())
"""
# A disk of its own under the home, and one under what an agent takes where the home is full.
_ISLAND = f"""
mount -t tmpfs -o size={DISK},mode=700 none "$1" && mount -t tmpfs -o size=4m none /var/tmp &&
ip link set lo up && ip link add eth0 type veth peer name "$2" netns "$3" &&
ip addr add "$4/16" dev eth0 && ip link set eth0 up || exit 1
shift 4
exec "$@"
"""


def missing() -> str:
    """Return why this machine can't have islands, or nothing."""
    if os.geteuid():
        return "not root: no networks can be made"
    lacking = [each for each in _TOOLS if not shutil.which(each)]
    if lacking or program() is None:
        return f"no {', '.join(lacking or ['sshd'])} here"
    made = subprocess.run(["unshare", "-n", "true"], capture_output=True, check=False)
    return "" if made.returncode == 0 else "no network namespaces here"


def named(name: str) -> list[str]:
    """The words before a command that is to run under another host name, in a UTS namespace."""
    return ["sh", "-c", 'echo "$0" > /proc/sys/kernel/hostname; exec "$@"', name]


class Island:
    """One host. `n7` has the address 10.77.0.7. With a `name` it is also the kernel's host name."""

    def __init__(self, network: Network, number: int, name: str = "") -> None:
        self.name, self.address = name or f"n{number}", f"10.77.0.{number}"
        self.home = network.base / self.name
        self.home.mkdir()
        hub = str(network.pid)
        self.inside = ["unshare", "-n", "-m", "sh", "-c", _ISLAND, "sh"]
        self.inside += [str(self.home), f"v{number}", hub, self.address]
        if name:
            self.inside = ["unshare", "-u", *named(name), *self.inside]
        self.pid = 0

    @property
    def files(self) -> Path:
        """The host's home, as seen from here."""
        return Path(f"/proc/{self.pid}/root{self.home}")

    def do(self, *argv: str) -> None:
        """Run a command on the host."""
        enter = ["nsenter", "-t", str(self.pid), "-n", "-m", "--"]
        subprocess.run([*enter, *argv], check=True, capture_output=True, timeout=30)

    def cut(self) -> None:
        """Have all packets from and to the host vanish: no FIN, no RST, no answer to a SYN."""
        for chain in ("INPUT", "OUTPUT"):
            self.do("iptables", "-w", "-I", chain, "-j", "DROP")

    def mend(self) -> None:
        self.do("iptables", "-w", "-F")

    def fill(self) -> None:
        """Leave no byte on its disks."""
        for path in (self.home, Path("/var/tmp")):
            self.do("sh", "-c", f"head -c 64m /dev/zero > {path}/fill; test -s {path}/fill")

    def ran(self) -> int:
        """How often the program of a test was executed here."""
        path = self.files / "ran"
        return path.read_text().count("\n") if path.exists() else 0


class Network:
    """The client's namespace, and the islands that it reaches."""

    def __init__(self, base: Path, ssh: Path) -> None:
        self.base = base
        base.mkdir()
        self.islands: dict[str, Island] = {}
        self._ssh = ssh
        self._servers: list[Sshd] = []
        self._others: list[subprocess.Popen[bytes]] = []
        script = "ip link add hub0 type bridge && ip addr add 10.77.255.254/16 dev hub0 &&"
        script += " ip link set hub0 up && ip link set lo up && echo up && exec cat"
        self._hub = subprocess.Popen(
            ["unshare", "-n", "sh", "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._hub.stdout is not None
        assert self._hub.stdout.readline() == b"up\n"

    @property
    def pid(self) -> int:
        return self._hub.pid

    @property
    def client(self) -> list[str]:
        """The words before a command that is to run in the client's network."""
        return ["nsenter", f"--net=/proc/{self.pid}/ns/net", "--"]

    def cut(self) -> None:
        """Take the client's network away: its packets go nowhere."""
        for chain in ("INPUT", "OUTPUT"):
            drop = ["iptables", "-w", "-I", chain, "-i" if chain == "INPUT" else "-o", "hub0"]
            subprocess.run([*self.client, *drop, "-j", "DROP"], check=True, timeout=30)

    def mend(self) -> None:
        subprocess.run([*self.client, "iptables", "-w", "-F"], check=True, timeout=30)

    def listen_here(
        self, at: Path, options: Mapping[str, str | int], environment: Mapping[str, str]
    ) -> Sshd:
        """Start an sshd beside the client; all of 127.0.0.0/8 leads to it."""
        server = Sshd(
            at,
            environment=environment,
            options={**QUICKLY, **options},
            ssh_config=self._ssh / "config",
            known_hosts=self._ssh / "known_hosts",
            inside=self.client,
            address="0.0.0.0",
            port=PORT,
        ).start()
        self._servers.append(server)
        return server

    def __getitem__(self, name: str) -> Island:
        return self.islands[name]

    def add(
        self, number: int, environment: Mapping[str, str], name: str = "", **options: str | int
    ) -> Island:
        """Add a host with an sshd, whose sessions have `environment` too."""
        island = Island(self, number, name)
        own = {"HOME": str(island.home), "XDG_CACHE_HOME": str(self.base / "cache")}
        server = Sshd(
            self.base / f"sshd-{island.name}",
            alias=island.name,
            environment={**own, **environment},
            options={**QUICKLY, **options},
            user_key=self._servers[0].user_key if self._servers else None,
            ssh_config=self._ssh / "config",
            known_hosts=self._ssh / "known_hosts",
            inside=island.inside,
            address=island.address,
            port=PORT,
        )
        self._servers.append(server.start())
        return self._added(island, server.pid)

    def add_mute(self, number: int, says: str, port: int = PORT) -> Island:
        """Add a host whose port takes connections, says this, and then nothing. At another port
        than PORT it refuses the client.
        """
        island = Island(self, number)
        process = subprocess.Popen(
            [*island.inside, sys.executable, "-ISEc", _MUTE, str(port), says],
            stdout=subprocess.PIPE,
        )
        self._others.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        with (self._ssh / "config").open("a") as file:
            file.write(f"Host {island.name}\n  HostName {island.address}\n  Port {PORT}\n")
        return self._added(island, process.pid)

    def _added(self, island: Island, pid: int) -> Island:
        island.pid = pid
        self.islands[island.name] = island
        port = island.inside[-3]
        subprocess.run(
            [*self.client, "ip", "link", "set", port, "master", "hub0", "up"],
            check=True,
            timeout=30,
        )
        return island

    def end(self) -> None:
        for server in self._servers:
            server.stop()
        for each in [*self._others, self._hub]:
            each.kill()
            each.wait(30)
            for end in (each.stdin, each.stdout):
                if end is not None:
                    end.close()


@contextlib.contextmanager
def network(base: Path, ssh: Path) -> Iterator[Network]:
    """Make a Network whose hosts are added to the client's files in `ssh`."""
    made = Network(base, ssh)
    try:
        yield made
    finally:
        made.end()
