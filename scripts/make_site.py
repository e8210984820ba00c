"""Build the site into a folder: `python scripts/make_site.py FOLDER`.

The pages are the tree's own Markdown, unchanged, so that a forge shows them too. Two more pages are
made here: the verbs, of the parser's own flags, and the Python API, of the docstrings. So neither
can say what the code doesn't.
"""

from __future__ import annotations

import html.parser
import importlib.util
import inspect
import io
import re
import shutil
import sys
import tempfile
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "DESIGN.md", "CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/RESULTS.md")
# Files that pages link to, and pictures that they show.
BESIDE = ("LICENSE", "docs", "examples")
# What Invoke's core flags are worth to a reader of corra; the others mean nothing to a verb.
_CORE = (
    *("config", "help", "version", "print-completion-script"),
    *("prompt-for-login-password", "prompt-for-sudo-password"),
)
# In the order of a reader's questions; the rest are values that these take or return.
_FIRST = "run start attach ps Run Result fleet attach_fleet Fleet FleetResult runbook Runbook hosts"
_LARGEST = 500 * 1024


def main(argv: list[str]) -> int:
    """Build the site and say what is wrong with it; return the exit code."""
    if len(argv) != 2:
        print("usage: scripts/site [FOLDER]", file=sys.stderr)
        return 2
    if importlib.util.find_spec("sphinx") is None:
        print("scripts/site: Sphinx needs Python 3.11:  CORRA_PYTHON=python3.11", file=sys.stderr)
        return 125
    wrong = build(Path(argv[1]))
    for each in wrong:
        print(f"scripts/site: {each}", file=sys.stderr)
    if not wrong:
        print(f"{argv[1]}/index.html")
    return 1 if wrong else 0


def build(folder: Path) -> list[str]:
    """Build the site into `folder`; return what is wrong with it, a line each."""
    from sphinx.application import Sphinx
    from sphinx.util.docutils import docutils_namespace

    said = io.StringIO()
    with tempfile.TemporaryDirectory(prefix="corra-site-") as base:
        source = Path(base) / "source"
        gather(source)
        with docutils_namespace():
            app = Sphinx(
                source,
                ROOT / "docs" / "site",
                folder,
                Path(base) / "doctrees",
                "html",
                confoverrides={"nitpicky": True},
                status=None,
                warning=said,
                freshenv=True,
            )
            app.build(force_all=True)
    warnings = re.sub(r"\x1b\[[0-9;]*m", "", said.getvalue()).replace(f"{source}/", "")
    return [*warnings.splitlines(), *broken_links(folder), *too_large(folder)]


