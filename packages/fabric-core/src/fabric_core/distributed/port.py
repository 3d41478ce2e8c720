"""A port for the rendezvous that no other program can be given between choosing it and listening on it."""

from __future__ import annotations

import socket
import sys


class ReservedPort:
    """A port that belongs to this object until ``close()``: no other socket that asks for a free port gets it.

    The socket is bound without ``SO_REUSEADDR``, so that the system picks a port that nobody has, and the option is
    set afterwards. From then on a socket that names this very port and sets the option may listen on it, as the store
    of ``torch.distributed`` does, while the system goes on leaving the port out when it picks free ones. The socket
    itself never listens.
    """

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            self._socket.bind(("", 0))
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        except OSError:
            self._socket.close()
            raise
        self.port: int = self._socket.getsockname()[1]
        if sys.platform != "linux":
            # Elsewhere the option means something else, and the store could not listen while this socket exists.
            self.close()

    def close(self) -> None:
        """Give the port back; no error if that was done before."""
        self._socket.close()

    def __enter__(self) -> ReservedPort:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_socket"):
            self.close()


def reserve_port() -> ReservedPort:
    """Reserve a free port for as long as the result is kept and not closed."""
    return ReservedPort()
