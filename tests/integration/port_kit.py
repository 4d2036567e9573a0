"""A port for a server that a test starts: two of pytest's workers, each with servers of its own, run side by side."""

import socket
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def reserved_port() -> Generator[int]:
    """A TCP port of 127.0.0.1 that only a server which is told its number can get while the block lasts.

    It stays bound here, which keeps the kernel from dealing it out to anybody who asks for a free port, and does not listen, so
    that a server with ``SO_REUSEADDR`` (as good as any) can, also again after it was killed.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]
