"""Files of an open directory: make, read, replace and remove them by name."""

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
    """Make a file that will be overwritten in place, which works on a full disk."""
    file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=directory)
    try:
        # btrfs needs room to overwrite in place, unless NOCOW was set while the file was empty.
        fcntl.ioctl(file, 0x40086602, struct.pack("l", 0x00800000))
    except OSError:
        pass
    os.write(file, data)
    os.close(file)


def replace(directory, name, data):
    """Replace the content of a file in one step. Raises OSError; the old content is there then."""
    new = "%s.%s" % (name, os.urandom(4).hex())
    try:
        fill(directory, new, data)
        os.rename(new, name, src_dir_fd=directory, dst_dir_fd=directory)
    except OSError:
        if exists(directory, new):
            os.unlink(new, dir_fd=directory)
        raise


def discard(above, name):
    """Remove a directory such as a run's, and all that is in it."""
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
    """Return a file's bytes; None where there is no file."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=directory)
    except FileNotFoundError:
        return None
    with open(fd, "rb", 0) as file:
        # No more than there is: read(limit) would take that much memory first.
        return file.read(min(limit, os.fstat(fd).st_size + 1))


def exists(directory, name):
    try:
        os.stat(name, dir_fd=directory, follow_symlinks=False)
        return True
    except FileNotFoundError:
        return False
