"""Read ahead: one thread that takes groups from the stream, and decodes them, while the step before is trained.

Reading early changes nothing about staleness or acknowledgement: a group is judged when its batch is formed, and stays on the
stream until its checkpoint. The source must allow ``next_group`` in this thread beside ``commit`` in the caller's.
"""

import logging
import queue
import threading
import time
from typing import Protocol

from agentrl.types import TrajectoryGroup

logger = logging.getLogger(__name__)

POLL_S = 0.5
"""Longest look at the stream; bounds how long `close` takes."""
EMPTY_PAUSE_S = 0.01
"""Pause after a look that came back empty before its time, so that a source without blocking reads is not spun on."""


class Reader(Protocol):
    def next_group(self, timeout_s: float) -> TrajectoryGroup | None: ...


class Prefetcher:
    """Groups, read up to ``capacity`` ahead. Start it when the source may be read; `close` it when done.

    What was read and not taken is simply dropped by `close`: it was never acknowledged.
    """

    def __init__(self, source: Reader, *, capacity: int) -> None:
        self._source = source
        self._groups: queue.Queue[TrajectoryGroup | BaseException] = queue.Queue(maxsize=max(1, capacity))
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._read, name="prefetch", daemon=True)
        self._thread.start()

    def next_group(self, timeout_s: float) -> TrajectoryGroup | None:
        """The next group, or None when none came in time; an error of the reading thread is raised here."""
        try:
            found = self._groups.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if isinstance(found, BaseException):
            self._groups.put(found)  # and again, should the caller come back
            raise found
        return found

    def close(self) -> int:
        """Stop reading; returns how many groups had been read in vain."""
        self._stopping.set()
        self._thread.join(timeout=10 * POLL_S)
        if self._thread.is_alive():
            logger.warning("the prefetch thread is still in a read after %.0f s; it ends with the process", 10 * POLL_S)
        return self._groups.qsize()

    def _read(self) -> None:
        try:
            while not self._stopping.is_set():
                started = time.monotonic()
                group = self._source.next_group(POLL_S)
                if group is not None:
                    self._put(group)
                elif time.monotonic() - started < POLL_S / 2:
                    self._stopping.wait(EMPTY_PAUSE_S)
        except BaseException as error:  # noqa: BLE001  # whatever it is, it belongs to the thread that waits
            self._put(error)

    def _put(self, item: TrajectoryGroup | BaseException) -> None:
        while not self._stopping.is_set():
            try:
                self._groups.put(item, timeout=POLL_S)
            except queue.Full:
                continue
            return
