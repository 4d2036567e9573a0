"""How users' code is marked and found: the ``@tool`` decorator, ``load_object`` and the entry points of packages.

A name such as ``tools.calculator:calculator`` is looked for in three places, in this order: the user's project (the
working directory), the tools and environments that ship with agentrl, and the installed packages. Files of the first
two are loaded by path under private module names, so a user's ``tools`` and ours never collide. A bare name such as
``weather`` is an entry point of the group ``agentrl.tools``, which an installed package declares.
"""

import difflib
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeVar, overload

from agentrl.errors import ConfigError

F = TypeVar("F", bound=Callable[..., Any])

TOOL_OPTIONS_ATTRIBUTE = "__agentrl_tool__"
SHIPPED_KINDS = ("tools", "envs", "configs")
TOOL_ENTRY_POINTS = "agentrl.tools"

Truncate = Literal["middle", "left", "right"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolOptions:
    """What ``@tool`` was given; None leaves the choice to the YAML's entry or its defaults."""

    name: str | None = None
    timeout_s: float | None = None
    concurrency: int | None = None
    output_tokens: int | None = None
    truncate: Truncate | None = None
    oracle: bool = False
    idempotent: bool | None = None


@overload
def tool(function: F, /) -> F: ...
@overload
def tool(
    *,
    name: str | None = None,
    timeout_s: float | None = None,
    concurrency: int | None = None,
    output_tokens: int | None = None,
    truncate: Truncate | None = None,
    oracle: bool = False,
    idempotent: bool | None = None,
) -> Callable[[F], F]: ...
def tool(
    function: F | None = None,
    /,
    *,
    name: str | None = None,
    timeout_s: float | None = None,
    concurrency: int | None = None,
    output_tokens: int | None = None,
    truncate: Truncate | None = None,
    oracle: bool = False,
    idempotent: bool | None = None,
) -> F | Callable[[F], F]:
    """Mark a function as a tool. It stays an ordinary function: call it, test it, import it.

    The schema comes from the type hints and the Google-style docstring. A keyword parameter named ``ctx`` receives the
    ``ToolContext`` and is not part of the schema. A plain (not async) function runs in a thread.

    Args:
        function: given when the decorator is used bare.
        name: what the model calls; the function's name by default.
        timeout_s: deadline of one call, in seconds.
        concurrency: calls at once in one process.
        output_tokens: tokens of one result; longer ones are cut.
        truncate: the side that is cut away.
        oracle: the tool may see the ground truth.
        idempotent: asking twice does no more than asking once, and equal arguments give equal answers: the tool may be
            retried and cached.
    """
    options = ToolOptions(
        name=name,
        timeout_s=timeout_s,
        concurrency=concurrency,
        output_tokens=output_tokens,
        truncate=truncate,
        oracle=oracle,
        idempotent=idempotent,
    )

    def mark(target: F) -> F:
        setattr(target, TOOL_OPTIONS_ATTRIBUTE, options)
        return target

    return mark if function is None else mark(function)


def tool_options(target: Any) -> ToolOptions:
    """The options of a marked function or class; defaults where it is not marked."""
    options = getattr(target, TOOL_OPTIONS_ATTRIBUTE, None)
    return options if isinstance(options, ToolOptions) else ToolOptions()


def installed_tools() -> dict[str, EntryPoint]:
    """Tools that installed packages declare under the entry-point group ``agentrl.tools``, by name."""
    return {point.name: point for point in entry_points(group=TOOL_ENTRY_POINTS)}


def load_installed_tool(name: str) -> Any:
    """The tool that an installed package declares under ``name``.

    Raises:
        ConfigError: no package declares it, or it does not import.
    """
    installed = installed_tools()
    if name not in installed:
        near = difflib.get_close_matches(name, installed, n=1)
        hint = f"Did you mean `{near[0]}`?" if near else f"Declared: {', '.join(installed) or 'none'}."
        raise ConfigError(
            f"no installed package declares a tool `{name}` (entry-point group {TOOL_ENTRY_POINTS}). {hint} "
            "For a function of your own write `module:function` or `path/to/file.py:function`"
        )
    try:
        return installed[name].load()
    except Exception as error:
        raise ConfigError(f"tool `{name}` ({installed[name].value}) does not import: {type(error).__name__}: {error}") from error


def marked_tools(source: str, *, root: Path | None = None) -> dict[str, Any]:
    """Everything that ``@tool`` marks in a file or module, in the order it is defined there.

    Raises:
        ConfigError: nothing there, it does not import, or it marks nothing.
    """
    project = (root or Path.cwd()).resolve()
    module = _load_file_reference(source, project) if _is_path(source) else _load_module_reference(source, project)
    marked = {
        name: value
        for name, value in vars(module).items()
        if TOOL_OPTIONS_ATTRIBUTE in getattr(value, "__dict__", {}) and getattr(value, "__module__", "") == module.__name__
    }
    if not marked:
        raise ConfigError(f"{module.__file__} marks nothing with @tool. Mark its functions, or name one: `{source}:function`")
    return marked


def shipped_dir(kind: str) -> Path:
    """The folder of the shipped ``tools``, ``envs`` or ``configs``: inside the wheel, or at the root of a checkout.

    Raises:
        ConfigError: ``kind`` is none of them, or the installation does not hold the folder.
    """
    if kind not in SHIPPED_KINDS:
        raise ConfigError(f"nothing is shipped under {kind!r}; the kinds are {', '.join(SHIPPED_KINDS)}")
    package = Path(__file__).resolve().parent
    candidates = [package / "_shipped" / kind]
    if (package.parent / "pyproject.toml").is_file():  # a checkout; site-packages has no pyproject.toml
        candidates.append(package.parent / kind)
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
    looked = ", ".join(str(c) for c in candidates)
    raise ConfigError(f"this installation holds no shipped {kind}. Looked in: {looked}. Reinstall agentrl")


def load_object(reference: str, *, root: Path | None = None) -> Any:
    """The object that ``reference`` names.

    Args:
        reference: ``tools.calculator:calculator``, ``envs/gsm8k.py:compute_score`` or ``package.module.Class``.
        root: the user's project; the working directory by default.

    Raises:
        ConfigError: nothing there (says where it looked), or the file does not import.
    """
    project = (root or Path.cwd()).resolve()
    source, attribute = _split(reference)
    module = _load_file_reference(source, project) if _is_path(source) else _load_module_reference(source, project)
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            names = [n for n in vars(found) if not n.startswith("_")] if hasattr(found, "__dict__") else []
            near = difflib.get_close_matches(part, names, n=1)
            hint = f" Did you mean `{near[0]}`?" if near else ""
            raise ConfigError(f"`{reference}`: {module.__file__} has no `{part}`.{hint}")
        found = getattr(found, part)
    return found


def _split(reference: str) -> tuple[str, str]:
    source, colon, attribute = reference.rpartition(":")
    if not colon and not _is_path(reference):
        source, _, attribute = reference.rpartition(".")
    if not source or not attribute:
        raise ConfigError(f"`{reference}` names no object. Write `package.module:name` or `path/to/file.py:name`")
    return source, attribute


def _is_path(source: str) -> bool:
    return source.endswith(".py") or "/" in source


def _load_file_reference(source: str, project: Path) -> ModuleType:
    path = Path(source).expanduser()
    candidates = [path if path.is_absolute() else project / path]
    if not path.is_absolute() and path.parts[0] in SHIPPED_KINDS:
        candidates.extend(_shipped_candidates(path.parts[0], path.relative_to(path.parts[0])))
    for candidate in candidates:
        if candidate.is_file():
            return _load_path(candidate, project)
    raise ConfigError(
        f"no file `{source}`. Looked in: {', '.join(str(c) for c in candidates)}. "
        "Run from the project's root, or give an absolute path"
    )


def _load_module_reference(source: str, project: Path) -> ModuleType:
    parts = source.split(".")
    if not all(part.isidentifier() for part in parts):
        raise ConfigError(f"`{source}` is not a module name. Write `package.module:name` or `path/to/file.py:name`")
    relative = Path(*parts)
    candidates = [project / relative.with_suffix(".py"), project / relative / "__init__.py"]
    if parts[0] in SHIPPED_KINDS and len(parts) > 1:
        inner = Path(*parts[1:])
        for option in (inner.with_suffix(".py"), inner / "__init__.py"):
            candidates.extend(_shipped_candidates(parts[0], option))
    for candidate in candidates:
        if candidate.is_file() and not _is_installed_package_file(candidate):
            return _import_project_package(source, candidate, project) or _load_path(candidate, project)
    try:
        return importlib.import_module(source)
    except ModuleNotFoundError as error:
        if error.name is None or not (source == error.name or source.startswith(error.name + ".")):
            raise ConfigError(f"`{source}` does not import: no module named {error.name!r}, which it needs") from error
        looked = ", ".join(str(c) for c in candidates)
        raise ConfigError(
            f"no module `{source}`. Looked in: {looked}, installed packages. Run from the project's root, or check the spelling"
        ) from error
    except Exception as error:
        raise ConfigError(f"`{source}` does not import: {type(error).__name__}: {error}") from error


def _import_project_package(source: str, file: Path, project: Path) -> ModuleType | None:
    """Import by name where the user's folder is a real package, so that relative imports in it work."""
    if not file.is_relative_to(project) or not (project / source.split(".")[0] / "__init__.py").is_file():
        return None
    if str(project) not in sys.path:
        sys.path.insert(0, str(project))
    try:
        module = importlib.import_module(source)
    except ModuleNotFoundError as error:
        if error.name is not None and (source == error.name or source.startswith(error.name + ".")):
            return None  # another package of this name was imported first
        raise ConfigError(f"{file} does not import: no module named {error.name!r}, which it needs") from error
    except Exception as error:
        raise ConfigError(f"{file} does not import: {type(error).__name__}: {error}") from error
    return module if module.__file__ and Path(module.__file__).resolve() == file.resolve() else None


def _is_installed_package_file(path: Path) -> bool:
    # `agentrl.x:y` with a checkout as working directory must stay the one imported module, not a second copy of it.
    return path.resolve().is_relative_to(Path(__file__).resolve().parent) and "_shipped" not in path.parts


def _shipped_candidates(kind: str, relative: Path) -> list[Path]:
    try:
        return [shipped_dir(kind) / relative]
    except ConfigError:
        return []


def _load_path(path: Path, project: Path) -> ModuleType:
    """Import one file under a private name; the same file is the same module however it was named."""
    path = path.resolve()
    name = f"_agentrl_plugin_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:10]}"
    if name in sys.modules:
        return sys.modules[name]
    if path.is_relative_to(project) and str(project) not in sys.path:
        sys.path.insert(0, str(project))  # a user's file may import its neighbours
    spec = importlib.util.spec_from_file_location(
        name, path, submodule_search_locations=[str(path.parent)] if path.name == "__init__.py" else None
    )
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} cannot be loaded as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pydantic look their module up while it loads
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ConfigError(f"{path} does not import: {type(error).__name__}: {error}") from error
    return module
