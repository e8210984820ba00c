"""A terminal whose screen a test can look at: a tmux server of the test's own, and keys typed into
it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import termios
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from proxy import wait_for

PATIENCE_S = 60.0
PROMPT = "me$ "
# The modes of a terminal that a program may leave changed, as far as tmux knows them. A tmux that
# doesn't know a name prints nothing for it.
_FLAGS = (
    *(
        "alternate_on",
        "cursor_flag",
        "cursor_shape",
        "cursor_very_visible",
        "insert_flag",
        "keypad_flag",
        "keypad_cursor_flag",
    ),
    *(
        "origin_flag",
        "wrap_flag",
        "bracket_paste_flag",
        "synchronized_output_flag",
        "pane_key_mode",
    ),
    *(
        "mouse_any_flag",
        "mouse_standard_flag",
        "mouse_button_flag",
        "mouse_all_flag",
        "mouse_sgr_flag",
        "mouse_utf8_flag",
    ),
    *("scroll_region_upper", "scroll_region_lower"),
)
_FORM = " ".join(f"{name}=#{{{name}}}" for name in _FLAGS).replace(
    "#{scroll_region_lower}", "#{e|-:#{pane_height},#{scroll_region_lower}}"
)


class Tmux:
    """One window of a private tmux server, with `command` in it. Without `command` it runs a shell
    with no settings, whose prompt is PROMPT and whose home is `home`.
    """

    def __init__(
        self,
        home: Path,
        *command: str,
        rows: int = 24,
        columns: int = 80,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._home = home
        self._socket = home / f"tmux-{len(list(home.glob('tmux-*')))}"
        rc = home / "bashrc"
        rc.write_text(
            f"PS1='{PROMPT}'\nunset HISTFILE PROMPT_COMMAND\n"
            f"bind 'set enable-bracketed-paste off'\n"
        )
        foreign = ("TMUX", "TMUX_PANE", "NO_COLOR", "COLUMNS", "LINES")
        self._env = {
            **{name: value for name, value in os.environ.items() if name not in foreign},
            **(env or {}),
        }
        self._say(
            "new-session",
            "-d",
            "-x",
            str(columns),
            "-y",
            str(rows),
            shlex.join(command or ("bash", "--rcfile", str(rc), "-i")),
        )
        self._tty = self.ask("#{pane_tty}")
        if not command:
            self.expect(f"^{re.escape(PROMPT.strip())}")

    def __enter__(self) -> Tmux:  # noqa: PYI034 - Self needs Python 3.11
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # The server ends with its command.
        with contextlib.suppress(AssertionError):
            self._say("kill-server")

    @property
    def words(self) -> list[str]:
        """The words before a command to this server."""
        return ["tmux", "-u", "-f", "/dev/null", "-S", str(self._socket)]

    def _say(self, *words: str, given: str = "") -> str:
        told = [*self.words, *words]
        done = subprocess.run(
            told,
            input=given,
            env=self._env,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    def type(self, *keys: str) -> None:
        """Press keys by tmux's names (`C-]`, `Enter`). tmux types any other word as it is."""
        self._say("send-keys", *keys)

    def paste(self, text: str) -> None:
        """Paste as a terminal does: bracketed if the program has asked for bracketed paste."""
        self._say("load-buffer", "-", given=text)
        self._say("paste-buffer", "-p")

    def command(self, line: str) -> None:
        """Have the shell run `line` on an empty screen, so that `expect` doesn't match the line
        itself.
        """
        (self._home / "line").write_text(f"clear\n{line}\n")
        self.type(f". {self._home}/line", "Enter")

    def resize(self, rows: int, columns: int) -> None:
        self._say("resize-window", "-x", str(columns), "-y", str(rows))

    def ask(self, form: str) -> str:
        """Return tmux's value of a format."""
        return self._say("display-message", "-p", form).rstrip("\n")

    @property
    def screen(self) -> str:
        """The text on the screen, without the blank lines at its end."""
        return self._say("capture-pane", "-p").rstrip("\n")

    @property
    def picture(self) -> tuple[str, str]:
        """The screen with its colours, and the cursor's position."""
        return self._say("capture-pane", "-p", "-e"), self.ask("#{cursor_x},#{cursor_y}")

    @property
    def modes(self) -> tuple[str, list[Any]]:
        """The terminal's modes as tmux reports them, and the kernel's settings of it. The end of
        the scroll region is its distance from the last line.
        """
        fd = os.open(self._tty, os.O_RDONLY | os.O_NOCTTY)
        try:
            return self.ask(_FORM), termios.tcgetattr(fd)
        finally:
            os.close(fd)

    @property
    def child(self) -> int:
        """The pid of the program that the shell runs."""
        shell = self.ask("#{pane_pid}")
        return int(Path(f"/proc/{shell}/task/{shell}/children").read_text().split()[0])

    def expect(self, pattern: str) -> re.Match[str]:
        """Wait for `pattern` on the screen; `^` and `$` match at its lines. Raises AssertionError
        with the screen.
        """
        wanted, deadline = re.compile(pattern, re.MULTILINE), time.monotonic() + PATIENCE_S

        def found() -> re.Match[str] | None:
            match = wanted.search(screen := self.screen)
            assert match or time.monotonic() < deadline, (
                f"{pattern} never came; the screen:\n{screen}"
            )
            return match

        match: re.Match[str] = wait_for(found, deadline_s=2 * PATIENCE_S)
        return match
