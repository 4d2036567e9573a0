"""A listening port that can end as a killed process's does: at once, with every connection that it ever accepted.

``asyncio.Server.close`` cannot. A connection whose accepting has begun but whose transport is not yet made is then dropped open, until
the garbage collector finds it (``Server._attach`` fails); one whose transport is made, but unknown to its protocol yet, lives on.
"""

import asyncio
import socket
from collections.abc import Callable

_BACKLOG = 128


class KillablePort:
    """A port of 127.0.0.1 whose connections speak the protocols of ``factory``.

    Args:
        factory: as for ``loop.create_server``.
        number: 0 takes a free port.

    Raises:
        OSError: the port is taken.
    """

    def __init__(self, factory: Callable[[], asyncio.BaseProtocol], number: int) -> None:
        self._factory, self._loop = factory, asyncio.get_running_loop()
        self._connections: dict[socket.socket, asyncio.Task[asyncio.Transport]] = {}
        self._is_killed = False
        self._listener = socket.socket()
        try:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._listener.setblocking(False)
            self._listener.bind(("127.0.0.1", number))
            self._listener.listen(_BACKLOG)
        except BaseException:
            self._listener.close()
            raise
        self.number = int(self._listener.getsockname()[1])
        self._loop.add_reader(self._listener, self._accept)

    async def kill(self) -> None:
        """Refuse connections, and close those that were accepted or wait to be; none of their protocols hears from its peer again.

        Waits for turns of the loop only, not for a peer or for what the protocols started.
        """
        self._is_killed = True
        self._loop.remove_reader(self._listener)
        self._listener.close()
        for opening in self._connections.values():
            if opening.done() and opening.exception() is None:
                opening.result().abort()
        await asyncio.gather(*self._connections.values(), return_exceptions=True)
        await asyncio.sleep(0)  # an aborted transport closes at the loop's next turn
        for connection in self._connections:
            connection.close()  # of one that never came to have a transport
        self._connections.clear()

    def _accept(self) -> None:
        self._connections = {sock: opening for sock, opening in self._connections.items() if sock.fileno() >= 0}
        for _ in range(_BACKLOG):
            try:
                connection, _address = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            connection.setblocking(False)
            self._connections[connection] = self._loop.create_task(self._open(connection))

    async def _open(self, connection: socket.socket) -> asyncio.Transport:
        transport, _protocol = await self._loop.connect_accepted_socket(self._factory, connection)
        if self._is_killed:
            transport.abort()
        return transport
