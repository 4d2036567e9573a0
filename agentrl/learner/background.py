"""One piece of work in a thread of its own, whose error is kept for whoever asks."""

import threading
from collections.abc import Callable


class BackgroundTask:
    """Work that has begun. The thread ends with the process, so what it writes must survive being cut off.

    Args:
        work: called once, in the thread.
        name: for messages and the thread.
    """

    def __init__(self, work: Callable[[], None], *, name: str) -> None:
        self.name = name
        self._work = work
        self.error: BaseException | None = None
        """What the work raised; look when it is done."""
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """Whether it has ended, well or not."""
        return not self._thread.is_alive()

    def wait(self, timeout_s: float | None = None) -> None:
        """Until it has ended, or the time is over."""
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # noqa: BLE001  # whatever it is, it belongs to whoever asks
            self.error = error
