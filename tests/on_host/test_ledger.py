"""The ledger: its lines stay, on a host with any Python from 3.6 on, through its three doors."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import machine
from corra.on_host import ledger

SOURCE = Path(ledger.__file__)
BOOK = {"book": "kernel", "key": "OPS-1"}
SPEAK = "sys.exit(ledger.main(sys.argv[1:], ledger.Input(0), sys.stdout.buffer))"


def add(*lines: str, at: int = 0) -> tuple[dict[str, Any], bytes]:
    reply, data = ledger.append({**BOOK, "at": at, "lines": "".join(f"{line}\n" for line in lines)})
    return reply, data


def file(home: Path) -> Path:
    return home / ".local/state/corra/books/kernel/OPS-1.jsonl"


def test_a_writer_learns_what_others_wrote_meanwhile(home):
    reply, data = add("one")
    assert data == b"one\n" and reply == {"start": 0, "end": 4}
    add("two", at=4)
    assert add("three", at=4) == ({"start": 4, "end": 14}, b"two\nthree\n")
    assert ledger.read(BOOK) == ({"start": 0, "end": 14}, b"one\ntwo\nthree\n")
    assert ledger.read({**BOOK, "at": 99})[1] == b""


def test_a_torn_line_spoils_nothing_but_itself(home):
    add("one")
    with file(home).open("ab") as torn:
        torn.write(b'{"half')
    assert add("two")[1] == b'one\n{"half\ntwo\n'


def test_only_its_owner_can_read_it(home):
    add("one")
    assert file(home).stat().st_mode & 0o777 == 0o600
    assert file(home).parent.stat().st_mode & 0o777 == 0o700


def test_a_directory_that_others_may_write_to_is_not_used(home, last_resort):
    books = home / ".local/state/corra/books"
    books.mkdir(parents=True)
    books.chmod(0o777)
    elsewhere = last_resort / "books/kernel/OPS-1.jsonl"
    try:
        add("one")
        assert elsewhere.read_text() == "one\n"
        # The ledger finds its file where it put it, even once the better place works again.
        books.chmod(0o700)
        add("two")
        assert elsewhere.read_text() == "one\ntwo\n"
    finally:
        elsewhere.unlink(missing_ok=True)


@pytest.mark.parametrize("name", ["..", ".x", "a/b", "", "a\0b", 7])
def test_a_name_never_leads_out_of_its_directory(home, name):
    for request in ({"book": name, "key": "k"}, {"book": "b", "key": name}):
        with pytest.raises(ledger.Refusal):
            ledger.read(request)
        with pytest.raises(ledger.Refusal):
            ledger.append({**request, "lines": "x\n"})


def test_a_line_without_an_end_is_refused(home):
    with pytest.raises(ledger.Refusal, match="no end"):
        ledger.append({**BOOK, "lines": "half"})


def test_many_writers_at_once_lose_nothing(home):
    threads = [
        threading.Thread(target=lambda n=n: [add(f"{n}-{i}") for i in range(20)]) for n in range(5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = ledger.read(BOOK)[1].decode().split()
    assert sorted(lines) == sorted(f"{n}-{i}" for n in range(5) for i in range(20))


def test_only_its_user_may_look_into_it_whatever_the_umask(home):
    before = os.umask(0)
    try:
        add("one")
    finally:
        os.umask(before)
    # The ledger doesn't change the umask: all threads share it, and two threads would mix it up.
    assert file(home).stat().st_mode & 0o777 == 0o600
    made = [each for each in file(home).parents if home in each.parents]
    assert len(made) == 5 and {each.stat().st_mode & 0o777 for each in made} == {0o700}


def test_a_full_disk_takes_no_half_line(home, tmp_path, as_root):
    """On a tmpfs of 64 kB: a line that doesn't fit is refused whole, and a later line that fits is
    written whole.
    """
    small = home / ".local/state"
    small.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k,mode=700", "tmpfs", small], check=True)
    try:
        add("one")
        with pytest.raises(ledger.Refusal, match="No space"):
            add("x" * 200_000)
        add("two")
        assert file(home).read_bytes() == b"one\ntwo\n"
    finally:
        subprocess.run(["umount", small], check=True)


def test_all_journals_are_listed(home):
    assert ledger.catalogue({})[0] == {"books": []}
    add("one")
    ledger.append({"book": "a", "key": "b", "lines": "x\n"})
    assert [(each["book"], each["key"]) for each in ledger.catalogue({})[0]["books"]] == [
        ("a", "b"),
        ("kernel", "OPS-1"),
    ]


@pytest.mark.parametrize("python", machine.pythons(), ids=machine.name)
def test_each_python_on_this_machine_speaks_it_over_pipes(home, python):
    request = json.dumps({**BOOK, "at": 0, "lines": "über\n", "nonce": "n1"}).encode()
    script = f"import sys; sys.path.insert(0, {str(SOURCE.parent)!r}); import ledger; {SPEAK}"
    said = subprocess.run(
        [python, "-ISE", "-c", script, "append"],
        input=b"%d\n%s" % (len(request), request),
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert said.returncode == 0, said.stderr
    first, reply, rest = said.stdout.split(b"\n", 2)
    assert (
        first == b"corra 1 n1"
        and json.loads(reply) == {"start": 0, "end": 6}
        and rest.decode() == "über\n"
    )


@pytest.mark.parametrize(
    ("verb", "request_", "code"),
    [("nope", b"2\n{}", 2), ("read", b"nonsense", 2), ("read", b"2\n{}", 1), ("boot", b"2\n{}", 0)],
)
def test_it_answers_what_it_cant_do_and_never_with_a_traceback(home, verb, request_, code):
    script = f"import sys; from corra.on_host import ledger; {SPEAK}"
    said = subprocess.run(
        [sys.executable, "-c", script, verb],
        input=request_,
        capture_output=True,
        timeout=30,
        check=False,
        cwd=SOURCE.parents[2],
    )
    assert (said.returncode, said.stderr) == (code, b"")


def test_it_is_written_in_the_language_of_python_3_6():
    tree = ast.parse(SOURCE.read_text(), feature_version=(3, 6))
    assert not [node for node in ast.walk(tree) if isinstance(node, (ast.NamedExpr, ast.Match))]
