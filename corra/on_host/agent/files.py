"""Files of a directory that is open: made, read, replaced and removed by name."""

import fcntl
import posix as os
import struct

from .contract import REQUEST_MAX


def fill(directory, name, data, mode=0o600):
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode, dir_fd=directory)
    try:
        while data:
            data = data[os.write(fd, data) :]
    finally:
        os.close(fd)


def fill_in_place(directory, name, data):
    """Make a file that will be overwritten where it is, which works on a full disk where a new one doesn't."""
    file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=directory)
    try:
        # btrfs would need room to overwrite in place; NOCOW works only while the file is empty.
        fcntl.ioctl(file, 0x40086602, struct.pack("l", 0x00800000))
    except OSError:
        pass
    os.write(file, data)
    os.close(file)


def replace(directory, name, data):
    """Give a file of the run another content in one step."""
    new = "%s.%s" % (name, os.urandom(4).hex())
    try:
        fill(directory, new, data)
        os.rename(new, name, src_dir_fd=directory, dst_dir_fd=directory)
    except OSError:
        if exists(directory, new):
            os.unlink(new, dir_fd=directory)
        raise


def discard(above, name):
    """Remove a directory and all in it, as a run's."""
    directory = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=above)
    try:
        for entry in os.listdir(directory):
            try:
                os.unlink(entry, dir_fd=directory)
            except IsADirectoryError:
                discard(directory, entry)
    finally:
        os.close(directory)
    os.rmdir(name, dir_fd=above)


def read_file(directory, name, limit=REQUEST_MAX):
    """Return a file's bytes, or None when it isn't there."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=directory)
    except FileNotFoundError:
        return None
    with open(fd, "rb", 0) as file:
        return file.read(limit)


def exists(directory, name):
    try:
        os.stat(name, dir_fd=directory, follow_symlinks=False)
        return True
    except FileNotFoundError:
        return False
