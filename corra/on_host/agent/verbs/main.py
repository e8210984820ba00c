"""All verbs by name, and main."""

import errno
import posix as os
import sys

from ..contract import Refusal
from .ended import unreadable
from .exchange import Input, Reply
from .late import late
from .requests import complaints

VERBS = ("start", "run", "follow", "wait", "status", "signal", "stop", "read", "gc", "deliver",
         "digest", "list")  # fmt: skip


def open_standard():
    """Give /dev/null to each of the descriptors 0, 1 and 2 that is closed.

    Else the next file that is opened has that number, and replies go into it.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open("/dev/null", os.O_RDWR), True)
    sys.stdout = sys.stdout or open(1, "w")  # noqa: SIM115 - open as long as the process lives


def main(argv, stdin, stdout):
    """Carry out one verb; return the exit code. `stdin` is an Input, `stdout` a binary file."""
    verb = argv[0] if argv else "start"
    reply = Reply(stdout, None)
    try:
        request, framed = stdin.request()
        if not isinstance(request, dict):
            raise ValueError("not an object")
        reply.nonce = request.get("nonce") if isinstance(request.get("nonce"), str) else None
    except (ValueError, EOFError, RecursionError) as error:
        reply.send({"error": "bad_request", "message": "the request can't be read: %s" % error})
        return 2
    try:
        if verb not in VERBS:
            raise Refusal("bad_request", "no verb %s: there are %s" % (verb, " ".join(VERBS)))
        wrong = complaints(request)
        if wrong:
            raise Refusal("bad_request", "; ".join(wrong), complaints=wrong)
        late("verb_" + verb)(request, stdin, reply, framed)
        return 0
    except Refusal as refusal:
        reply.send(refusal.reply)
        return 1
    except OSError as error:
        if error.errno == errno.EBADMSG:
            reply.send(unreadable(error.filename, error).reply)
            return 1
        if error.errno != errno.EPIPE:
            raise
        os.dup2(os.open("/dev/null", os.O_WRONLY), 1)
        return 0


if __name__ == "__main__":
    open_standard()
    # Replies are flushed as they are sent, so Python's finalisation, 2 ms, would close nothing.
    os._exit(main(sys.argv[1:], Input(0), sys.stdout.buffer))
