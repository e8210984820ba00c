"""Move a service to a new release on one host; a closed laptop doesn't stop the task half-way.

    inv -r examples upgrade --host db1 --release 4.2
    inv -r examples backup --host db1       # then, from any machine: corra attach --host db1 backup

corra runs each step on the host: it reconnects a broken link, and Ctrl-C leaves a running step
running. A failed step stops the task with that step's exit code. The commands here only write below
--root, so that you can try the example on any machine.
"""

from invoke import task

import corra

# The script waits on the host, so that a broken link doesn't end it.
HEALTHY = ["sh", "-c", 'until grep -qx "$0" current; do sleep 1; done']


@task(
    help={
        "host": "where: a name from ssh_config, or local",
        "release": "what to install",
        "root": "the service's directory there",
    }
)
def upgrade(c, host="local", release="", root="/tmp/corra-example"):
    """Install a release and wait until it is healthy: inv upgrade --host db1 --release 4.2"""
    if not release:
        raise corra.Stop("say --release; inv --help upgrade has an example")
    corra.run(host, ["mkdir", "-p", root])

    space = corra.run(host, ["df", "--output=avail", "-m", root], hide=True)
    if int(space.stdout.split()[-1]) < 10:
        raise corra.Stop(f"less than 10 MB free in {root} on {host}")

    saved = corra.start(
        host,
        ["sh", "-c", "tar -cf before.tar current 2>/dev/null || true; echo saved"],
        name="backup",
        cwd=root,
    )
    # The host makes the backup meanwhile.
    corra.run(host, ["sh", "-c", 'echo "$0" > next', release], cwd=root, hide="out")
    if saved.wait(timeout="10m").failed:
        raise corra.Stop("the backup failed; nothing was changed")

    corra.run(host, ["mv", "next", "current"], cwd=root)
    corra.run(host, [*HEALTHY, release], cwd=root, timeout="5m")
    print(f"{host} runs {release}")


@task(
    help={
        "host": "where: a name from ssh_config, or local",
        "root": "the service's directory there",
    }
)
def backup(c, host="local", root="/tmp/corra-example"):
    """Start a long backup and leave; print the id to attach to."""
    run = corra.start(
        host, ["tar", "-cf", "nightly.tar", "current"], name="backup", cwd=root, timeout="2h"
    )
    print(run.id)
