"""Ports that are chosen before they are listened on."""

import errno
import socket
from collections.abc import Iterator

import pytest

from agentrl.process import ClaimedPort


@pytest.fixture
def claim() -> Iterator[ClaimedPort]:
    claim = ClaimedPort("127.0.0.1")
    yield claim
    claim.close()


def test_a_claimed_port_is_free_for_the_server_that_binds_it_by_number_again_and_again(claim: ClaimedPort) -> None:
    for _ in range(2):
        with (
            socket.create_server(("127.0.0.1", claim.number)) as server,
            socket.create_connection(("127.0.0.1", claim.number), timeout=60) as client,
        ):
            accepted, _ = server.accept()
            accepted.close()
            assert client.recv(1) == b""


def test_a_claimed_port_is_in_use_for_everybody_else_until_it_is_released(claim: ClaimedPort) -> None:
    with socket.socket() as other:
        with pytest.raises(OSError) as caught:  # noqa: PT011
            other.bind(("127.0.0.1", claim.number))
        assert caught.value.errno == errno.EADDRINUSE
        claim.close()
        other.bind(("127.0.0.1", claim.number))
    claim.close()
