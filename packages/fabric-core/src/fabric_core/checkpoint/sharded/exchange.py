"""Two names change places in one step, where the system can do that."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from typing import Final

_CURRENT_FOLDER: Final = -100  # AT_FDCWD
_EXCHANGE: Final = 2  # RENAME_EXCHANGE
# The last one is what some sandboxes answer to calls that they do not know.
_NOT_HERE: Final = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM)


def exchange(first: str, second: str) -> bool:
    """Make what is at each path be at the other one, at no moment neither. Folders and files alike, on one disk.

    ``False`` if the system or the file system cannot; nothing has changed then. ``OSError`` for anything else.
    """
    rename = _renameat2()
    if rename is None:
        return False
    paths = os.fsencode(first), os.fsencode(second)
    if rename(_CURRENT_FOLDER, paths[0], _CURRENT_FOLDER, paths[1], _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NOT_HERE:
        return False
    raise OSError(code, os.strerror(code), first, None, second)


def _renameat2() -> ctypes._NamedFuncPointer | None:
    if sys.platform != "linux":
        return None
    function: ctypes._NamedFuncPointer | None = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is not None:
        function.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    return function
