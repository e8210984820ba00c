"""The site builds without a warning, all of its links lead somewhere, and the page of messages has
every error that the source can say.
"""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from corra import errors

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import make_site  # noqa: E402


@pytest.mark.timeout(180)
@pytest.mark.storm  # seven seconds
def test_the_site_builds_without_a_warning_and_its_links_lead_somewhere(tmp_path):
    pytest.importorskip("sphinx", reason="Sphinx needs Python 3.11")
    words = [sys.executable, "-W", "ignore", str(ROOT / "scripts" / "make_site.py")]
    done = subprocess.run(
        [*words, str(tmp_path)], capture_output=True, text=True, timeout=170, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "docs" / "messages.html").exists()


def test_a_link_that_leads_nowhere_is_found(tmp_path):
    (tmp_path / "index.html").write_text('<a href="b.html#x"></a><a href="c.html"></a>')
    (tmp_path / "b.html").write_text('<p id="y"></p><a href="https://example.org/z"></a>')
    (tmp_path / "d.html").write_text("")
    assert make_site.broken_links(tmp_path) == [
        "index.html: no such place: b.html#x",
        "index.html: no c.html",
        "d.html: nothing leads here",
    ]


def test_the_page_of_verbs_has_every_flag_of_the_parser(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["corra"])
    from corra.main import ns

    sections = dict(
        re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", make_site.verbs_page(), re.MULTILINE | re.DOTALL)
    )
    for name, task in ns.tasks.items():
        flags = {each for argument in task.get_arguments() for each in argument.names}
        named = set(re.findall(r"`--?([\w-]+)", sections[name]))
        assert {flag.replace("_", "-") for flag in flags} <= named, name


@pytest.mark.parametrize("name", ["coming-from", "faq", "messages"])
def test_a_command_in_a_sentence_is_one_that_corra_takes(name):
    from corra.main import ns

    page = (ROOT / "docs" / f"{name}.md").read_text()
    typed = [shlex.split(each) for each in re.findall(r"`inv ([^`]+)`", page)]
    assert len(typed) > 2
    for verb, *words in typed:
        if verb in ns.tasks:
            cut = words.index("--") if "--" in words else len(words)
            line = ns.tasks[verb].read(words[:cut], words[cut + 1 :] if cut < len(words) else None)
            bare = verb == "run" and cut == len(words)  # `inv run -d` stands for all of them
            assert bare or not line.given.refusal, (verb, words, line.given.refusal)


# -- The page of messages

# The place of the words among what an answer is made of.
_WORDS_AT = {"Refusal": 1, "RequestRefusal": 2}
_ANSWERS = {
    name
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, errors.CorraError)
} | {"NotServed", "TurnedAway", "Hopeless", *_WORDS_AT}


def texts(node: ast.expr) -> list[str]:
    """Return what an expression may say, with a NUL for each value in it."""
    match node:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.JoinedStr():
            return [
                "".join(
                    str(each.value) if isinstance(each, ast.Constant) else "\0"
                    for each in node.values
                )
            ]
        case ast.IfExp():
            return texts(node.body) + texts(node.orelse)
        case ast.BoolOp():
            return [text for each in node.values for text in texts(each)]
        case ast.BinOp(op=ast.Add()):
            rights = texts(node.right) or ["\0"]
            return [left + right for left in texts(node.left) or ["\0"] for right in rights]
        case ast.BinOp(op=ast.Mod()):
            return [re.sub(r"%(\(\w+\))?[sdrg]", "\0", text) for text in texts(node.left)]
    return []


def assigned(function: ast.FunctionDef | ast.AsyncFunctionDef) -> dict[str, list[str]]:
    """Return what the function gives its names to say."""
    found: dict[str, list[str]] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            pairs = [(target, node.value) for target in node.targets]
        elif isinstance(node, (ast.AnnAssign, ast.NamedExpr, ast.AugAssign)) and node.value:
            pairs = [(node.target, node.value)]
        else:
            continue
        for target, value in pairs:
            if isinstance(target, ast.Name):
                found.setdefault(target.id, []).extend(texts(value))
    return found


def said() -> Iterator[tuple[str, str]]:
    """Yield each text that the source makes an error of, and the file that does."""
    for path in sorted((ROOT / "corra").rglob("*.py")):
        if path.name == "agent.py":
            continue
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            names = assigned(function)
            for call in ast.walk(function):
                if not isinstance(call, ast.Call) or not call.args:
                    continue
                kind = getattr(call.func, "id", getattr(call.func, "attr", ""))
                if kind in _ANSWERS:
                    at = 2 if path.name == "tether.py" else _WORDS_AT.get(kind, 0)
                    words = call.args[at if at < len(call.args) else 0]
                    known = names.get(words.id, []) if isinstance(words, ast.Name) else []
                    for text in texts(words) or known:
                        if sum(map(str.isalpha, text)) > 3:
                            yield text, str(path.relative_to(ROOT))


def entries() -> list[re.Pattern[str]]:
    """Return the patterns of docs/messages.md: the first cell of each row."""
    page = (ROOT / "docs" / "messages.md").read_text()
    found = []
    for row in re.findall(r"^\| (`.*?) \|", page, re.MULTILINE):
        for entry in re.findall(r"`([^`]+)`", row):
            if sum(map(str.isalpha, entry)) > 3:  # else it would match anything
                loose = re.escape(re.sub(r"\s+", " ", entry)).replace(r"\.\.", ".*")
                found.append(re.compile(loose, re.DOTALL))
    return found


def test_the_page_of_messages_has_every_error_that_the_source_can_say():
    patterns = entries()
    can_be = {re.sub(r"\s+", " ", text).strip(): path for text, path in said()}
    missing = [
        f"{path}: {text!r}"
        for text, path in can_be.items()
        if not any(each.fullmatch(text) for each in patterns)
    ]
    assert missing == []
    stale = [each.pattern for each in patterns if not any(each.fullmatch(text) for text in can_be)]
    assert stale == []
