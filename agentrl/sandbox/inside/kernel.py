"""A session: one jailed interpreter that runs cells until it is killed.

It shares its process with foreign code, so nothing it says is trusted beyond its own session: the service reads the output
itself, keeps the time, and learns of the process's end from the fork server. A forged answer deceives only its own session.
"""

import ast
import base64
import builtins
import contextlib
import io
import json
import linecache
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

_COROUTINE = 0x80  # inspect.CO_COROUTINE, without importing inspect
_RICH = {"text/html": "_repr_html_", "text/latex": "_repr_latex_", "text/markdown": "_repr_markdown_", "image/png": "_repr_png_"}


def serve(channel_fd: int, names: dict[str, Any], *, unpack: Callable[[int], bytes]) -> NoReturn:
    """Answer cells until the service closes its end. Never returns."""
    channel = socket.socket(fileno=channel_fd)
    null = os.open("/dev/null", os.O_RDWR)
    own_pid = os.getpid()
    cell = _Cell(names)
    count = 0
    while True:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            message, fds, _, _ = socket.recv_fds(channel, 4096, 4)
        except InterruptedError:
            continue
        except OSError:
            os._exit(0)
        if not message:
            os._exit(0)
        request = json.loads(message)
        if len(fds) != 4:
            channel.send(json.dumps({"n": request["n"], "lost": "no file descriptor is free in the session"}).encode())
            os._exit(1)
        job_fd, stdout_fd, stderr_fd, report_fd = fds
        os.dup2(stdout_fd, 1)
        os.dup2(stderr_fd, 2)
        os.close(stdout_fd)
        os.close(stderr_fd)
        count += 1
        try:
            source = unpack(job_fd)
        except OSError as error:
            os.write(2, f"the input files could not be written: {error}\n".encode())
            answer: dict[str, Any] = {"code": 1, "display": [], "error": []}
        else:
            answer = cell.run(source, count, echo=request["echo"], rich=request["rich"])
        if os.getpid() != own_pid:  # a child that the cell forked came out at its end
            os._exit(0)
        os.close(job_fd)
        _report(report_fd, answer)
        os.dup2(null, 1)
        os.dup2(null, 2)
        try:
            channel.send(json.dumps({"n": request["n"], "code": answer["code"]}).encode())
        except OSError:
            os._exit(0)


def _report(fd: int, answer: dict[str, Any]) -> None:
    try:
        data = memoryview(json.dumps(answer).encode("utf-8", "replace"))
        while data:
            data = data[os.write(fd, data) :]
    except (OSError, ValueError, TypeError, MemoryError, RecursionError):
        pass  # the service reads a torn report as none
    finally:
        os.close(fd)


class _Cell:
    """Runs one cell after another in one namespace."""

    def __init__(self, names: dict[str, Any]) -> None:
        self._names = names
        self._display: list[dict[str, str]] = []
        self._rich = False
        sys.displayhook = self._show

    def run(self, source: bytes, count: int, *, echo: bool, rich: bool) -> dict[str, Any]:
        """Execute; the value of a last expression is printed, or with ``rich`` put among the displays."""
        name = f"cell {count}"
        text = source.decode("utf-8", "replace")
        linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
        self._display, self._rich = [], rich
        if rich:
            builtins.display = self.display  # pyright: ignore[reportAttributeAccessIssue] - as in a notebook
        code, errors = 0, list[dict[str, Any]]()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            try:
                self._execute(text, name, echo=echo)
            finally:
                signal.signal(signal.SIGINT, signal.SIG_IGN)
        except SystemExit as stop:
            code = 0 if stop.code is None else stop.code & 0xFF if isinstance(stop.code, int) else 1
            if code and not isinstance(stop.code, int):
                _write_error(f"{stop.code}\n")
        except BaseException as error:  # noqa: BLE001 - this is the top of the user's program
            code = 1
            trace = _traceback(error)
            errors.append({"ename": type(error).__name__, "evalue": _text(error), "traceback": trace})
            if not rich:
                _write_error("".join(trace))
        if rich:
            self._take_figures()
        for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
            with contextlib.suppress(OSError, ValueError, AttributeError):  # the cell has closed or replaced it
                stream.flush()  # pyright: ignore[reportOptionalMemberAccess] - None is suppressed
        return {"code": code, "display": self._display, "error": errors}

    def _execute(self, text: str, name: str, *, echo: bool) -> None:
        body = ast.parse(text, name).body
        last = body.pop() if echo and body and isinstance(body[-1], ast.Expr) else None
        if body:
            self._evaluate(ast.Module(body, []), name, "exec")
        if isinstance(last, ast.Expr):
            sys.displayhook(self._evaluate(ast.Expression(last.value), name, "eval"))

    def _evaluate(self, tree: ast.Module | ast.Expression, name: str, mode: str) -> Any:
        code = compile(tree, name, mode, flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
        if code.co_flags & _COROUTINE:
            import asyncio  # most sessions never await

            return asyncio.run(eval(code, self._names))
        return eval(code, self._names)

    def _show(self, value: Any) -> None:
        if value is None:
            return
        self._names["_"] = value
        if self._rich:
            self.display(value)
        else:
            sys.stdout.write(repr(value) + "\n")

    def display(self, *values: Any) -> None:
        """What a notebook's ``display`` does: one entry per value, media type to data."""
        for value in values:
            shown = {"text/plain": repr(value)}
            for media_type, method in _RICH.items():
                data = getattr(type(value), method, None) and getattr(value, method)()
                if isinstance(data, bytes):
                    data = base64.b64encode(data).decode()
                if isinstance(data, str):
                    shown[media_type] = data
            self._display.append(shown)

    def _take_figures(self) -> None:
        """Open matplotlib figures become images, as in a notebook."""
        pyplot = sys.modules.get("matplotlib.pyplot")
        if pyplot is None:
            return
        try:
            for number in pyplot.get_fignums():
                figure, image = pyplot.figure(number), io.BytesIO()
                figure.savefig(image, format="png", bbox_inches="tight")
                self._display.append({"text/plain": repr(figure), "image/png": base64.b64encode(image.getvalue()).decode()})
            pyplot.close("all")
        except Exception as error:  # noqa: BLE001 - drawing runs the user's objects
            _write_error(f"a figure could not be drawn: {type(error).__name__}: {error}\n")


def _traceback(error: BaseException) -> list[str]:
    """Lines of the traceback, without the frames of this file."""
    try:
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
            trace = trace.tb_next
        return traceback.format_exception(type(error), error, trace)
    except BaseException as second:  # noqa: BLE001 - a broken exception or no memory left: say the least
        return [f"{type(error).__name__}: (its traceback could not be printed: {type(second).__name__})\n"]


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException:  # noqa: BLE001 - a hostile __str__
        return ""


def _write_error(text: str) -> None:
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except BaseException:  # noqa: BLE001 - the cell may have replaced stderr by anything
        os.write(2, text.encode("utf-8", "backslashreplace"))
