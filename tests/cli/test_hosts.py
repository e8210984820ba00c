"""Which hosts a command line means: sets, groups, stdin, --limit, and Ansible's inventories."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Cli

from sshd import Sshd, user

CONFIG = """
corra:
  groups:
    web: web[1-4]
    down: ["web3", "db9"]
    all: ["@web", "db1"]
"""


@pytest.fixture
def planned(cli: Cli) -> Callable[..., list[str]]:
    """Return a function that returns the lines of a plan, which asks no host."""

    def plan(*words: str, stdin: bytes | None = None) -> list[str]:
        done = cli("run", "--plan", *words, "--", "true", stdin=stdin)
        return (done.stdout + done.stderr).decode().splitlines()

    return plan


def refused(cli: Cli, *words: str, stdin: bytes | None = None) -> list[str]:
    """Return what a misuse says."""
    done = cli(*words, stdin=stdin)
    assert (done.returncode, done.stdout) == (2, b"")
    return done.stderr.decode().splitlines()


@pytest.mark.parametrize(
    ("words", "hosts"),
    [
        (["--host", "web[1-3]", "--host", "db1,!web2"], "web1,web3,db1"),
        (["--host", "@all,!@down"], "web[1-2,4],db1"),
        (["--host", "@all", "--limit", "@web", "--limit", "!web1"], "web[2-4]"),
        (["--host", "web1,web1"], "web1"),
        (["--host", "web1,web1", "--each"], "web1,web1#2"),
    ],
)
def test_sets_groups_and_limits_choose_the_hosts_in_order(cli, planned, words, hosts):
    (cli.home / ".invoke.yaml").write_text(CONFIG)
    assert planned(*words)[-1].split()[-1] == hosts


def test_hosts_are_read_from_stdin_a_line_each(planned):
    listed = b"# the site\nweb1\n\nweb[2-3]  # two more\n!web2\n"
    assert planned("--host", "-", stdin=listed)[-1].split()[-1] == "web1,web3"


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("words", "stdin", "line"),
    [
        ("run --host -", b"", "NOT STARTED: --host -: no host on stdin"),
        ("run --host -", b"a b\n", "NOT STARTED: --host -: one host or set a line: 'a b'"),
        ("run --host -", b"\xff\n", "NOT STARTED: --host -: stdin isn't UTF-8"),
        (
            "run --host - --stdin -",
            b"a\n",
            "NOT STARTED: --host - reads the hosts from stdin, which the program can't read too",
        ),
        ("run --host @wbe", b"", "NOT STARTED: no group @wbe (did you mean @web?)"),
        ("run --host web[1-3],!@web", b"", "NOT STARTED: no host left: web[1-3],!@web"),
        ("run --host web[3-1]", b"", "NOT STARTED: not a range: [3-1] in 'web[3-1]': 3-1 ends bef"),
        (
            "run --limit web1",
            b"",
            "NOT STARTED: --limit needs --host or --inventory to choose from",
        ),
        (
            "run --limit files=64",
            b"",
            "NOT STARTED: --limit: not a set of hosts: 'files=64' (what a program may use: --ulimi",
        ),
        (
            "run --inventory /no/hosts",
            b"",
            "NOT STARTED: inventory /no/hosts: no such file or directory",
        ),
        ("ps --host @wbe", b"", "NOT DONE: no group @wbe (did you mean @web?)"),
        ("kill -a -y --host @wbe", b"", "NOT KILLED: no group @wbe (did you mean @web?)"),
        ("attach x --host @wbe", b"", "NOT DONE: no group @wbe (did you mean @web?)"),
        ("gc -y --host @wbe", b"", "NOT DONE: no group @wbe (did you mean @web?)"),
        ("doctor --host @wbe", b"", "NOT DONE: no group @wbe (did you mean @web?)"),
        ("wait x --host @wbe", b"", "NOT DONE: no group @wbe (did you mean @web?)"),
        ("book --host @wbe", b"", "NOT DONE: no group @wbe (did you mean @web?)"),
    ],
)
def test_a_bad_choice_of_hosts_is_one_clear_line(cli, words, stdin, line):
    (cli.home / ".invoke.yaml").write_text(CONFIG)
    command = ["--", "true"] if words.startswith("run") else []
    assert refused(cli, *words.split(), *command, stdin=stdin)[0].startswith(f"corra: {line}")


def test_groups_in_the_configuration_that_are_none_are_refused(cli):
    (cli.home / ".invoke.yaml").write_text("corra: {groups: {web: 3}}\n")
    assert refused(cli, "run", "--host", "@web", "--", "true") == [
        (
            "corra: NOT STARTED: corra.groups in the configuration: "
            "@web: neither a set of hosts nor a list of them: 3"
        )
    ]


def test_clustershells_own_groups_count(cli, planned):
    home = cli.home / ".config" / "clustershell"
    home.mkdir(parents=True)
    (home / "groups.conf").write_text(
        f"[Main]\ndefault: local\nautodir: {home}\n"
        "[cmd]\nmap: [ $GROUP = up ] && echo 'web[5-6] db2'\nlist: echo up\n"
    )
    (home / "local.yaml").write_text("local: {rack: 'r[2-1]', racks: 'r1,@one', one: 'r[2-3]'}\n")
    assert planned("--host", "@racks,!r2")[-1].split()[-1] == "r1,r3"
    assert planned("--host", "@cmd:up")[-1].split()[-1] == "web5,web6,db2"
    assert "no group @cmd:down" in planned("--host", "@cmd:down")[0]
    assert "not a range: [2-1]" in planned("--host", "@rack")[0]


def test_a_name_that_excludes_nothing_is_told(cli):
    done = cli("run", "--plan", "--host", "web[1-3],!wbe2", "--", "true")
    assert done.stderr.decode() == (
        "corra: wbe2: excluded or limited to, and not among the hosts\n"
    )


# -- Inventories


@pytest.fixture
def site(new_sshd: Callable[..., Sshd], home: Path) -> str:
    """An inventory whose aliases lead to a private sshd: only it knows port, login and key."""
    server = new_sshd(alias="unused")
    with server.ssh_config.open("a") as file:
        file.write(
            "Host 127.0.0.1\n  IdentityAgent none\n  IdentitiesOnly yes\n"
            f"  UserKnownHostsFile {server.known_hosts}\n  GlobalKnownHostsFile /dev/null\n"
        )
    path = home / "site.ini"
    path.write_text(
        f"[web]\nalpha ansible_host=127.0.0.1\nbeta ansible_host=127.0.0.1\n"
        f"gamma ansible_host=127.0.0.1\n[here]\nme ansible_connection=local\n"
        f"[web:vars]\nansible_port={server.port}\nansible_user={user()}\n"
        f"ansible_ssh_private_key_file={server.user_key}\nansible_become=yes\n"
    )
    return str(path)


def test_an_alias_leads_to_its_address_and_keeps_its_name(cli: Cli, site: str) -> None:
    done = cli(
        "run", "--inventory", site, "--host", "beta", "--", "sh", "-c", "echo $SSH_CONNECTION"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[2] == b"127.0.0.1"
    listed = cli("ps", "-a", "--json", "--inventory", site, "--host", "beta")
    assert [json.loads(line)["host"] for line in listed.stdout.splitlines()] == ["beta"]


def test_later_verbs_find_a_run_on_an_alias_by_the_inventory_of_its_start(
    cli: Cli, site: str
) -> None:
    done = cli("run", "-d", "--inventory", site, "--host", "alpha", "--", "echo", "hello")
    prog_id = done.stdout.decode().strip()
    assert cli("wait", prog_id).returncode == 0
    assert cli("logs", prog_id).stdout == b"hello\n"
    Path(site).rename(site + ".moved")
    gone = cli("logs", prog_id)
    assert gone.returncode == 2
    assert gone.stderr.decode().startswith(f"corra: alpha: NOT DONE: inventory {site}: no such")
    assert cli("logs", "--inventory", site + ".moved", prog_id).stdout == b"hello\n"


def test_an_inventory_without_host_means_all_of_it_and_aliases_of_one_machine_are_several(
    cli: Cli, site: str
) -> None:
    done = cli("run", "--inventory", site, "--limit", "!me", "--", "echo", "hi")
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.decode().splitlines()) == ["alpha: hi", "beta: hi", "gamma: hi"]
    assert b"left aside: ansible_become" in done.stderr


def test_a_fleet_of_aliases_goes_on_here_and_refuses_where_the_inventory_is_not(
    cli: Cli, site: str
) -> None:
    words = ["--inventory", site, "--host", "@web", "--name", "roll", "--batch", "1"]
    assert cli("run", *words, "--", "false").returncode == 1
    again = cli("again", "roll", "--json")
    assert again.returncode == 1
    assert cli("status", "roll").returncode == 0
    Path(site).rename(site + ".moved")
    refused_ = cli("status", "roll")
    assert refused_.returncode == 2
    assert b"its hosts are names of the inventory" in refused_.stderr
    assert cli("status", "--inventory", site + ".moved", "roll").returncode == 0


def test_an_alias_with_a_local_connection_is_this_machine(cli: Cli, site: str) -> None:
    done = cli(
        "run", "--inventory", site, "--host", "me", "--", "sh", "-c", "echo ${SSH_CLIENT-no}"
    )
    assert (done.returncode, done.stdout) == (0, b"no\n")


def test_the_ssh_program_and_the_chaperone_reach_an_alias_too(cli: Cli, site: str) -> None:
    assert shutil.which("ssh")
    for via in ("openssh", "chaperone"):
        words = ["--via", via, "--inventory", site, "--host", "alpha"]
        done = cli("run", *words, "--", "echo", via)
        assert (done.returncode, done.stdout.decode()) == (0, f"{via}\n"), done.stderr


def test_a_key_that_is_here_is_no_use_to_a_keeper_elsewhere(cli: Cli, site: str) -> None:
    words = ["--via", "chaperone@beta", "--inventory", site, "--host", "alpha"]
    done = cli("run", *words, "--", "true")
    assert done.returncode == 2
    assert b"can't use the key of the inventory" in done.stderr
    assert os.path.exists(site)


def test_each_verb_that_takes_hosts_takes_an_inventory(cli: Cli, site: str) -> None:
    words = ["--inventory", site, "--host", "@web", "--limit", "alpha"]
    ready = cli("doctor", "--json", *words)
    assert json.loads(ready.stdout)["host"] == "alpha"
    started = cli("run", "-d", *words, "--name", "sleeper", "--", "sleep", "1000")
    assert started.returncode == 0, started.stderr
    prog_id = started.stdout.decode().strip()
    assert cli("status", "--json", *words, prog_id).returncode == 0
    killed = cli("kill", "-a", "-y", *words)
    assert (killed.returncode, b"alpha" in killed.stderr) == (0, True)
    freed = cli("gc", "-y", "--older", "0s", *words)
    assert (freed.returncode, b"alpha" in freed.stderr) == (0, True)


def test_a_journal_may_be_on_a_host_of_the_inventory(cli: Cli, site: str) -> None:
    words = ["--inventory", site, "--host", "beta,gamma", "--journal", "alpha", "--name", "kept"]
    assert cli("run", *words, "--", "true").returncode == 0
    assert cli("status", "--inventory", site, "kept").returncode == 0
    assert cli("status", "--inventory", site, "--json", "kept").returncode == 0


def test_an_inventory_that_is_gone_keeps_no_other_hosts_runs_from_ps(cli: Cli, site: str) -> None:
    cli("run", "-d", "--inventory", site, "--host", "alpha", "--name", "there", "--", "true")
    cli("run", "-d", "--host", "local", "--name", "here", "--", "true")
    Path(site).unlink()
    done = cli("ps", "-a")
    assert b"here" in done.stdout
    assert f"inventory {site}: no such file".encode() in done.stderr
    assert done.returncode != 0
