"""Programs, hosts and requests: they are immutable, and a wrong one is refused before a byte is
sent.
"""

from __future__ import annotations

import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st
from invoke.config import Config

from corra import agent
from corra.cli.readers import read_size
from corra.collector.limits import Limits as TokenLimits
from corra.errors import Misuse
from corra.model.host import Host, Mode
from corra.model.limits import LIMITS, parse_limits
from corra.model.options import OPTIONS, RUN_KEYS, read_options
from corra.model.program import Program, Request, argv_words
from corra.model.units import output_kept, parse_seconds, parse_size
from corra.settings import setting
from properties import PROPERTY, words as any_word

names = st.from_regex(r"[A-Za-z0-9_.][A-Za-z0-9_.-]{0,20}", fullmatch=True).filter(
    lambda name: name != "local"
)
v6 = st.ip_addresses(v=6).map(str)
logins = st.from_regex(r"[a-z_][a-z0-9_.@+-]{0,12}\$?", fullmatch=True)


@PROPERTY
@given(names | v6, st.none() | st.integers(1, 65535), st.none() | logins)
def test_a_host_is_read_back_from_its_own_text(name, port, login):
    host = Host(name, port, login)
    assert Host.parse(str(host)) == host


@PROPERTY
@given(st.text(max_size=30))
def test_whatever_parse_lets_through_is_harmless_and_reads_back(text):
    try:
        host = Host.parse(text)
    except Misuse as refused:
        assert "\n" not in refused.line
        return
    assert Host.parse(str(host)) == host
    for word in (host.name, host.login or "x"):
        assert not word.startswith("-")
        assert word.isprintable()
        assert not set(word) & set(" \t'\"`|&;<>()*?#~,{}![]")
    assert (host.login or "x").isascii()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "-oProxyCommand=touch /tmp/x",
        "-oProxyCommand=x@h",
        "x@-oProxyCommand=y",
        "-l@h",
        "@h",
        "h@",
        "a b",
        "h\n",
        "h\nProxyCommand x",
        "h\0",
        "h\x1b[2J",
        "`id`",
        "$(id)",
        "h;id",
        "h|id",
        "h:",
        ":22",
        "h:ssh",
        "h:0",
        "h:65536",
        "h:-1",
        "h:٢٢",
        "h:" + "9" * 5000,
        "[::1",
        "[::1]22",
        "[::1]:",
        "[]",
        "ops@local",
        "local:22",
    ],
)
def test_what_ssh_or_a_shell_could_misread_is_no_host(text):
    with pytest.raises(Misuse):
        Host.parse(text)


def test_each_part_of_a_host_is_read():
    assert Host.parse("db1") == Host("db1")
    assert Host.parse("ops@db1:2222") == Host("db1", 2222, "ops")
    assert Host.parse("ops@example.org@db1") == Host("db1", None, "ops@example.org")
    assert Host.parse("::1") == Host("::1")
    assert Host.parse("ops@[fe80::1%eth0]:22") == Host("fe80::1%eth0", 22, "ops")


def test_a_login_in_the_text_beats_the_one_given_for_all():
    assert Host.parse("db1", login="ops").login == "ops"
    assert Host.parse("root@db1", login="ops").login == "root"


def test_nobody_logs_in_where_there_is_no_ssh():
    for make in (
        lambda: Host.parse("local", login="ops"),
        lambda: Host.parse("ops@local"),
        lambda: Host("local", login="ops"),
    ):
        with pytest.raises(Misuse, match=r"local is this machine without ssh.* --as ops"):
            make()
    with pytest.raises(Misuse, match="not a user name: '-x'"):
        Host.parse("local", login="-x")
    with pytest.raises(Misuse, match="neither login nor port"):
        Host("local", 22)


def test_the_mode_follows_from_where_and_as_whom():
    assert Host.parse("local").mode is Mode.LOCAL
    assert Host.parse("local", user="root").mode is Mode.LOCAL_SUDO
    assert Host.parse("db1", login="ops").mode is Mode.SSH_AS
    assert Host.parse("db1", user="root").mode is Mode.SSH_THEN_SUDO


@pytest.mark.parametrize("user", ["-u", "", "a b", "a\n", "root;id", "$x", "a:b"])
def test_what_sudo_could_misread_is_no_user(user):
    with pytest.raises(Misuse):
        Host("db1", user=user)
    with pytest.raises(Misuse):
        Host("db1", login=user)


def variables():
    name = any_word.map(lambda text: text.replace("=", "")).filter(bool)
    return st.dictionaries(name, st.none() | any_word, max_size=4)


