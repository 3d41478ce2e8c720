"""A reserved port: nobody else is given it, and rank 0 can listen on it all the same."""

import socket
from datetime import timedelta

import pytest

from fabric_core.distributed.port import reserve_port


@pytest.mark.skipif("sys.platform != 'linux'", reason="a port is held on Linux only")
@pytest.mark.parametrize("reuse", [0, 1])
def test_no_other_socket_is_given_a_reserved_port(reuse):
    taken = []
    with reserve_port() as reserved:
        for _ in range(400):
            other = socket.socket()
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
            other.bind(("", 0))
            taken.append(other)
        assert reserved.port not in {other.getsockname()[1] for other in taken}
        for other in taken:
            other.close()


@pytest.mark.parametrize("libuv", [True, False])
def test_the_store_of_torch_listens_on_a_reserved_port(libuv):
    from torch.distributed import TCPStore

    with reserve_port() as reserved:
        options = {"timeout": timedelta(seconds=10), "wait_for_workers": False, "use_libuv": libuv}
        server = TCPStore("127.0.0.1", reserved.port, 2, True, **options)
        client = TCPStore("127.0.0.1", reserved.port, 2, False, **options)
        client.set("key", "value")
        assert server.get("key") == b"value"


def test_a_returned_port_can_be_bound_by_anyone():
    with reserve_port() as reserved:
        pass
    with socket.socket() as other:
        other.bind(("", reserved.port))
