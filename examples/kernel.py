"""Upgrade the kernel and reboot, a canary first.

corra knows each reboot by the boot id, so that it takes none for a lost run:

    inv -r examples -c kernel kernel --version 6.1.0-28 --ticket OPS-812

Before each wave the task asks a person, and keeps the answer. If a host doesn't come back, the
roll-out stops with one wave touched. The balancer `lb1` and the journal's host `ops1` belong to
this site; write your own into your tasks.py.
"""

from invoke import task

import corra
from corra.tasks import attach, book, kill, ps, run  # noqa: F401 - the verbs, beside our own

QUIET = {"DEBIAN_FRONTEND": "noninteractive"}
# The script waits on the host, so that a broken link doesn't end it.
HEALTHY = ["sh", "-c", "until curl -fsS http://127.0.0.1:8080/healthz; do sleep 2; done"]


@task(
    help={
        "version": "kernel ABI",
        "ticket": "names this roll-out: the same ticket continues it",
        "hosts": "host set (web[1-6])",
    }
)
def kernel(
    c, version="", ticket="", hosts="web[1-6]"
):  # defaults, not positionals: otherwise `inv kernel --help` is a version
    """Upgrade the kernel and reboot, in waves: inv kernel --version 6.1.0-28 --ticket OPS-812"""
    if not (version and ticket):
        raise corra.Stop("say --version and --ticket; inv --help kernel has an example")
    package, fleet = f"linux-image-{version}-amd64", corra.hosts(hosts)
    with corra.runbook(
        "kernel",
        key=ticket,
        params={"version": version, "hosts": hosts},
        journal="ops1",
        as_user="root",
    ) as log:
        log.run(fleet, ["apt-get", "install", "--dry-run", package], step="preflight", timeout="5m")
        space = log.run(fleet, ["df", "--output=avail", "-m", "/boot"], step="space")
        if tight := [host for host, r in space.items() if int(r.stdout.split()[-1]) < 200]:
            raise corra.Stop(f"less than 200 MB free in /boot on {corra.fold(tight)}")
        for n, wave in enumerate(corra.waves(fleet, 1, 2, "100%"), 1):  # a canary, two, the rest
            log.confirm(f"wave {n}: reboot {wave} into {version}?", step=f"go-{n}")
            log.run("lb1", ["lbctl", "drain", *wave], step=f"drain-{n}")
            log.run(
                wave,
                ["apt-get", "-y", "install", package],
                step="install",
                env=QUIET,
                timeout="30m",
            )
            log.reboot(
                wave, step="reboot", timeout="15m"
            )  # boot id before and after, not a LOST run
            log.run(wave, HEALTHY, step="healthy", timeout="5m")
            log.run("lb1", ["lbctl", "enable", *wave], step=f"enable-{n}")
        after = log.run(fleet, ["uname", "-r"], step="after")
        if wrong := [host for host, r in after.items() if version not in r.stdout]:
            raise corra.Stop(f"still on the old kernel: {corra.fold(wrong)}")
