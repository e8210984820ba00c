"""A run's output as one HTML page: its colours by rich, each line as it looks in the end."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from corra.model.frames import Gap, Output
from corra.model.units import decimal_size
from corra.terminal.looks import settled

# More than this is no page that a browser shows with ease.
PAGE_MAX = 10 << 20
# A longer line is cut into several.
LINE_MAX = 64 << 10

# No script and nothing from elsewhere: a page that is kept for years reads the same.
_HEAD = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light }}
body {{ margin: 1em; font: 14px/1.4 system-ui, sans-serif }}
pre {{ font-family: ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere }}
pre b {{ font-weight: inherit; border-left: 3px solid #c33; padding-left: .4em }}
pre i {{ opacity: .7 }}
</style>
<h1>{title}</h1>
<pre>{facts}</pre>
<pre>
"""


def html_page(
    events: Iterable[Output | Gap], *, title: str, facts: Sequence[str]
) -> Iterator[bytes]:
    """Yield the page. `facts` are lines above the output; a line of stderr has a bar before it."""
    shown = _Shown()
    head = {"title": html.escape(title), "facts": html.escape("\n".join(facts))}
    yield _HEAD.format(**head).encode("utf-8", "replace")
    for stream, line in _lines(events):
        if stream is None:
            part = f"<i>{html.escape(line.decode())}</i>"
        elif stream == "stderr":
            part = f"<b>{shown.line(line)}</b>"
        else:
            part = shown.line(line)
        yield part.encode("utf-8", "replace") + b"\n"
    yield b"</pre>\n</html>\n"


def _lines(events: Iterable[Output | Gap]) -> Iterator[tuple[str | None, bytes]]:
    """Yield (stream, line) as lines become whole; a stream of None is a remark about a gap."""
    begun: dict[str, bytes] = {}
    for event in events:
        if isinstance(event, Gap):
            if rest := begun.pop(event.stream, b""):
                yield event.stream, rest
            gone = decimal_size(event.end - event.start)
            yield None, f"[{event.stream}: {gone} are gone]".encode()
            continue
        *whole, rest = (begun.get(event.stream, b"") + event.data).split(b"\n")
        for line in whole:
            yield event.stream, line.removesuffix(b"\r")
        while len(rest) > LINE_MAX:
            yield event.stream, rest[:LINE_MAX]
            rest = rest[LINE_MAX:]
        begun[event.stream] = rest
    for stream, rest in begun.items():
        if rest:
            yield stream, rest


class _Shown:
    """Makes HTML of lines. rich reads the colours and knows what they are on a page."""

    def __init__(self) -> None:
        import io

        from rich.console import Console
        from rich.terminal_theme import DEFAULT_TERMINAL_THEME

        self._console = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor")
        self._theme = DEFAULT_TERMINAL_THEME
        self._styles: dict[Any, str] = {}

    def line(self, line: bytes) -> str:
        """Return a line as HTML, without what moves the cursor and what shows nothing."""
        text = settled(line).decode("utf-8", "replace")
        if "\x1b" not in text:
            return _escaped(text)
        from rich.text import Text

        parts = []
        for segment in Text.from_ansi(text).render(self._console):
            css = self._css(segment.style)
            shown = _escaped(segment.text)
            parts.append(f'<span style="{css}">{shown}</span>' if css else shown)
        return "".join(parts)

    def _css(self, style: Any) -> str:
        if not style:
            return ""
        if style not in self._styles:
            self._styles[style] = style.get_html_style(self._theme)
        return self._styles[style]


def _escaped(text: str) -> str:
    if not text.isprintable():
        text = "".join(c for c in text if c == "\t" or c.isprintable())
    return html.escape(text, quote=False)
