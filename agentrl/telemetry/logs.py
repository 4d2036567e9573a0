"""Log set-up of every process: one line per record, the process' role in front."""

import logging
import sys


def setup_logging(role: str, level: str) -> None:
    """Log to stderr as ``time role level module: message``; noisy libraries speak only of warnings."""
    logging.basicConfig(
        level=level,
        stream=sys.stderr,
        force=True,
        format=f"%(asctime)s {role} %(levelname)s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
    )
    for noisy in (
        "httpx",
        "httpx2",
        "httpcore",
        "mcp",
        "uvicorn.access",
        "asyncio",
        "urllib3",
        "transformers",
        "torch",
        "filelock",
    ):
        logging.getLogger(noisy).setLevel(logging.WARNING)
