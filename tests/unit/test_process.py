"""Ports of servers that start later."""

import socket
import struct
import sys

import pytest

from agentrl.process import ReservedPort

IP_LOCAL_PORT_RANGE = 51
"""Of Linux 6.3: which ports the system may choose from for this socket."""


def test_a_reserved_port_takes_a_server_again_and_again_and_refuses_who_connects_meanwhile() -> None:
    reserved = ReservedPort("127.0.0.1")
    for _ in range(2):
        with socket.create_server(("127.0.0.1", reserved.number)):
            socket.create_connection(("127.0.0.1", reserved.number)).close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", reserved.number))
    reserved.close()
    reserved.close()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a bound port would be refused to its own server, too")
def test_the_system_gives_a_reserved_port_to_nobody_else() -> None:
    def any_free_port() -> int:
        with socket.socket() as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            only = struct.pack("=I", reserved.number << 16 | reserved.number)
            try:
                other.setsockopt(socket.IPPROTO_IP, IP_LOCAL_PORT_RANGE, only)
            except OSError:
                pytest.skip("this kernel cannot narrow the choice to one port")
            other.bind(("127.0.0.1", 0))
            return int(other.getsockname()[1])

    reserved = ReservedPort("127.0.0.1")
    with pytest.raises(OSError, match="in use"):
        any_free_port()
    reserved.close()
    assert any_free_port() == reserved.number
