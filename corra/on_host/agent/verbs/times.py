"""A run's past output: when it came, where its last lines begin, which modes it switched."""

import posix as os

from ..contract import INDEX_RECORD, STREAM_SHIFT

SWITCHED_FIRST, SWITCHED_LATELY, SWITCHED_MAX = (
    1 << 20,
    4 << 20,
    256,
)  # of a terminal's output, bytes looked at; sequences told


def open_file(run, name):
    """Open a file of the run for reading; an empty one where it was removed."""
    try:
        return os.open(name, os.O_RDONLY, dir_fd=run.directory)
    except FileNotFoundError:
        return os.open("/dev/null", os.O_RDONLY)


class Times:
    """The index, read as it grows: the time of each byte, in order of arrival."""

    def __init__(self, run):
        self.file = open_file(run, "index")  # without it times are lost, bytes are not
        self.run, self.streams = run, run.streams
        self.at = run.heads().get("index", 0)
        self.last = {}  # stream: (time, start) of its latest record
        self.behind = True

    def spans(self, sizes):
        """Return [(stream, start, end, time)] of the bytes below `sizes`, in order of arrival.

        It reads at most 1 MiB of new records, since an index of years doesn't fit into memory; call
        again while `behind`.
        """
        while True:
            data = os.pread(self.file, 1 << 20, self.at)
            head = self.run.heads().get("index", 0)
            if head <= self.at:
                break
            self.at, self.last = head, {}  # the data may have been a hole
        data = data[: len(data) // INDEX_RECORD.size * INDEX_RECORD.size]
        self.at += len(data)
        self.behind = self.at + INDEX_RECORD.size <= os.fstat(self.file).st_size
        records = sorted((time_ns, name, begin) for name, (time_ns, begin) in self.last.items())
        for time_ns, packed in INDEX_RECORD.iter_unpack(data):
            if packed >> STREAM_SHIFT < len(self.streams):
                records.append(
                    (
                        time_ns,
                        self.streams[packed >> STREAM_SHIFT],
                        packed & (1 << STREAM_SHIFT) - 1,
                    )
                )
        # Backwards: a span ends where the stream's next one begins. A stream's last span ends with
        # the file, unless more records follow.
        ends, spans = {} if self.behind else dict(sizes), []
        for time_ns, name, begin in reversed(records):
            if name not in ends:
                self.last[name] = (time_ns, begin)
                ends[name] = min(begin, sizes.get(name, 0))
            elif begin < ends[name]:
                spans.append((name, begin, ends[name], time_ns))
                ends[name] = begin
        if not self.behind:
            for time_ns, name, begin in records:
                self.last[name] = (time_ns, begin)
        # Bytes without a record, where the index is torn or missing, come first and have no time.
        spans += [(name, 0, end, 0) for name, end in ends.items() if end]
        return spans[::-1]


def tail_cursor(run, files, index, lines):
    """Return the offset in each stream at which the run's last `lines` lines begin."""
    sizes = {name: os.fstat(file).st_size for name, file in files.items()}
    if lines <= 0:
        return sizes
    size = os.fstat(index).st_size
    whole, heads = Times(run), run.heads()
    # Only the last 1 MiB of the index, 65,536 records. Lines before those count in file order.
    whole.at = max(whole.at, size - (1 << 20)) // INDEX_RECORD.size * INDEX_RECORD.size
    cursor = dict(sizes)
    left, first = lines, True
    for name, start, end, _ in reversed(whole.spans(sizes)):
        begin, at = max(start, heads.get(name, 0)), end
        while at > begin:
            data = os.pread(files[name], min(65536, at - begin), max(begin, at - 65536))
            if not data:
                break
            stop = len(data)
            if first:
                first = False
                stop -= data.endswith(b"\n")
            while left:
                stop = data.rfind(b"\n", 0, stop)
                if stop < 0:
                    break
                left -= 1
                if not left:
                    cursor[name] = at - len(data) + stop + 1
                    return cursor
            at -= len(data)
            cursor[name] = at
    return cursor


def since_cursor(run, files, since_us):
    """Return the offset in each stream of what came since then (us), or at an unknown time."""
    sizes = {name: os.fstat(file).st_size for name, file in files.items()}
    cursor, times = dict(sizes), Times(run)
    while times.behind:
        for name, begin, _, time_ns in times.spans(sizes):
            if name in cursor and (time_ns >= since_us * 1000 or not time_ns):
                cursor[name] = min(cursor[name], begin)
    heads = run.heads()
    return {name: max(offset, heads.get(name, 0)) for name, offset in cursor.items()}


def switched(file):
    """Return the sequences in a terminal's output that switch its modes, each at its last place.

    Of a long output only the beginning is read, where most programs switch modes, and the end.
    """
    import re

    size = os.fstat(file).st_size
    begin = max(0, size - SWITCHED_LATELY)
    text = os.pread(file, min(begin, SWITCHED_FIRST), 0) + os.pread(file, size - begin, begin)
    found = {}
    for each in re.findall(rb"\x1b(?:\[(?:[?<>=][0-9;]{1,80}[hlmu]|[0-9]{0,2} q)|[=>c])", text):
        found.pop(each, None)
        found[each] = None
    return b"".join(list(found)[-SWITCHED_MAX:]).decode("ascii")
