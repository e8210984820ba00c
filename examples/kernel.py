"""Upgrade the kernel and reboot, a canary first: each reboot is told by the boot id, so that none is taken for a lost run.

    inv -r examples -c kernel kernel --version 6.1.0-28 --ticket OPS-812 --hosts web[1-6] --balancer lb1 --journal ops1

Before each wave a person is asked; the answer is kept. A host that doesn't come back stops the roll-out with one wave touched.
"""

import shlex

from invoke import task

import corra

QUIET = {"DEBIAN_FRONTEND": "noninteractive"}


@task(
    help={
        "version": "kernel ABI",
        "ticket": "names this roll-out: the same ticket continues it",
        "hosts": "host set (web[1-6])",
        "balancer": "the host that takes them out and in again",
        "journal": "the host that keeps the journal (this machine)",
        "install": "what installs it (apt-get -y install)",
        "order": "what reboots a host (systemctl reboot)",
        "balance": "what drains and enables a host (lbctl)",
        "health": "what succeeds on a healthy host",
        "as-user": "whose work this is there (root)",
    }
)
def kernel(
    c,
    version="",
    ticket="",
    hosts="web[1-6]",
    balancer="lb1",
    journal="",
    install="apt-get -y install",
    order="systemctl reboot",
    balance="lbctl",
    health="curl -fsS http://127.0.0.1:8080/healthz",
    as_user="root",
):
    """Upgrade the kernel and reboot, in waves: inv kernel --version 6.1.0-28 --ticket OPS-812"""
    if not (version and ticket):
        raise corra.Stop("say --version and --ticket; inv --help kernel has an example")
    package, fleet, lb = f"linux-image-{version}-amd64", corra.hosts(hosts), shlex.split(balance)
    healthy = ["sh", "-c", f"until {health}; do sleep 2; done"]  # waits on the host
    params = {"version": version, "hosts": hosts}
    with corra.runbook("kernel", key=ticket, params=params, journal=journal or None, as_user=as_user or None) as book:
        space = book.run(fleet, ["df", "--output=avail", "-m", "/boot"], step="space")
        if tight := [host for host, r in space.items() if int(r.stdout.split()[-1]) < 200]:
            raise corra.Stop(f"less than 200 MB free in /boot on {corra.fold(tight)}")
        for n, wave in enumerate(corra.waves(fleet, 1, 2, "100%"), 1):  # a canary, two, the rest
            book.confirm(f"wave {n}: reboot {wave} into {version}?", step=f"go-{n}")
            book.run(balancer, [*lb, "drain", *wave], step=f"drain-{n}")
            book.run(wave, [*shlex.split(install), package], step="install", env=QUIET, timeout="30m")
            book.reboot(wave, step="reboot", timeout="15m", argv=shlex.split(order))
            book.run(wave, healthy, step="healthy", timeout="5m")
            book.run(balancer, [*lb, "enable", *wave], step=f"enable-{n}")
        after = book.run(fleet, ["uname", "-r"], step="after", warn=True)
        book.note(f"{corra.fold(after)}: {', '.join(sorted({r.stdout.strip() for r in after.values()}))}")
