"""Ansible's inventories, as corra's own reader reads them, and as Ansible itself does."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

import corra
from corra.inventory import reading
from corra.inventory.reading import ANSIBLE, inventory_at, read_inventory
from corra.inventory.tree import Inventory
from corra.model.host import Address

INI = """
# the whole site
jump.example.com:2222
localhost ansible_connection=local

[web]
web[01:03].example.com ansible_user=deploy
alias1 ansible_host=10.0.0.1 ansible_port=2201 note="a # b" # aside
[db]
db-[a:c] ansible_ssh_private_key_file=~/.ssh/db
[prod:children]
web
db
[prod:vars]
ansible_user=prod
ansible_become = yes
[all:vars]
ansible_user=everyone
ansible_python_interpreter="/usr/bin/python3"
"""

YAML = """
all:
  vars: {ansible_user: everyone}
  hosts:
    h1: {ansible_host: 10.0.0.9, ansible_port: 22, ansible_ssh_common_args: -o ProxyJump=gate}
    h2:
  children:
    web:
      hosts:
        web[01:03]: {tags: [1, 2]}
      vars: {ansible_user: inner}
    prod:
      children: {web: {}, db: {hosts: {db1: {ansible_private_key_file: /k}}}}
      vars: {ansible_user: outer}
"""


@pytest.fixture
def written(tmp_path: Path):
    """Return a function that writes files and returns the path of the first."""

    def write(**files: str) -> str:
        paths = []
        for name, text in files.items():
            path = tmp_path / name.replace("__", "/").replace("_yml", ".yml")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            paths.append(str(path))
        return paths[0]

    return write


def test_an_ini_inventory_says_where_its_hosts_are(written, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ops")
    path = written(hosts=INI)
    found = read_inventory(path)
    assert found.addresses == {
        "jump.example.com": Address("jump.example.com", 2222, "everyone", None, path),
        "localhost": Address("local", source=path),
        **{
            f"web0{n}.example.com": Address(f"web0{n}.example.com", None, "deploy", None, path)
            for n in (1, 2, 3)
        },
        "alias1": Address("10.0.0.1", 2201, "prod", None, path),
        **{f"db-{x}": Address(f"db-{x}", None, "prod", "/home/ops/.ssh/db", path) for x in "abc"},
    }
    assert found.groups["prod"] == (*found.groups["web"], *found.groups["db"])
    assert found.groups["ungrouped"] == ("jump.example.com", "localhost")
    assert found.groups["all"] == tuple(found.addresses)
    assert found.aside == ("ansible_become", "ansible_python_interpreter")


def test_a_yaml_inventory_says_the_same_of_nested_groups(written):
    path = written(hosts_yml=YAML)
    found = read_inventory(path)
    assert found.addresses["h1"] == Address("10.0.0.9", 22, "everyone", None, path)
    assert found.addresses["web02"] == Address("web02", None, "inner", None, path)
    assert found.addresses["db1"] == Address("db1", None, "outer", "/k", path)
    assert found.groups["prod"] == ("web01", "web02", "web03", "db1")
    assert found.aside == ("ansible_ssh_common_args",)


def test_a_directory_and_the_files_of_variables_beside_count(written, tmp_path):
    written(
        site__a="[web]\nweb1\nweb2 ansible_port=1\n",
        site__b_yml="db: {hosts: {db1: {}}}\n",
        site__notes="# nothing",
        site__group_vars__all_yml="ansible_port: 99\nansible_user: all\n",
        site__group_vars__web__one_yml="ansible_user: fromfile\n",
        site__host_vars__db1="ansible_host: 10.1.1.1\n",
        site__group_vars__other_yml="$ANSIBLE_VAULT;1.1;AES256\n00",
    )
    site = str(tmp_path / "site")
    found = read_inventory(site)
    assert found.addresses == {
        "web1": Address("web1", 99, "fromfile", None, site),
        "web2": Address("web2", 1, "fromfile", None, site),
        "db1": Address("10.1.1.1", 99, "all", None, site),
    }


def told_by(read, path: str) -> tuple[object, ...]:
    found: Inventory = read(path)
    groups = {name: sorted(hosts) for name, hosts in found.groups.items() if hosts}
    return dict(found.addresses), groups, found.aside


@pytest.mark.skipif(not shutil.which(ANSIBLE), reason=f"needs {ANSIBLE} (ansible-core)")
@pytest.mark.parametrize("kind", ["ini", "yaml", "directory"])
def test_ansible_itself_says_the_same(written, tmp_path, kind):
    path = {"ini": lambda: written(hosts=INI), "yaml": lambda: written(hosts_yml=YAML)}.get(
        kind, lambda: written(site__hosts=INI, site__more_yml=YAML)
    )()
    if kind != "yaml":
        written(
            group_vars__web_yml="ansible_user: fromfile\n",
            site__group_vars__web_yml="ansible_user: fromfile\n",
            site__host_vars__alias1="ansible_host: 10.9.9.9\n",
        )
    source = str(tmp_path / "site") if kind == "directory" else path
    assert told_by(read_inventory, source) == told_by(inventory_at, source)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[web:hosts:x]\n", "hosts:1: not a section: [web:hosts:x]"),
        ("[web:kids]\n", "hosts:1: not a section: [web:kids]"),
        ("[web\nweb1\n", "hosts:1: not a section: [web"),
        ("\n[web:vars]\nansible_port 22\n[web]\n", "hosts:3: not NAME=VALUE: ansible_port 22"),
        ("web1 ansible_port\n", "hosts:1: not NAME=VALUE behind web1: ansible_port"),
        ("web1 note='x\n", "hosts:1: no closing quotation: web1 note='x"),
        ("ansible_port=22\n", "hosts:1: a variable without a host: ansible_port=22"),
        ("web[3:1]\n", "hosts:1: not a range: [3:1] ends before it begins"),
        ("web[a:zz]\n", "hosts:1: not a range: [a:zz] (say [1:20], [01:20] or [a:f])"),
        ("web[1-3]\n", "hosts:1: not a range: [1-3] (say [1:20], [01:20] or [a:f])"),
        ("web[1:9999999]\n", "hosts:1: [1:9999999]: at most 100000 hosts"),
        ("-oProxyCommand\n", "hosts:1: not a host name: '-oProxyCommand'"),
        ("[a:vars]\nx=1\n", "hosts:1: variables of group a, which is defined nowhere"),
        ("[a:children]\nb\n", "hosts:2: group b is in a, and is defined nowhere"),
        ("[a:children]\nb\n[b:children]\na\n", "hosts:4: group a contains itself"),
    ],
)
def test_what_the_reader_does_not_know_it_refuses_by_line(written, text, why):
    with pytest.raises(corra.Misuse) as told:
        read_inventory(written(hosts=text))
    assert told.value.why.removeprefix(f"{written(hosts=text).removesuffix('hosts')}") == why


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("all:\n  host: {a: }\n", ":2: 'host' in group all: there are hosts, vars, children"),
        ("all:\n  hosts: [a, b]\n", ":2: not NAME: VALUE pairs"),
        ("plugin: aws_ec2\n", ":1: an inventory plugin, which only Ansible can run: install ans"),
        ("all: {hosts: {a: {}\n", ":2: not YAML: "),
        ("all: &x\n  children: {b: *x}\n", "recursive"),
    ],
)
def test_a_yaml_inventory_is_refused_by_line_too(written, text, why):
    with pytest.raises(corra.Misuse) as told:
        read_inventory(written(hosts_yml=text))
    assert why in told.value.why or "100 deep" in told.value.why


def test_what_only_ansible_can_read_is_refused_with_what_to_install(written):
    script = written(hosts="#!/bin/sh\necho {}\n")
    os.chmod(script, 0o755)
    with pytest.raises(corra.Misuse, match="it is a program, which only Ansible runs: install ans"):
        read_inventory(script)
    vault = written(vault_yml="$ANSIBLE_VAULT;1.1;AES256\n3961\n")
    with pytest.raises(corra.Misuse, match="it is encrypted: install ansible-core here"):
        read_inventory(vault)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("w ansible_connection=winrm", "its ansible_connection is winrm, and corra reaches hosts"),
        (
            'w ansible_host="{{ ip }}"',
            ":1: ansible_host is no plain value, which Ansible alone can",
        ),
        ("w ansible_port=ssh", ":1: not a port: 'ssh'"),
        ("w ansible_host=-oProxyCommand=x", ":1: not a host name: '-oProxyCommand=x'"),
    ],
)
def test_one_host_that_cannot_be_reached_is_refused_and_keeps_back_no_other(written, line, why):
    found = read_inventory(written(hosts=f"{line}\nother ansible_host=10.0.0.2\n"))
    with pytest.raises(corra.Misuse) as told:
        found.address("w")
    assert why in told.value.why
    assert found.address("other") == Address("10.0.0.2", source=found.source)


def test_what_ansible_cannot_read_is_quoted(written, monkeypatch, tmp_path):
    program = tmp_path / "bin" / ANSIBLE
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho 'ERROR! no such plugin' >&2; exit 4\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    path = written(hosts="web1\n")
    with pytest.raises(corra.Misuse) as told:
        reading.inventory_at.__wrapped__(path)
    assert told.value.why == f"inventory {path}: {ANSIBLE}: ERROR! no such plugin"


def test_a_file_that_is_not_there_is_said():
    with pytest.raises(corra.Misuse, match="inventory /nowhere/hosts: no such file or directory"):
        inventory_at("/nowhere/hosts")
