"""An incident's evidence from many hosts, collected at once, before it is gone.

The task writes one file for each host and command, and a list of the missing ones:

    inv -r examples -c incident collect --hosts web[1-40],db[1-2] --to ./INC-77

A host that doesn't answer doesn't delay the others' evidence. A second call collects the missing
files, and none twice.
"""

import os
import re

from invoke import task

import corra

COMMANDS = {
    "uptime": ["uptime"],
    "memory": ["cat", "/proc/meminfo"],
    "processes": ["ps", "-eo", "pid,ppid,stat,etimes,rss,comm", "--sort=-rss"],
    "kernel": ["sh", "-c", "dmesg 2>/dev/null | tail -n 200"],
}


@task(
    help={
        "hosts": "host set",
        "to": "directory to be made; its name names the incident",
        "timeout": "for each command (30s)",
    }
)
def collect(c, hosts="", to="", timeout="30s"):
    """Collect evidence from many hosts: inv collect --hosts web[1-40] --to ./INC-77"""
    if not (hosts and to):
        raise corra.Stop("say --hosts and --to; inv --help collect has an example")
    fleet = corra.hosts(hosts)
    os.makedirs(to, exist_ok=True)
    missing = {}
    with corra.runbook(
        "incident", key=os.path.basename(os.path.abspath(to)), connect_timeout=10
    ) as book:
        for name, argv in COMMANDS.items():
            found = book.run(
                fleet, argv, step=name, warn=True, max_fail=len(fleet), timeout=timeout
            )
            for host, result in found.items():
                with open(
                    os.path.join(to, f"{re.sub(r'[^A-Za-z0-9.-]', '_', str(host))}.{name}.txt"), "w"
                ) as file:
                    file.write(result.stdout + result.stderr)
            missing.update({str(host): error.why for host, error in found.unreached.items()})
        if missing:
            for host, why in missing.items():
                print(f"{host}: {why}")
            raise corra.Stop(
                f"nothing from {corra.fold(missing)}",
                hint=["collect what is missing: the same command"],
            )
    print(f"{len(fleet) * len(COMMANDS)} files in {to}")