@PROPERTY
@given(any_word.filter(bool), st.lists(any_word, max_size=6), variables(), st.none() | any_word)
def test_any_bytes_reach_the_agent_unchanged(first, rest, env, cwd):
    program = Program((first, *rest), cwd=cwd, env=env)
    wire = json.dumps(program.to_json()).encode("ascii")
    back = json.loads(wire)
    assert [os.fsencode(word) for word in back["argv"]] == [
        os.fsencode(word) for word in program.argv
    ]
    assert back.get("env", {}) == env
    assert back.get("cwd") == cwd


@pytest.mark.parametrize("argv", [(), ("",), ("", "x"), ("a\0b",), ("x", "\0"), ("x", "\ud800")])
def test_what_no_program_can_be_given_is_refused(argv):
    with pytest.raises(Misuse):
        Program(argv)


@pytest.mark.parametrize(
    "env", [{"": "x"}, {"A=B": "x"}, {"A\0": "x"}, {"A": "x\0"}, {"A": "\udfff"}, {"\ud800": None}]
)
def test_what_no_environment_can_hold_is_refused(env):
    with pytest.raises(Misuse):
        Program(("true",), env=env)


def test_a_directory_is_refused_where_no_host_could_have_it():
    with pytest.raises(Misuse):
        Program(("true",), cwd="/a\0b")


def test_only_what_was_asked_for_is_sent():
    assert Program(("true",)).to_json() == {"argv": ["true"]}
    assert Program(("true",), umask=0, env_inherit=()).to_json() == {
        "argv": ["true"],
        "umask": 0,
        "env_inherit": [],
    }
    assert Request("x", Program(("true",))).to_json() == {
        "prog_id": "x",
        "program": {"argv": ["true"]},
    }


def test_a_request_puts_each_thing_where_the_agent_looks_for_it():
    request = Request(
        "x",
        Program(("true",)),
        name="n",
        run={"timeout": 2.0, "grace": 0.0, "wait_children": True, "force": False, "keep": None},
        secrets={"T": "s"},
        spool="/s",
    )
    assert request.to_json() == {
        "prog_id": "x",
        "name": "n",
        "program": {"argv": ["true"]},
        "run": {"timeout": 2.0, "grace": 0.0, "wait_children": True},
        "origin": {"secrets": "T"},
        "secrets": {"env": {"T": "s"}},
        "spool": "/s",
    }


def test_each_option_is_a_field_of_the_program_or_a_key_the_agent_takes_in_run():
    program = {each.name for each in fields(Program)} - {"argv", "stdin"}
    assert {name for name, option in OPTIONS.items() if option.place == "program"} == program
    assert agent.KEYS["run"].keys() >= RUN_KEYS  # type: ignore[attr-defined]


def test_an_option_is_read_as_it_was_typed_and_left_out_where_nothing_was():
    given = {"timeout": "5m", "grace": None, "stop_signal": "int", "cwd": "/x", "spool": "/s"}
    assert read_options(given, "run") == {"timeout": 300.0, "stop_signal": "INT"}
    assert read_options(given, "program") == {"cwd": "/x"}
    with pytest.raises(Misuse, match="not a duration"):
        read_options({"keep": "soon"}, "run")


def test_limits_are_read_as_they_are_typed_and_as_numbers():
    typed = {
        "files": "1024:4096",
        "core": "unlimited",
        "CPU": "2h",
        "memory": "1.5G",
        "nice": "-5",
        "oom-score-adj": " 300 ",
    }
    assert parse_limits(typed) == {
        "files": [1024, 4096], "core": -1, "cpu": 7200, "memory": 3 << 29, "nice": -5,
        "oom_score_adj": 300,
    }  # fmt: skip
    assert parse_limits({"memory_max": "2G", "cpu_quota": "150%"}) == {
        "memory_max": 2 << 30,
        "cpu_quota": 150,
    }
    given: Any = {"files": (5, -1), "core": 0, "cpu": 7, "cpu_quota": 50}
    assert parse_limits(given) == {"files": [5, -1], "core": 0, "cpu": 7, "cpu_quota": 50}
    program = Program(("true",), limits=parse_limits({"files": "1:2", "nice": 3}))
    assert program.to_json() == {"argv": ["true"], "limits": {"files": [1, 2], "nice": 3}}


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("fils", 1, "no such limit: 'fils' (there are files, "),
        ("files", "", "limit files: not a whole number"),
        ("files", -2, "limit files: not a number: -2"),
        ("files", 1.5, "limit files: not a number: 1.5"),
        ("files", True, "limit files: not a number"),
        ("files", "1:2:3", "limit files: SOFT:HARD at most"),
        ("files", "2:1", "soft limit is above"),
        ("files", "unlimited:1", "soft limit is above"),
        ("files", (), "limit files: SOFT:HARD at most"),
        ("cpu", "1.5", "limit cpu: not whole seconds"),
        ("cpu", "soon", "limit cpu: not a duration"),
        ("memory", "big", "limit memory: not a size"),
        ("nice", "unlimited", "limit nice: not a whole number"),
        ("nice", "1:2", "limit nice: one number"),
        ("oom_score_adj", 1001, "limit oom_score_adj: not from -1000 to 1000: 1001"),
        ("cpu_quota", "50", "limit cpu_quota: not a percentage: '50'"),
        ("memory_max", "0", "limit memory_max: not a number"),
    ],
)
def test_a_limit_that_means_nothing_is_refused_and_named(name, value, words):
    with pytest.raises(Misuse) as refused:
        parse_limits({name: value})
    assert words in refused.value.why


