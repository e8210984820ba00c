"""The verb digest: whether outputs are alike is told by their hashes, and no output travels."""

import posix as os

from ..contract import FINAL, Refusal
from .finding import find

# Enough for a read to cost little, and a digest of 20 MB takes no more memory than that.
HASHED_AT_ONCE = 1 << 18


def verb_digest(request, stdin, reply, framed):
    """Reply with the length and the BLAKE2b of each stream of a run that has ended.

    With `stream`, `start` and `end` it is the digest of that range, which must be there, and the
    run may go on.
    """
    run = find(request)
    state = run.state()
    ranged = request.get("start") is not None or request.get("end") is not None
    if ranged and request.get("stream") is None:
        raise Refusal("bad_request", "a range is one of a stream: say which")
    if state["state"] not in FINAL and not ranged:
        raise Refusal("running", "it has not ended, and its output grows", state=state)
    names = run.streams if request.get("stream") is None else [request["stream"]]
    digests = {}
    for name in names:
        if name not in run.streams:
            raise Refusal(
                "bad_request", "no stream %s: this run has %s" % (name, " and ".join(run.streams))
            )
        facts = state["streams"].get(name) or {"length": 0, "dropped": 0}
        end, dropped = facts["length"], facts["dropped"]
        if ranged:
            begin = int(request.get("start") or 0)
            end = end if request.get("end") is None else int(request["end"])
            if not dropped <= begin <= end <= facts["length"]:
                raise Refusal(
                    "no_range",
                    "%s has the bytes %d to %d, not %d to %d"
                    % (name, dropped, facts["length"], begin, end),
                )
        digests[name] = digest_of(run, name, dropped if not ranged else begin, end)
    reply.send({"state": state, "digests": digests})


def digest_of(run, name, begin, end):
    """Return the digest of a stream's bytes from `begin` to `end`, as far as they are there.

    Whoever removes a beginning says so before the bytes are gone (see bounds). So the digest is of
    nothing but output if what was removed is still before `begin` when all is hashed.
    """
    import _blake2  # only here, and hashlib would take 5 ms

    while True:
        found, at = _blake2.blake2b(digest_size=32), begin
        try:
            file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=run.directory)
        except FileNotFoundError:
            file = None
        while file is not None and at < end:
            data = os.pread(file, min(end - at, HASHED_AT_ONCE), at)
            if not data:
                break
            found.update(data)
            at += len(data)
        if file is not None:
            os.close(file)
        gone = run.heads().get(name, 0)
        if gone <= begin or begin == end:
            return {"start": begin, "end": at, "length": end, "blake2b": found.hexdigest()}
        begin = min(gone, end)
