"""Files that a client reads while it lives: its token and its certificates. _rpc.py and the commands use it.

They are read again for each connection, on the event loop: a named pipe in the place of one would hold up every session.
"""

from __future__ import annotations

import errno
import os
import stat


def read_file(path: str, bytes_max: int) -> bytes:
    """The content of a regular file. Raises OSError, whose strerror says what is wrong."""
    file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(file, "rb") as opened:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", path)
        data = opened.read(bytes_max + 1)
    if len(data) > bytes_max:
        raise OSError(errno.EFBIG, f"more than {bytes_max} bytes", path)
    return data
