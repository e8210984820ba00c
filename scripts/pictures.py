"""Draw the pictures of docs/architecture.md: `python scripts/pictures.py`."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "pictures"
FONT = "font-family='ui-monospace, monospace' font-size='14'"
INK, PALE, BLUE, GREEN = "#1f2a36", "#eef2f6", "#2f6f9f", "#2f8f5f"


class Picture:
    """An SVG of boxes and arrows."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self._parts = [
            f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' role='img'",
            f"{FONT}>",
            f"<title>{escape(title)}</title>",
            "<defs><marker id='head' markerWidth='9' markerHeight='7' refX='8' refY='3.5'",
            f"orient='auto'><path d='M0 0 L9 3.5 L0 7 z' fill='{INK}'/></marker></defs>",
            f"<rect width='{width}' height='{height}' rx='8' fill='white'/>",
        ]

    def box(
        self, x: int, y: int, width: int, height: int, lines: Sequence[str], fill: str = PALE
    ) -> None:
        """Draw a box with its lines in the middle."""
        self._parts.append(
            f"<rect x='{x}' y='{y}' width='{width}' height='{height}' rx='6' fill='{fill}' "
            f"stroke='{INK}'/>"
        )
        top = y + height / 2 - 9 * (len(lines) - 1) + 5
        for number, line in enumerate(lines):
            self.text(x + width // 2, round(top + 18 * number), line, anchor="middle")

    def text(self, x: int, y: int, text: str, anchor: str = "start", colour: str = INK) -> None:
        self._parts.append(
            f"<text x='{x}' y='{y}' text-anchor='{anchor}' fill='{colour}'>{escape(text)}</text>"
        )

    def arrow(self, *points: tuple[int, int], colour: str = INK, dashed: bool = False) -> None:
        """Draw a line through the points, with a head at its end."""
        path = " ".join(f"{x},{y}" for x, y in points)
        dash = " stroke-dasharray='5 4'" if dashed else ""
        self._parts.append(
            f"<polyline points='{path}' fill='none' stroke='{colour}' stroke-width='1.5'{dash} "
            "marker-end='url(#head)'/>"
        )

    def write(self, name: str) -> None:
        (FOLDER / name).write_text("\n".join([*self._parts, "</svg>", ""]))


def architecture() -> None:
    picture = Picture(900, 380, "Two clients, and a host with agents, guards, a program, a spool")
    picture.text(20, 28, "your laptop", colour=BLUE)
    picture.box(20, 40, 180, 60, ["corra run", "shows it"])
    picture.text(20, 248, "a colleague's machine", colour=BLUE)
    picture.box(20, 260, 180, 60, ["corra attach", "shows it too"])
    picture.box(270, 10, 615, 360, [], fill="#f8fafc")
    picture.text(285, 32, "db1: sshd and a Python 3.6, nothing else", colour=BLUE)
    picture.box(290, 50, 130, 44, ["agent: start"])
    picture.box(290, 268, 130, 44, ["agent: follow"])
    picture.arrow((200, 70), (288, 70))
    picture.text(212, 62, "ssh")
    picture.arrow((288, 290), (202, 290))
    picture.text(212, 282, "ssh")
    for number, name in enumerate(("standby", "standby", "keeper")):
        picture.box(470 + 140 * number, 50, 120, 44, [name], fill="#e3f1e9")
    picture.arrow((420, 72), (468, 72))
    picture.text(424, 112, "forks, and leaves")
    picture.arrow((590, 72), (608, 72))
    picture.arrow((730, 72), (748, 72))
    picture.box(720, 150, 150, 44, ["your program"], fill="#fdf3dc")
    picture.arrow((810, 94), (810, 148))
    picture.text(730, 128, "parent of")
    picture.box(470, 250, 400, 80, ["the spool: plain files", "stdout  stderr  index  exit"])
    picture.arrow((760, 194), (760, 248), colour=GREEN)
    picture.text(640, 225, "FIFO, splice", colour=GREEN)
    picture.arrow((468, 290), (422, 290), colour=GREEN)
    picture.text(290, 350, "reads from an offset; changes nothing")
    picture.write("architecture.svg")


def start_once() -> None:
    picture = Picture(760, 330, "A start is repeated after its answer was lost")
    picture.text(150, 30, "client", anchor="middle", colour=BLUE)
    picture.text(560, 30, "host", anchor="middle", colour=BLUE)
    for x in (150, 560):
        picture.arrow((x, 40), (x, 315), dashed=True)
    picture.text(140, 62, "makes the id", anchor="end")
    picture.arrow((150, 80), (556, 80))
    picture.text(355, 72, "start k7m2qx, ./migrate", anchor="middle")
    picture.text(570, 104, "claims k7m2qx, once")
    picture.text(570, 124, "exec, once")
    picture.arrow((560, 150), (330, 150))
    picture.text(322, 155, "✕", anchor="end", colour="#b3261e")
    picture.text(450, 142, "started", anchor="middle")
    picture.text(300, 155, "the link breaks", anchor="end", colour="#b3261e")
    picture.arrow((150, 205), (556, 205))
    picture.text(355, 197, "start k7m2qx, ./migrate, again", anchor="middle")
    picture.text(570, 210, "the name is taken:")
    picture.text(570, 230, "the same program,")
    picture.text(570, 250, "so the same run")
    picture.arrow((560, 275), (154, 275), colour=GREEN)
    picture.text(355, 267, "running for 3 s", anchor="middle", colour=GREEN)
    picture.write("start-once.svg")


def rooms() -> None:
    layers = (
        ("main  tasks  cli/", "what an operator types, and a program imports"),
        ("fleets/", "one program on many hosts"),
        ("runbooks/  exports/", "steps that go on after a crash; output for others"),
        ("terminal/  collector/  runners  apsis", "a person's screen; a team's server"),
        ("runs/", "start, find, follow, send, stop"),
        ("remote/", "the agent, as the client sees it"),
        ("transport/  inventory/  render  settings", "bytes to a command and back; hosts; words"),
        ("model/", "values: no I/O, no clock"),
        ("errors  lean_imports", "what can fail"),
        ("on_host/", "what runs on a host: Python 3.6, nothing of ours"),
    )
    picture = Picture(900, 20 + 44 * len(layers), "The layers of the package")
    for number, (names, what) in enumerate(layers):
        top = 12 + 44 * number
        fill = "#e3f1e9" if names == "on_host/" else PALE
        picture.box(12, top, 370, 36, [names], fill=fill)
        picture.text(400, top + 23, what)
    picture.write("rooms.svg")


if __name__ == "__main__":
    architecture()
    start_once()
    rooms()
