"""A connection that is the stdin and stdout of a ProxyCommand."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading

from corra.transport.channel import Tail, first_line

# A command that fails hangs up a moment before it ends.
_END_S = 0.5


class Proxied(socket.socket):
    """The socket that a ProxyCommand has as stdin and stdout. The user's shell starts the command,
    as with ssh.
    """

    def __init__(self, command: str) -> None:
        ours, theirs = socket.socketpair()
        super().__init__(fileno=ours.detach())
        self._said = Tail()
        with theirs:
            shell = os.environ.get("SHELL") or "/bin/sh"
            self._process = subprocess.Popen(
                [shell, "-c", f"exec {command}"],
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=subprocess.PIPE,
                start_new_session=True,
                bufsize=0,
            )
        self._over = threading.Event()
        # The command ends when the socket is closed. The thread reaps it.
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as words:
            while data := words.read(4096):
                self._said.add(data)
        self._process.wait()
        self._over.set()

    @property
    def said(self) -> str:
        """The first line that the command wrote to its stderr, in quotation marks, or ""."""
        words = first_line(bytes(self._said))
        return f'"{words}"' if words else ""

    def end(self) -> str:
        """Return how the command ended by itself, and its words, or "" if it still runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(_END_S)
            self._over.wait(_END_S)  # a child of the command may hold its stderr
            how = f"exit {code}" if code >= 0 else signal.Signals(-code).name
            return f"its ProxyCommand ended with {how}" + (f": {self.said}" if self.said else "")
        return ""
