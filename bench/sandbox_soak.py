"""Saturate a real sandbox service, attacks mixed in, and look for what it leaves behind.

    python bench/sandbox_soak.py --minutes 10

Checks while it runs: every honest program gets its right answer. Checks at the end, against the state after the warm-up:
processes below the service, its file descriptors, its memory, mounts of the host, files in its temporary directories.
Exits non-zero when an answer was wrong or something leaked.
"""

import argparse
import asyncio
import collections
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp

ATTACKS = {
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "memory": "x = []\nwhile True: x.append(bytearray(8 << 20))",
    "memory of many": "import os, time\nfor _ in range(30):\n    if os.fork() == 0:\n        x = os.urandom(30 << 20); time.sleep(9)\ntime.sleep(9)",
    "output": "while True: print('x' * 1000)",
    "disk": "n = 0\nwhile True:\n    open(f'/tmp/{n}', 'wb').write(b'x' * (1 << 20)); n += 1",
    "inodes": "n = 0\nwhile True:\n    open(f'/tmp/{n}', 'w').close(); n += 1",
    "daemon": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(60)\n    os._exit(0)",
    "deaf": "import signal\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n    except (OSError, ValueError): pass\nwhile True: pass",
    "crash": "import ctypes; ctypes.string_at(0)",
    "threads": "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(60,)).start()",
    "descriptors": "import os\nfds = []\nwhile True: fds.extend(os.pipe())",
    "mount": "import ctypes\nctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, None)",
    "kill all": "import os\nos.kill(-1, 9)",
}


class Soak:
    """The load and its account."""

    def __init__(self, url: str, seed: int) -> None:
        self.url = url
        self.random = random.Random(seed)
        self.counts: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []

    async def post(self, http: aiohttp.ClientSession, path: str, **fields: Any) -> tuple[int, dict[str, Any]]:
        async with http.post(self.url + path, json=fields) as answer:
            return answer.status, await answer.json()

    async def one(self, http: aiohttp.ClientSession) -> None:
        kind = self.random.choices(("honest", "attack", "session", "gone", "cpp"), (60, 25, 12, 2, 1))[0]
        a, b = self.random.randrange(10**6), self.random.randrange(10**6)
        if kind == "attack":
            name = self.random.choice(list(ATTACKS))
            await self.post(http, "/run_code", code=ATTACKS[name], run_timeout=0.5, memory_limit_MB=128)
        elif kind == "session":
            await self._session(http, a, b)
        elif kind == "gone":
            try:
                async with asyncio.timeout(0.1):
                    await self.post(http, "/run_code", code="import time; time.sleep(20)", run_timeout=25)
            except TimeoutError:
                pass
        else:
            await self._honest(http, kind, a, b)
        self.counts[kind] += 1

    async def _honest(self, http: aiohttp.ClientSession, kind: str, a: int, b: int) -> None:
        code, language = f"print({a} * {b})", "python"
        if kind == "cpp":
            code, language = f'#include <cstdio>\nint main() {{ printf("%lld\\n", {a}LL * {b}LL); }}', "cpp"
        status, body = await self.post(http, "/run_code", code=code, language=language, compile_timeout=30, run_timeout=20)
        if status == 429:
            self.counts["429"] += 1
        elif status != 400 and (body.get("run_result") or {}).get("stdout") != f"{a * b}\n":
            self.wrong.append(f"{language}: {status} {json.dumps(body)[:300]}")

    async def _session(self, http: aiohttp.ClientSession, a: int, b: int) -> None:
        status, body = await self.post(http, "/sessions", memory_limit_MB=128)
        if status != 200:
            self.counts[f"session {status}"] += 1
            return
        path = f"/sessions/{body['session_id']}"
        for code in (f"a = {a}", self.random.choice(list(ATTACKS.values())) if self.random.random() < 0.3 else "1 / 0"):
            await self.post(http, path + "/run", code=code, timeout=0.5)
        status, body = await self.post(http, path + "/run", code=f"a * {b}")
        if status == 200 and body["session_alive"] and body["run_result"]["stdout"] not in (f"{a * b}\n", ""):
            self.wrong.append(f"session: {json.dumps(body)[:300]}")
        if status == 200:
            async with http.delete(self.url + path) as answer:
                await answer.read()

    async def run(self, seconds: float, at_once: int) -> None:
        ends = time.monotonic() + seconds

        async def worker() -> None:
            while time.monotonic() < ends:
                await self.one(http)

        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http, asyncio.TaskGroup() as group:
            for _ in range(at_once):
                group.create_task(worker())


def descendants(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            try:
                found += [int(child), *descendants(int(child))]
            except FileNotFoundError:
                continue
    return found


def memory_mib(pids: list[int]) -> float:
    """Proportional memory, so that what forks share counts once."""
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1])
    return total / 1024


def state(pid: int, temporary: str) -> dict[str, float]:
    pids = [pid, *descendants(pid)]
    return {
        "processes": len(pids),
        "descriptors": sum(len(os.listdir(f"/proc/{each}/fd")) for each in pids),
        "host mounts": len(Path("/proc/self/mounts").read_text().splitlines()),
        "mounts of the fork servers": sum(len(Path(f"/proc/{each}/mounts").read_text().splitlines()) for each in pids),
        "temporary files": sum(len(files) + len(folders) for _, folders, files in os.walk(temporary)),
        "memory MiB": round(memory_mib(pids), 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--at-once", type=int, default=12)
    parser.add_argument("--tier", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = {"port": port, "tier": given.tier, "workers": 2, "max_sessions": 32, "max_concurrency": 8, "memory_limit_mb": 256}
    code = "import json, sys; from agentrl.sandbox.app import serve; serve(**json.loads(sys.argv[1]))"
    with tempfile.TemporaryDirectory() as temporary:
        service = subprocess.Popen([sys.executable, "-c", code, json.dumps(options)], env=os.environ | {"TMPDIR": temporary})
        try:
            soak = Soak(f"http://127.0.0.1:{port}", given.seed)
            asyncio.run(_healthy(soak.url))
            asyncio.run(soak.run(min(20.0, 6.0 * given.minutes), given.at_once))
            time.sleep(2)
            before = state(service.pid, temporary)
            asyncio.run(soak.run(60.0 * given.minutes, given.at_once))
            time.sleep(3)
            after = state(service.pid, temporary)
            health = asyncio.run(_healthy(soak.url))
            everything = descendants(service.pid)
        finally:
            service.send_signal(signal.SIGTERM)
            service.wait(30)
        time.sleep(1)
        left = [pid for pid in everything if Path(f"/proc/{pid}").exists()]
    print(f"requests {dict(soak.counts)}  wrong answers {len(soak.wrong)}  fork server restarts {health['restarts']}")
    print(f"phases {health['phases_ms']}")
    for name in before:
        print(f"{name:28} {before[name]:>10} -> {after[name]:>10}")
    print(f"processes left after the end: {left}")
    leaked = [name for name in before if name != "memory MiB" and after[name] > before[name]]
    if after["memory MiB"] > before["memory MiB"] + 30:
        leaked.append("memory MiB")
    for wrong in soak.wrong[:5]:
        print("WRONG", wrong)
    print("leaked:", leaked or "nothing")
    return 1 if leaked or left or soak.wrong or health["sessions"] else 0


async def _healthy(url: str) -> dict[str, Any]:
    async with aiohttp.ClientSession() as http:
        for _ in range(600):
            try:
                async with http.get(url + "/health") as answer:
                    if answer.status == 200:
                        return await answer.json()
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.1)
    raise TimeoutError("the service did not become healthy within 60 s")


if __name__ == "__main__":
    sys.exit(main())
