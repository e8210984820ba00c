"""The verbs status and read."""

import posix as os

from ..contract import BOUND_STEP, Refusal
from .finding import find
from .times import open_file


def verb_status(request, stdin, reply, framed):
    reply.send(find(request).state(details=True, sure=True))


def verb_read(request, stdin, reply, framed):
    """Reply with a range of a stream's bytes, as far as the stream goes."""
    run = find(request)
    name = request.get("stream") or run.streams[0]
    if name not in run.streams:
        raise Refusal(
            "bad_request", "no stream %s: this run has %s" % (name, " and ".join(run.streams))
        )
    file = open_file(run, name)
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
