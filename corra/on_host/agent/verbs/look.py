"""The verbs status, list and read."""

import errno
import posix as os

from ..contract import BOUND_STEP, Refusal
from ..run import Run
from ..spool import user_name
from .finding import find, runs_of


def verb_status(request, stdin, reply, framed):
    reply.send(find(request).state(details=True))


def verb_list(request, stdin, reply, framed):
    """Reply with the States of all runs, the oldest first, and with what can't be read."""
    found, unreadable = [], []
    for root, prog_id in runs_of(request):
        try:
            run = Run(root, prog_id)
            try:
                found.append((run.request.get("created", 0), prog_id, run.state()))
            finally:
                run.close()
        except OSError as error:
            if error.errno == errno.EBADMSG:  # else removed since, or another user's
                unreadable.append(
                    {"prog_id": prog_id, "dir": error.filename, "message": error.strerror}
                )
    listed = {
        "host": os.uname().nodename,
        "user": user_name(),
        "runs": [state for _, _, state in sorted(found, key=lambda each: each[:2])],
    }
    reply.send(dict(listed, unreadable=unreadable) if unreadable else listed)


def verb_read(request, stdin, reply, framed):
    """Reply with a range of a stream's bytes, as far as the stream goes."""
    run = find(request)
    name = request.get("stream") or run.streams[0]
    if name not in run.streams:
        raise Refusal(
            "bad_request", "no stream %s: this run has %s" % (name, " and ".join(run.streams))
        )
    file = os.open(name, os.O_RDONLY, dir_fd=run.directory)
    size = os.fstat(file).st_size
    begin = min(max(0, int(request.get("start") or 0)), size)
    end = size if request.get("end") is None else min(max(begin, int(request["end"])), size)
    if run.bounded:
        read_bounded(run, reply, name, file, begin, end, size)
        return
    reply.send({"stream": name, "start": begin, "end": end, "length": size})
    while begin < end:
        data = os.pread(file, min(end - begin, 1 << 18), begin)
        reply.write(data)
        begin += len(data)


def read_bounded(run, reply, name, file, begin, end, size):
    """Reply with at most BOUND_STEP of a range whose beginning may be gone, or go meanwhile.

    It is read before its place is named.
    """
    while True:
        begin = min(max(begin, run.heads().get(name, 0)), end)
        data = os.pread(file, min(end - begin, BOUND_STEP), begin)
        if run.heads().get(name, 0) <= begin or begin == end:
            break
    reply.send({"stream": name, "start": begin, "end": begin + len(data), "length": size})
    reply.write(data)
