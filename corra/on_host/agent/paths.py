"""Paths, and reading a file by its path.

os.path is Python code, of which a run's guards would keep 150 to 440 kB.
"""

import posix as os
import sys

# The made file, compiled. Guards in a fresh interpreter get it over a pipe and trust no file.
CODE = sys._getframe().f_code


def join(above, name):
    """Return the path of `name` in the directory `above`; an absolute `name` stays as it is."""
    slash = "/" if isinstance(above, str) else b"/"
    return name if name.startswith(slash) else above.rstrip(slash) + slash + name


def absolute(path):
    parts = []
    for part in join(os.getcwd(), path).split("/"):
        if part == "..":
            del parts[-1:]
        elif part not in ("", "."):
            parts.append(part)
    return "/" + "/".join(parts)


def parent(path):
    return path.rpartition("/")[0] or "/"


def base(path):
    return path.rpartition("/")[2]


def present(path):
    """Return whether there is anything at `path` that this user may see."""
    try:
        os.stat(path)
        return True
    except OSError:
        return False


def text_of(path):
    """Return `path` (bytes) as the text by which this Python opens the file."""
    return path.decode(sys.getfilesystemencoding(), "surrogateescape")


def octets(text):
    """Return the bytes that `text` stands for. JSON is UTF-8, whatever the locale."""
    return text.encode("utf-8", "surrogateescape")


def make_directories(path, mode):
    if not present(path):
        make_directories(parent(path), mode)
        try:
            os.mkdir(path, mode)
        except FileExistsError:
            pass  # another start has just made the directory


def slurp(path, limit=1 << 16):
    """Return the first bytes of a file, as one read gives them. Raises OSError.

    The read takes `limit` bytes of memory first, and a login's limits may leave little of it.
    """
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.read(fd, limit)
    finally:
        os.close(fd)


def beside(name):
    """Return the path of a file in the made file's directory."""
    return join(parent(absolute(CODE.co_filename)), name)
