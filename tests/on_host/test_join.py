"""scripts/join makes corra/agent.py from the parts, and can lead each line of it back to a part."""

from __future__ import annotations

import ast
import contextlib
import importlib.machinery
import importlib.util
import io
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType

import pytest

from corra import agent

ROOT = Path(__file__).resolve().parents[2]
_loader = importlib.machinery.SourceFileLoader("join", str(ROOT / "scripts" / "join"))
_spec = importlib.util.spec_from_loader("join", _loader)
assert _spec
join = importlib.util.module_from_spec(_spec)
sys.modules["join"] = join  # a dataclass looks for its own module here
_loader.exec_module(join)

MADE = ROOT / join.MADE
# As one program: the late parts are a text in it.
WHOLE = MADE.read_text().replace(agent.LATE_BEGIN, "\n\n").replace(agent.LATE_END, "\n\n")
SOURCES = {name: (ROOT / join.path_of(name)).read_text() for name in join.PARTS}


def definitions(text: str) -> dict[str, str]:
    """Return the top-level definitions by name, and other statements by their text."""
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            name = node.name
        elif isinstance(node, ast.Assign):
            name = ast.unparse(node.targets[0])
        elif isinstance(node, (ast.Expr, ast.Import, ast.ImportFrom)):
            continue
        else:
            name = ast.unparse(node)
        assert name not in found, name
        found[name] = ast.dump(node)
    return found


def test_the_made_file_defines_what_its_parts_define_and_nothing_else():
    parts: dict[str, str] = {}
    for text in SOURCES.values():
        found = definitions(text)
        assert not set(found) & set(parts)
        parts.update(found)
    assert definitions(WHOLE) == parts


def test_the_made_file_imports_what_its_parts_import_from_the_standard_library():
    def imports(text: str) -> set[str]:
        body = ast.parse(text).body
        return {ast.unparse(node) for node in body if isinstance(node, ast.Import)}

    assert imports(WHOLE) == set().union(*map(imports, SOURCES.values()))
    assert "\nfrom " not in WHOLE


@pytest.mark.parametrize("name", join.PARTS)
def test_a_part_imports_only_names_of_earlier_parts(name):
    earlier = {join.path_of(each) for each in join.PARTS[: join.PARTS.index(name)]}
    for node in ast.walk(ast.parse(SOURCES[name], feature_version=(3, 6))):
        if isinstance(node, ast.ImportFrom):
            above = Path(join.path_of(name)).parents[node.level - 1]
            source = above / f"{(node.module or '').replace('.', '/')}.py"
            assert node.level
            assert str(source) in earlier
            assert [each.name for each in node.names if each.asname or each.name == "*"] == []


def test_what_a_guard_needs_stands_above_the_border_and_the_verbs_below_it():
    kinds = [name.partition("/")[0] if "/" in name else "" for name in join.PARTS]
    assert kinds == sorted(kinds, key=["", "guards", "verbs"].index)
    below = {
        name
        for part, text in SOURCES.items()
        if part.startswith("verbs/") and part not in join.LATE
        for name, node in definitions(text).items()
        if node.startswith(("FunctionDef", "ClassDef"))
    }
    all_of_them = definitions(MADE.read_text())
    codes = [each for each in agent.CODE.co_consts if isinstance(each, CodeType)]
    named = [each for each in codes if each.co_name in all_of_them]
    assert {each.co_name for each in named if each.co_firstlineno > agent.GUARDS_END} == below
    left = {each.co_name for each in agent.thin(agent.CODE).co_consts if isinstance(each, CodeType)}
    assert not left & below
    assert left - {"<lambda>"} == {each.co_name for each in codes} - below - {"<lambda>"}


@pytest.fixture
def checkout(tmp_path):
    """Return a directory with all files that scripts/join reads and writes."""
    shutil.copytree(ROOT / join.ROOM, tmp_path / join.ROOM)
    shutil.copy(MADE, tmp_path / join.MADE)
    return tmp_path


