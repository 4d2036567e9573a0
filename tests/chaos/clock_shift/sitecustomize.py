"""Gives each role of a run a date of its own: ``CHAOS_CLOCK`` names a JSON file of role -> days, read again while the run goes on.

A machine whose clock is set, without setting this machine's. Only ``time.time`` is moved: intervals are measured with ``monotonic``.
"""

import contextlib
import json
import os
import sys
import time
from pathlib import Path

_real, _steady = time.time, time.monotonic
_path = os.environ.get("CHAOS_CLOCK", "")
_role = next((word for word in sys.orig_argv if word in ("run", "serve", "learn", "sandbox")), "engine")
_shift, _next_look = 0.0, 0.0


def _shifted() -> float:
    global _shift, _next_look
    if _steady() >= _next_look:
        _next_look = _steady() + 0.5
        with contextlib.suppress(OSError, ValueError):
            _shift = 86_400.0 * json.loads(Path(_path).read_text()).get(_role, 0.0)
    return _real() + _shift


if _path:
    time.time = _shifted