@PROPERTY
@given(
    st.dictionaries(
        st.sampled_from([*LIMITS, "x"]),
        st.text(max_size=8) | st.integers() | st.lists(st.integers(), max_size=3),
    )
)
def test_whatever_limits_are_let_through_the_agent_takes(given_limits):
    try:
        read = parse_limits(given_limits)
    except Misuse:
        return
    assert agent.limit_complaints(read) == []


def test_what_is_kept_of_an_output_is_a_size_or_bytes():
    assert [output_kept(each) for each in (None, "64k", 65536, "1.5M", "2GiB")] == [
        None,
        65536,
        65536,
        3 << 19,
        2 << 30,
    ]
    for each in (0, 65535, "1", "0"):
        with pytest.raises(Misuse, match="too little to keep"):
            output_kept(each)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("90", 90.0),
        ("1.5", 1.5),
        ("0", 0.0),
        ("10s", 10.0),
        ("250ms", 0.25),
        ("5m", 300.0),
        ("5min", 300.0),
        (" 2h ", 7200.0),
        ("14d", 1209600.0),
    ],
)
def test_durations(text, expected):
    assert parse_seconds(text) == expected


@PROPERTY
@given(st.text(max_size=30) | st.from_regex(r"[0-9]{1,400}(\.[0-9]+)?[smhd]?", fullmatch=True))
def test_a_duration_is_a_finite_number_or_misuse(text):
    try:
        value = parse_seconds(text)
    except Misuse:
        return
    assert 0 <= value < 1e15


@pytest.mark.parametrize(
    "text", ["", "-1", "1e3", "inf", "nan", "1 week", "٣", "1,5", "0x10", "2h30m", "1_000"]
)
def test_what_is_no_duration_is_refused_with_an_example(text):
    with pytest.raises(Misuse, match="14d"):
        parse_seconds(text)


SIZES = [
    ("4096", 4096),
    ("64k", 1 << 16),
    ("64K", 1 << 16),
    ("500M", 500 << 20),
    ("1.5G", 3 << 29),
    ("2GiB", 2 << 30),
    ("9007199254740993", 9007199254740993),
]


@pytest.mark.parametrize("text, expected", SIZES)
def test_a_size_is_read_alike_by_flags_settings_limits_and_the_collector(text, expected):
    assert parse_size(text) == expected
    assert read_size(text) == expected
    assert setting(Config(overrides={"corra": {"output_limit": text}}), "output_limit") == expected
    assert parse_limits({"memory": text}) == {"memory": expected}
    assert TokenLimits.parse(f"disk={text}").disk == expected


@PROPERTY
@given(st.text(max_size=30) | st.from_regex(r"[0-9]{1,400}(\.[0-9]+)?[kMGT]?", fullmatch=True))
def test_a_size_is_a_number_that_is_not_negative_or_misuse(text):
    try:
        value = parse_size(text)
    except Misuse:
        return
    assert value >= 0


@pytest.mark.parametrize("text", ["", "-1", "1e3", "inf", "1 week", "٣", "1,5", "0x10", "1_000"])
def test_what_is_no_size_is_refused_with_an_example(text):
    with pytest.raises(Misuse, match="500M"):
        parse_size(text)


def test_words_are_taken_as_they_are_and_a_bare_string_is_not():
    assert argv_words(["ls", b"\xff", Path("/tmp")]) == ("ls", "\udcff", "/tmp")
    with pytest.raises(Misuse, match="list of words"):
        argv_words("ls -l")
    with pytest.raises(Misuse, match="list of words"):
        argv_words(b"ls")  # type: ignore[arg-type]
    with pytest.raises(Misuse, match="int"):
        argv_words(["sleep", 5])  # type: ignore[list-item]


def test_no_traceback_shows_a_secret() -> None:
    request = Request(
        "x", Program(("true",)), secrets={"TOKEN": "very-secret"}, callback={"token": "very-secret"}
    )
    assert "very-secret" not in repr(request)
