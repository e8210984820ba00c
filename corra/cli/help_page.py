"""The help of one verb: how it is typed, what it does, examples, and its flags.

It has 80 columns. A line of an example is a command to type, so it is never broken.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .words import as_typed

if TYPE_CHECKING:
    from .words import Flag

_WIDTH = 80
# Longer spellings stand on a line of their own.
_FLAG_WIDTH = 25
# Invoke indents a docstring by two more.
_DOC_WIDTH = 78


def shown_doc(doc: str) -> str:
    """Return a docstring with the program's name as it was typed, in lines that fit.

    The first line is the verb's line in a list of tasks. An indented paragraph is examples.
    """
    first, *rest = inspect.cleandoc(as_typed(doc)).split("\n")
    paragraphs = "\n".join(rest).strip("\n").split("\n\n")
    return "\n\n".join([first, *(_filled(each) for each in paragraphs if each)])


def _filled(paragraph: str) -> str:
    return paragraph if paragraph.startswith(" ") else textwrap.fill(paragraph, _DOC_WIDTH)


def help_lines(usage: str, doc: str, flags: Sequence[Flag[Any]]) -> list[str]:
    """Return the lines of a help page; `doc` is what `shown_doc` returned."""
    lines = [f"Usage: {usage}", "", *doc.split("\n"), "", "Flags:"]
    for flag in flags:
        lines += _flag_lines(flag)
    return lines


def _flag_lines(flag: Flag[Any]) -> list[str]:
    short = [name for name in flag.typed if not name.startswith("--")]
    long = [name for name in flag.typed if name.startswith("--")]
    spelt = ", ".join([*short, *long]) + (f" {flag.takes}" if flag.takes else "")
    start = f"  {spelt:<{_FLAG_WIDTH}}  "
    text = textwrap.wrap(as_typed(flag.help), _WIDTH - _FLAG_WIDTH - 4, break_on_hyphens=False)
    if len(spelt) > _FLAG_WIDTH:
        text, start = ["", *text], f"  {spelt}"
    return [start + text[0], *(" " * (_FLAG_WIDTH + 4) + each for each in text[1:])]