def gather(source: Path) -> None:
    """Put all pages into one tree, in which they stand to each other as in the checkout."""
    for name in BESIDE:
        place = source / name
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, place, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, place)
    shutil.rmtree(source / "docs" / "site")
    for name in PAGES:
        (source / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    shutil.copy(ROOT / "docs" / "site" / "index.md", source / "index.md")
    (source / "reference").mkdir()
    (source / "reference" / "verbs.md").write_text(verbs_page())
    (source / "reference" / "api.md").write_text(api_page())


# -- The verbs, of the parser


def verbs_page() -> str:
    """Return the page of all verbs, as `corra` has them, with every flag of each."""
    from corra.cli.words import own_first
    from corra.main import ns, program

    sys.argv[0] = "corra"  # whose examples say so
    lines = [
        "# Verbs and flags",
        "",
        "Made of the parser, so these are all. `inv` in a checkout has the same verbs.",
        "",
        "```text",
        "corra [flags before the verb] VERB [flags] [ID.. | -- COMMAND]",
        "```",
        "",
        *(f"- [{name}](#{name})" for name in ns.tasks),
        "",
        "## Before the verb",
        "",
    ]
    core = {name: each for each in program.core_args() for name in each.names[:1]}
    rows = [(core[name].names, "", core[name].help or "") for name in _CORE]
    lines += [*_table(rows), ""]
    for name, task in ns.tasks.items():
        lines += [f"## {name}", "", *_described(inspect.cleandoc(task.__doc__ or "")), ""]
        words = "-- COMMAND [WORD..]" if task.command else task.ids
        lines += ["```text", f"corra {name} [flags] {words}".rstrip(), "```", ""]
        takes = {flag.names: flag.takes for flag in task.flags}
        arguments = {argument.names: argument for argument in task.get_arguments()}
        own = [flag.names for flag in own_first(task.given)]
        lines += _table([(each, takes[each], arguments[each].help or "") for each in own])
        lines += [""]
    return "\n".join(lines)


def _table(rows: list[tuple[tuple[str, ...], str, str]]) -> Iterator[str]:
    yield from ("| flag | |", "|---|---|")
    for names, takes, help_ in rows:
        each = [
            f"{'-' if len(name) == 1 else '--'}{name.replace('_', '-')}"
            for name in sorted(names, key=len)
        ]
        each[-1] += f" {takes}" if takes else ""
        spelt = ", ".join(f"`{one}`" for one in each)
        told = re.sub(r"\\?\bdocs/([a-z-]+)\.md", r"[\1](../docs/\1.md)", _escaped(help_))
        yield f"| {spelt.replace('|', chr(92) + '|')} | {told} |"


def _described(doc: str) -> Iterator[str]:
    """Yield a docstring's paragraphs; an indented one is examples."""
    for paragraph in doc.split("\n\n"):
        if paragraph.startswith(" "):
            yield from ("```text", *inspect.cleandoc(paragraph).splitlines(), "```", "")
        else:
            yield from (_escaped(paragraph), "")


def _escaped(text: str) -> str:
    return re.sub(r"([<>*_|\[\]`{}$@])", r"\\\1", text)


# -- The Python API, of the docstrings


def api_page() -> str:
    """Return the page of everything in `corra.__all__`."""
    import corra

    first = _FIRST.split()
    errors = [
        name
        for name in corra.__all__
        if isinstance(kind := getattr(corra, name), type) and issubclass(kind, corra.CorraError)
    ]
    named = {*first, *errors, "__version__", "OPEN"}
    others = [name for name in corra.__all__ if name not in named]
    lines = [
        "# The Python API",
        "",
        "Made of the docstrings: everything that `import corra` promises. How it is used stands in",
        "[In Python, and in your own tasks.py](../docs/python.md).",
    ]
    for heading, names in (
        ("Calls, and what they return", first),
        ("Values", others),
        ("Errors", ["CorraError", *(name for name in errors if name != "CorraError")]),
    ):
        lines += ["", f"## {heading}", "", "```{eval-rst}"]
        for name in names:
            value = getattr(corra, name)
            if inspect.isclass(value):
                kind = "autoclass"
            elif callable(value):
                kind = "autofunction"
            else:
                kind = "autodata"
            lines += [f".. {kind}:: corra.{name}"]
            if name == "CorraError":
                lines += ["   :exclude-members: message, with_traceback, add_note"]
        lines += ["```"]
    lines += ["", "`corra.OPEN` as `stdin` holds it open for `Run.send`."]
    return "\n".join([*lines, ""])


# -- The links, as a browser follows them


class _Page(html.parser.HTMLParser):
    """The anchors of a page, and what it links to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.targets: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id":
                self.anchors.add(value or "")
            elif name in ("href", "src", "data", "poster"):
                self.targets.add(value or "")


def broken_links(folder: Path) -> list[str]:
    """Return each link within the site that leads nowhere, and each page that nothing leads to."""
    pages = {path: _Page(path.read_text()) for path in folder.rglob("*.html")}
    wrong, reached = [], {folder / "index.html"}
    for path, page in sorted(pages.items()):
        for target in sorted(page.targets):
            url = urllib.parse.urlsplit(target)
            if url.scheme or url.netloc:
                continue
            there = (path.parent / urllib.parse.unquote(url.path)).resolve() if url.path else path
            anchor = urllib.parse.unquote(url.fragment)
            if not there.exists():
                wrong.append(f"{path.relative_to(folder)}: no {target}")
            elif anchor and there in pages and anchor not in pages[there].anchors:
                wrong.append(f"{path.relative_to(folder)}: no such place: {target}")
            if there != path:
                reached.add(there)
    wrong += [f"{path.relative_to(folder)}: nothing leads here" for path in set(pages) - reached]
    return wrong


def too_large(folder: Path) -> list[str]:
    """Return the pages that take too long over a slow line."""
    return [
        f"{path.relative_to(folder)}: {path.stat().st_size} bytes, and at most {_LARGEST}"
        for path in folder.rglob("*.html")
        if path.stat().st_size > _LARGEST
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv))
