"""``eval.every``: checkpoints measured beside a run, one at a time, by ``agentrl eval`` as a process of its own.

It starts engines of its own, so it takes cores or GPUs from the run for as long as it lasts. A failed evaluation is an event and
never stops the run; it is not tried again.
"""

import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence

from agentrl.config import Config
from agentrl.process import die_with_parent
from agentrl.telemetry.run_dir import RunDir

log = logging.getLogger(__name__)

_STEP = re.compile(r"step_(\d+)")
_OWN_ENGINES = ("serve.urls=[]", "serve.router_url=null")
"""Servers that the run attaches to serve its newest policy, not the checkpoint."""
LAST_LIMIT_S = 1800.0
"""Longest wait for the evaluations that are due when the run ends."""


class Evaluations:
    """Starts what is due. Call ``look`` now and then, ``finish`` when the learner is done, ``stop`` on the way out.

    Args:
        config: of the run.
        directory: of the run.
        arguments: ``-c FILE key=value …`` of the run; the evaluation loads the same.
    """

    def __init__(self, config: Config, directory: RunDir, arguments: Sequence[str]) -> None:
        self._every, self._directory, self._arguments = config.eval.every, directory, list(arguments)
        self._process: subprocess.Popen[bytes] | None = None
        self._name = ""
        self._tried = {path.stem for path in directory.evals.glob("step_*.json")}

    def look(self) -> None:
        """Note one that ended, and start the next."""
        if self._process is not None:
            code = self._process.poll()
            if code is None:
                return
            self._process = None
            self._directory.event("evaluated" if code == 0 else "evaluation_failed", checkpoint=self._name, code=code)
            if code:
                log.warning("evaluation failed name=%s code=%d: see %s/eval.log", self._name, code, self._directory.logs)
        if due := self._due():
            self._start(due)

    def finish(self, wait: Callable[[float], bool]) -> None:
        """Measure what is still due.

        Args:
            wait: sleeps for the given seconds; False gives up.
        """
        seconds = 0.0
        self.look()
        while self._process is not None and seconds < LAST_LIMIT_S:
            if not wait(0.5):
                return
            seconds += 0.5
            self.look()

    def stop(self) -> None:
        """End the one that runs."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait()

    def _due(self) -> str:
        """The oldest complete checkpoint that was not measured; older ones may be rotated away first."""
        if not self._every:
            return ""
        steps = sorted(
            int(found[1]) for path in self._directory.checkpoints.glob("step_*") if (found := _STEP.fullmatch(path.name))
        )
        return next((f"step_{n}" for n in steps if n % self._every == 0 and f"step_{n}" not in self._tried), "")

    def _start(self, name: str) -> None:
        self._name = name
        self._tried.add(name)
        model = str(self._directory.checkpoints / name)
        with (self._directory.logs / "eval.log").open("ab") as sink:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "agentrl", "eval", *self._arguments, *_OWN_ENGINES, "--model", model, "--name", name],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
