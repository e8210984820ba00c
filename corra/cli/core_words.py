"""The words before a verb: the core flags of Invoke, and the verb's own name.

Invoke swallows a core flag that means nothing to a verb, and answers an unknown word with a
sentence that names neither the program nor the next step.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from invoke.tasks import Task

from corra.errors import Misuse, typed

from .verb import CORE_SHOWS, CORE_WITH_VALUE, VERBS
from .words import nearest, read_hidden

# Core flags that a verb minds: its own -e, -R and --hide, and what is Invoke's own business.
_MINDED = frozenset(
    {
        "-e",
        "--echo",
        "-R",
        "--dry",
        "--hide",
        "-f",
        "--config",
        "-c",
        "--collection",
        "-r",
        "--search-root",
        "--debug",
        "--write-pyc",
        "--prompt-for-sudo-password",
        "--prompt-for-login-password",
    }
)
# The other core flags change how Invoke runs a shell command, and no verb runs one. -D and -F count
# with --list.
_UNMINDED = frozenset(
    {
        "-d",
        "-D",
        "--list-depth",
        "-F",
        "--list-format",
        "--no-dedupe",
        "-p",
        "--pty",
        "-T",
        "--command-timeout",
        "-w",
        "--warn-only",
    }
)
# Verbs of other tools, and ours that do the same.
_SYNONYMS = {
    "ls": "ps",
    "list": "ps",
    "stop": "kill",
    "cancel": "kill",
    "start": "run",
    "exec": "run",
    "log": "logs",
    "tail": "logs",
    "watch": "attach",
    "fg": "attach",
    "restart": "again",
    "rerun": "again",
    "check": "doctor",
    "clean": "gc",
    "prune": "gc",
    "rm": "gc",
    "show": "status",
    "info": "status",
}


def own_words(module: Mapping[str, Any]) -> None:
    """Check this process's command line by the tasks of a tasks.py, given as its `globals()`.

    For Invoke's own `inv`, which loads that file before it reads the configuration beside it and
    before it parses a task's name. Raises Misuse.
    """
    names = [each.name.replace("_", "-") for each in module.values() if isinstance(each, Task)]
    if os.path.basename(sys.argv[0]) in ("inv", "invoke"):
        from . import config_files

        directory = os.path.dirname(os.path.abspath(module["__file__"]))
        if why := wrong_words(sys.argv[1:], names) or config_files.wrong_file(directory, None):
            raise Misuse(why, fate="NOT DONE")


def wrong_words(words: Sequence[str], names: Iterable[str], *, others: bool = False) -> str:
    """Return what is wrong with the words up to the first of the tasks `names`, or nothing.

    `others`: there may be tasks of other names, too.
    """
    known = list(names)
    file = os.environ.get("INVOKE_RUNTIME_CONFIG")
    if file and (why := _wrong_config(file)):
        return f"$INVOKE_RUNTIME_CONFIG: {why}"
    at = 0
    while at < len(words) and words[at] != "--":
        word = words[at]
        if not word.startswith("-"):
            return "" if others or word in known else no_such_verb(word, known)
        name, _, value = word.partition("=")
        if name in CORE_SHOWS or name.startswith("--complete"):
            return ""
        if word in CORE_WITH_VALUE:
            if len(words) == at + 1:
                return f"{name} needs a value"
            value = words[at + 1]
        why = _wrong_value(name, value) or next(
            filter(None, (_misplaced(words, at, each, known) for each in _each_flag(name))), ""
        )
        if why:
            return why
        at += 2 if word in CORE_WITH_VALUE else 1
    return ""


def no_such_verb(word: str, names: Iterable[str]) -> str:
    """Return the refusal of a word that is no verb, with the verb that may be meant."""
    known = list(names)
    meant = _SYNONYMS.get(word)
    near = f" (did you mean {meant}?)" if meant in known else nearest(word, known)
    lists = "--list" if os.path.basename(typed()).startswith("inv") else "--help"
    return f"no verb {word!r}{near};  {typed()} {lists} lists the verbs"


def _each_flag(name: str) -> list[str]:
    """Return the flags of a word: `-eR` is two."""
    return [name] if name.startswith("--") or len(name) == 2 else [f"-{c}" for c in name[1:]]


def _misplaced(words: Sequence[str], at: int, name: str, names: Sequence[str]) -> str:
    """Return why a flag can't stand before the verb of this line, or nothing."""
    if name in _MINDED:
        return ""
    verb = next((each for each in words[at:] if each in names), "")
    core = name in _UNMINDED
    if verb not in VERBS:  # a task of somebody's own, or none
        return "" if core or verb else _unknown_flag(name, "")
    if any(name in flag.typed for flag in VERBS[verb].flags):
        rest = [each for each in words if each != verb]
        return f"{name} stands before the verb:  {typed()} {shlex.join([verb, *rest])}"
    if core:
        return f"{name} means nothing to {verb};  {typed()} --help {verb} lists its flags"
    return _unknown_flag(name, verb)


def _unknown_flag(name: str, verb: str) -> str:
    flags = {each for of in VERBS.values() for flag in of.flags for each in flag.typed}
    known = flags | _MINDED | _UNMINDED | CORE_SHOWS
    near = nearest(name, known) if name.startswith("--") else ""
    say = f"{typed()} --help {verb}".rstrip()
    return f"no flag {name}{near};  {say} lists {'its' if verb else 'the'} flags"


def _wrong_value(name: str, value: str) -> str:
    """Return what is wrong with the value of a core flag, or nothing."""
    why = ""
    if name in ("-f", "--config"):
        why = _wrong_config(value)
    elif name == "--hide":
        try:
            read_hidden(value)
        except Misuse as error:
            why = error.why
    return f"{name}: {why}" if why else ""


def _wrong_config(file: str) -> str:
    """Return why Invoke can't read this configuration file, or nothing."""
    from . import config_files

    if not os.path.isfile(file):
        return f"no such file: {file}"
    if not os.access(file, os.R_OK):
        return f"may not be read: {file}"
    if not file.endswith(config_files.KINDS):
        return f"not a .yaml, .yml, .json or .py: {file}"
    return ""
