"""The languages beside Python: what has to be installed, how a program is compiled and started, what its jail must show.

A compiled program is two runs: one compiles and its artifact is fetched, one runs with the artifact as an input file. So each
step has its own jail, deadline and outcome, and the program cannot touch the compiler's.
"""

import functools
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_SEARCH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/go/bin"
_C_DIRECTORIES = ("/usr/include", "/usr/local/include", "/usr/libexec")


@dataclass(frozen=True, slots=True, kw_only=True)
class Language:
    """One language. Without ``command`` it is Python, run in the fork server's own interpreter."""

    name: str
    needs: str = ""
    """The program that must be installed."""
    source: str = "main.py"
    command: tuple[str, ...] = ()
    compile: tuple[str, ...] = ()
    artifact: str = ""
    """What compiling makes, below the working directory."""
    bound_address_space: bool = True
    """False for run times that reserve far more than they use: only the memory of the processes together is bounded."""
    directories: tuple[str, ...] = ()
    """What the jail must show beyond libraries and programs."""


_ALL = (
    Language(name="python"),
    Language(name="bash", needs="bash", source="main.sh", command=("/bin/bash", "main.sh")),
    Language(
        name="nodejs",
        needs="node",
        source="main.js",
        command=("node", "main.js"),
        bound_address_space=False,
        directories=("/usr/share/nodejs", "/usr/share/node_modules"),
    ),
    Language(
        name="c",
        needs="gcc",
        source="main.c",
        compile=("gcc", "-std=c17", "-O2", "main.c", "-o", "main.bin", "-lm", "-pthread"),
        command=("./main.bin",),
        artifact="main.bin",
        directories=_C_DIRECTORIES,
    ),
    Language(
        name="cpp",
        needs="g++",
        source="main.cpp",
        compile=("g++", "-std=c++17", "-O2", "main.cpp", "-o", "main.bin", "-pthread"),
        command=("./main.bin",),
        artifact="main.bin",
        directories=_C_DIRECTORIES,
    ),
    Language(
        name="go",
        needs="go",
        source="main.go",
        compile=(
            "env", "GOCACHE=/tmp/go", "GOPATH=/tmp/gopath", "GO111MODULE=off", "CGO_ENABLED=0", "GOMAXPROCS=2",
            "go", "build", "-o", "main.bin", "main.go",
        ),
        command=("./main.bin",),
        artifact="main.bin",
        bound_address_space=False,
        directories=("/usr/local/go", "/usr/share/go-*", "/usr/lib/go*"),
    ),
    Language(name="perl", needs="perl", source="main.pl", command=("perl", "main.pl"), directories=("/usr/share/perl*",)),
    Language(name="ruby", needs="ruby", source="main.rb", command=("ruby", "main.rb"), directories=("/usr/share/ruby*",)),
    Language(name="lua", needs="lua", source="main.lua", command=("lua", "main.lua")),
)  # fmt: skip
_ALIASES = {"py": "python", "python3": "python", "sh": "bash", "node": "nodejs", "javascript": "nodejs", "c++": "cpp"}


@functools.cache
def installed() -> Mapping[str, Language]:
    """The languages this machine can run, by name. Looked up once: the jails are built for them."""
    return {language.name: language for language in _ALL if not language.needs or shutil.which(language.needs, path=_SEARCH)}


def find(name: str) -> Language:
    """An installed language by name or alias.

    Raises:
        ValueError: unknown or not installed; the text says what there is.
    """
    wanted = _ALIASES.get(name.lower(), name.lower())
    if wanted in installed():
        return installed()[wanted]
    supported = ", ".join(installed())
    missing = next((language for language in _ALL if language.name == wanted), None)
    if missing is not None:
        raise ValueError(f"language {wanted!r} needs {missing.needs}, which is not installed here; supported: {supported}")
    raise ValueError(f"language {name[:40]!r} is not supported; supported: {supported}")


def directories(languages: Sequence[Language]) -> list[str]:
    """What the jails must show for them, as far as it exists."""
    import glob

    found = {path for language in languages for pattern in language.directories for path in glob.glob(pattern)}
    return sorted(path for path in found if os.path.isdir(path))