def called(root: Path, *words: object) -> tuple[int, str, str]:
    """Run scripts/join in the checkout `root`; return its exit code, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = join.main([*map(str, words)], root)
    return code, out.getvalue(), err.getvalue()


def test_the_committed_file_is_what_the_parts_give():
    argv: list[str | Path] = [sys.executable, "-I", ROOT / "scripts" / "join", "--check"]
    done = subprocess.run(argv, capture_output=True, timeout=60, check=False, cwd="/")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_check_names_the_first_line_that_differs_and_changes_nothing(checkout):
    made = checkout / join.MADE
    lines = made.read_text().splitlines(keepends=True)
    at = lines.index("class Keeper:\n")
    lines[at] = "class Keeper:  # by hand\n"
    made.write_text("".join(lines))
    code, said, wrong = called(checkout, "--check")
    assert (code, said) == (1, "")
    assert f"corra/agent.py:{at + 1} isn't corra/on_host/agent/guards/keeper.py:" in wrong
    assert made.read_text() == "".join(lines)


@pytest.mark.sampled
@pytest.mark.parametrize(
    "change",
    [
        lambda text: text + "\n",
        lambda text: text[:-1],
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: text.replace("\n", "\r\n"),
    ],
)
def test_check_fails_on_a_file_with_more_or_less_in_it(checkout, change):
    (checkout / join.MADE).write_bytes(change(MADE.read_text()).encode())
    assert called(checkout, "--check")[0] == 1


def test_a_changed_part_is_found_and_joined_anew(checkout):
    part = checkout / join.path_of("verbs/main")
    part.write_text(part.read_text().replace("no verb", "there is no verb"))
    assert called(checkout, "--check")[0] == 1
    assert called(checkout) == (0, "", "")
    assert called(checkout, "--check") == (0, "", "")
    assert "there is no verb" in (checkout / join.MADE).read_text()


def test_every_line_of_the_made_file_leads_to_that_line_of_a_part():
    made = join.joined(join.parts(ROOT))
    lines = MADE.read_text().splitlines()
    assert [line for line, _ in made] == lines
    sources = {name: text.splitlines() for name, text in SOURCES.items()}
    for at, (line, source) in enumerate(made, 1):
        said = join.where(made, at)
        if source is None:
            assert at <= 2 or line in ("", "r'''", "'''") or line.startswith("import ")
            assert said.startswith(f"corra/agent.py:{at}: ")
            continue
        name, number = source
        there = sources[name][number - 1]
        if line.startswith("# ="):
            assert (number, line.split()[-1]) == (1, name)
        elif there != line:  # the words of a banner, taken from the docstring
            assert line == f"# {there}".rstrip() or there.strip('r"') == line.removeprefix("# ")
        assert said == f"corra/on_host/agent/{name}.py:{number}: {line}".rstrip()
    # Every line but blanks, banners and imports comes once.
    told = [source for line, source in made if source and line and not line.startswith("#")]
    assert len(told) == len(set(told))


@pytest.mark.sampled
@pytest.mark.parametrize("name", ["contract", "guards/keeper", "verbs/main"])
def test_where_is_right_for_the_first_a_middle_and_the_last_line_of_a_part(name):
    made = MADE.read_text().splitlines()
    lines = SOURCES[name].splitlines()
    begin = next(
        node.lineno
        for node in ast.parse(SOURCES[name]).body[1:]
        if not isinstance(node, (ast.Import, ast.ImportFrom))
    )
    for number in (begin, (begin + len(lines)) // 2, len(lines)):
        line = lines[number - 1]
        code, said, wrong = called(
            ROOT, "--where", *(at for at, each in enumerate(made, 1) if each == line)
        )
        assert (code, wrong) == (0, "")
        assert f"{join.path_of(name)}:{number}: {line}".rstrip() in said.splitlines()


def test_where_tells_of_a_line_that_isnt_there_and_of_a_file_that_was_changed(checkout):
    assert called(checkout, "--where", 99999)[0] == 2
    assert called(checkout, "--where", 0)[0] == 2
    (checkout / join.MADE).write_text("")
    code, said, wrong = called(checkout, "--where", 1)
    assert (code, "may be off" in wrong) == (0, True)
    assert said.startswith("corra/agent.py:1: ")


def appended(name: str, text: str) -> Callable[[Path], None]:
    def break_rule(root: Path) -> None:
        part = root / join.path_of(name)
        part.write_text(part.read_text() + text)

    return break_rule


def opened(name: str, text: str) -> Callable[[Path], None]:
    def break_rule(root: Path) -> None:
        part = root / join.path_of(name)
        head, mark, rest = part.read_text().partition("import posix as os\n")
        assert mark
        part.write_text(head + mark + text + rest)

    return break_rule


def strange(root: Path) -> None:
    (root / join.path_of("verbs/more")).write_text('"""More."""\n\nMORE = 1\n')


def missing(root: Path) -> None:
    (root / join.path_of("verbs/main")).unlink()


def silent(root: Path) -> None:
    part = root / join.path_of("verbs/main")
    part.write_text(part.read_text().partition('"""\n')[2])


@pytest.mark.parametrize(
    ("break_rule", "words"),
    [
        (opened("paths", "from .records import Record\n"), "which isn't before it"),
        (opened("paths", "from .paths import join\n"), "which isn't before it"),
        (opened("files", "from .paths import join as joined\n"), "keeps its name"),
        (opened("processes", "from .kernel import _splice\n"), "is private to"),
        (opened("files", "from . import paths\n"), "only parts are imported from"),
        (opened("files", "from ..courier import main\n"), "only parts are imported from"),
        (opened("files", "from corra.errors import CorraError\n"), "neither of the standard"),
        (opened("files", "import corra.errors\n"), "neither of the standard library nor a part"),
        (opened("files", "from .paths import nothing\n"), "paths has no nothing"),
        (opened("files", "from time import monotonic\n"), "write `import time`"),
        (appended("files", "\nimport zlib\n"), "imports stand together"),
        (appended("files", "\n\ndef late():\n    from .paths import base\n"), "at the top"),
        (appended("files", "\n\ndef join():\n    pass\n"), "paths has a join as well"),
        (appended("files", "\n\nzlib = 1\n"), "has a zlib as well"),
        (appended("files", "\n\nif (late := 1):\n    pass\n"), "not Python 3.6"),
        (strange, "isn't among PARTS"),
        (missing, "isn't there"),
        (silent, "has no docstring"),
    ],
)
def test_a_part_that_breaks_a_rule_is_named_and_nothing_is_written(checkout, break_rule, words):
    break_rule(checkout)
    code, said, wrong = called(checkout)
    assert (code, said) == (2, "")
    assert words in wrong
    assert "corra/on_host/agent/" in wrong
    assert (checkout / join.MADE).read_text() == MADE.read_text()


def test_the_made_file_says_at_its_top_that_it_is_made_and_of_what():
    lines = MADE.read_text().splitlines()
    assert lines[0].startswith("#!")
    assert lines[1].startswith("# Made by scripts/join from corra/on_host/agent/")
    assert ast.get_docstring(ast.parse(MADE.read_text()), clean=False) == agent.__doc__
    marked = (ROOT / ".gitattributes").read_text().splitlines()
    assert any(line.split() == ["corra/agent.py", "linguist-generated"] for line in marked)
