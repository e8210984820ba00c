"""The ```console blocks of the documentation: run their commands on a terminal, and compare the
output with the page.

`CORRA_WRITE_DOCS=1 pytest tests/whole/test_docs.py` writes the output into the pages instead.
"""

from __future__ import annotations

import functools
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from terminal import Terminal

_BLOCK = re.compile(r"(?<=^```console\n)(.*?)(?=^```$)", re.MULTILINE | re.DOTALL)
# A run's line says when it ended, if it had ended before the command looked. That is chance.
_AT = re.compile(r",? at \d\d:\d\d(?= after |$)")
_END = "\x1e"
# How render.folded begins what a line has no room for.
_FOLD = re.compile(r" {9}\S")


def blocks(page: str) -> list[str]:
    """Return the text of each block."""
    return _BLOCK.findall(page)


def commands(block: str) -> list[str]:
    return [line.removeprefix("$ ") for line in block.splitlines() if line.startswith("$ ")]


def outputs(block: str) -> list[list[str]]:
    """Return the lines that a block shows after each of its commands."""
    shown: list[list[str]] = []
    for line in block.splitlines():
        if line.startswith("$ "):
            shown.append([])
        else:
            shown[-1].append(line)
    return shown


def replaced(page: str, new: Sequence[str]) -> str:
    """Return the page with the text of its blocks replaced."""
    rest = iter(new)
    return _BLOCK.sub(lambda _: next(rest), page)


def run(typed: Sequence[str], *, cwd: Path, env: Mapping[str, str]) -> list[list[str]]:
    """Run the commands in one shell on a terminal of 80 columns; return the lines on the screen
    after each command.
    """
    script = "".join(f"{command}\n__code=$?; printf '\\036'; (exit $__code)\n" for command in typed)
    words = ["bash", "-c", script]
    _, text = _shown(lambda **how: subprocess.Popen(words, cwd=cwd, env=env, **how))
    return [screen(part) for part in text.split(_END)[: len(typed)]]


def one(start: Callable[..., subprocess.Popen[bytes]]) -> tuple[int, list[str]]:
    """Run the program that `start` starts on such a terminal; return its exit code and the lines on
    the screen.
    """
    code, text = _shown(start)
    return code, screen(text)


def _shown(start: Callable[..., subprocess.Popen[bytes]]) -> tuple[int, str]:
    own_session = functools.partial(start, start_new_session=True)
    with Terminal(own_session, stdin=subprocess.DEVNULL) as terminal:
        return terminal.end(), terminal.seen.decode()


def screen(text: str) -> list[str]:
    """Return the lines that a terminal shows in the end. Carriage returns overwrite, erased text is
    gone, colours are left out.
    """
    lines = []
    for written in text.split("\n"):
        cells: list[str] = []
        at = 0
        for token in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|.", written):
            if token == "\r":
                at = 0
            elif token == "\x1b[K":
                del cells[at:]
            elif len(token) == 1:
                cells[at : at + 1] = [token]
                at += 1
        lines.append("".join(cells).rstrip())
    return lines if lines[-1] else lines[:-1]


def pattern(line: str, cut_off: int) -> re.Pattern[str]:
    """Return a pattern for a line of a page. Numbers, ids and the widths of columns may differ,
    nothing else.
    """
    cut = line.endswith("..")  # the width of the column decides how much is shown
    line = line[:-cut_off] if cut else line
    text = re.sub(r"\b\d{8}t\d{6}z-[0-9a-z]{8}\b", "\0", _AT.sub("", line))
    text = re.sub(r"\b(?=\d*[a-z])[2-9bcdfghjkmnpqrstvwxz]{6}\b", "\1", text)
    text = re.sub(r"\s+", " ", re.sub(r"\d+(?:[.:]\d+)*", "\2", text.strip()))
    text = re.escape(text).replace("\\ ", r"\s+")
    kinds = {"\0": r"\d{8}t\d{6}z-[0-9a-z]{8}", "\1": "[0-9a-z]{6}", "\2": r"\d+(?:[.:]\d+)*"}
    for mark, kind in kinds.items():
        text = text.replace(re.escape(mark), kind).replace(mark, kind)
    return re.compile(r"\s*" + text + (r".*\.\." if cut else r"\s*"))


def alike(expected: Sequence[str], shown: Sequence[str], *, cut: int = 8) -> bool:
    """Return whether the output equals the page's. Of a line that ends in "..", the last `cut`
    characters may differ.
    """
    expected, shown = unfolded(expected), unfolded(shown)
    return len(expected) == len(shown) and all(
        pattern(e, cut).fullmatch(_AT.sub("", s)) for e, s in zip(expected, shown, strict=True)
    )


def unfolded(lines: Sequence[str]) -> list[str]:
    """Return the lines with each one that was folded for a terminal in one piece again."""
    whole: list[str] = []
    for line in lines:
        if whole and _FOLD.match(line):
            # A command stands behind two blanks.
            gap = "  " if line.split()[0] in ("inv", "corra", "ssh") else " "
            whole[-1] += gap + line.strip()
        else:
            whole.append(line)
    return whole
