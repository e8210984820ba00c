"""A rolling deploy: a canary, then the rest, each wave healthy before the next begins.

    inv -r examples -c deploy deploy --hosts web[1-6] --release 4.2 --ticket OPS-901

Stop the task, close the laptop, run the same command anywhere: the roll-out goes on. If a host
fails its health check, the roll-out stops and names the host; the same command then repeats only
the failed steps. `current` is a link, so one step switches to a release, and one step switches
back.
"""

from invoke import task

import corra
from corra.tasks import attach, book, kill, logs, ps  # noqa: F401 - the verbs, beside our own

# The script waits on the host, so that a broken link doesn't end it.
HEALTHY = ["sh", "-c", 'until grep -qx "$0" "$1/current/release"; do sleep 1; done']
UNPACK = 'mkdir -p "$1/releases/$0" && echo "$0" > "$1/releases/$0/release"'
SWITCH = 'ln -sfn "releases/$0" "$1/new" && mv -T "$1/new" "$1/current"'


@task(
    help={
        "hosts": "host set (web[1-6])",
        "release": "what to install",
        "ticket": "names this roll-out: the same one continues it",
        "root": "the service's directory on the hosts",
        "journal": "the host that keeps the journal (this machine)",
    }
)
def deploy(c, hosts="", release="", ticket="", root="/srv/corra-example", journal=""):
    """Roll a release out in waves: inv deploy --hosts web[1-6] --release 4.2 --ticket OPS-901"""
    if not (hosts and release and ticket):
        raise corra.Stop("say --hosts, --release and --ticket; inv --help deploy has an example")
    fleet = corra.hosts(hosts)
    params = {"hosts": hosts, "release": release, "root": root}
    with corra.runbook("deploy", key=ticket, params=params, journal=journal or None) as log:
        log.run(fleet, ["sh", "-c", UNPACK, release, root], step="unpack", timeout="5m")
        for n, wave in enumerate(corra.waves(fleet, 1, "100%"), 1):
            log.run(wave, ["sh", "-c", SWITCH, release, root], step="switch")
            log.run(wave, [*HEALTHY, release, root], step="healthy", timeout="2m")
            log.note(f"wave {n}: {wave} runs {release}")
