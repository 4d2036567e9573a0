"""Tools that are Python: ``@tool`` functions, ``Tool`` classes, classes in verl's shape; by ``use`` or by ``class_name``."""

import difflib
import inspect
import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from agentrl.errors import ConfigError
from agentrl.plugins import installed_tools, load_installed_tool, load_object, marked_tools, tool_options
from agentrl.protocols import ToolContext
from agentrl.rollout.tool import Signature, place_of, schema_of
from agentrl.rollout.tool_entry import Entry, parsed
from agentrl.rollout.tool_instances import ClassInstance, FunctionInstance, ToolInstance, VerlInstance, VerlSchema, awaited
from agentrl.rollout.tool_limits import ToolLimits
from agentrl.rollout.tool_scopes import PerCall, PerWorker, ToolScope
from agentrl.rollout.toolbox import DeclaredTool
from agentrl.rollout.verl_shim import SHIPPED_INSTEAD, install_verl_shim, is_verl_installed


def declare_python(entry: Entry) -> list[DeclaredTool]:
    """The tool that ``use`` or ``class_name`` names; every marked one where it names a file or module.

    Raises:
        ConfigError: nothing there, or it is no tool.
    """
    reference = str(entry.given.get("use") or entry.given.get("class_name"))
    is_whole_file = reference.endswith(".py")
    try:
        if is_whole_file:
            entry.refuse(
                "name", "tool_schema", "config", why=f"`{reference}` may hold several tools. Name one: `{reference}:function`"
            )
            marked = marked_tools(reference, root=entry.project)
            return [_declare(entry, f"{reference}:{name}", target) for name, target in marked.items()]
        return [_declare(entry, reference, _load(entry, reference))]
    except ConfigError as error:
        if str(error).startswith(entry.at):
            raise
        raise ConfigError(f"{entry.at}: {error}") from error


def _load(entry: Entry, reference: str) -> Any:
    if "class_name" not in entry.given and re.fullmatch(r"[\w-]+", reference):
        return load_installed_tool(reference)
    if reference in SHIPPED_INSTEAD and not is_verl_installed():
        reference = SHIPPED_INSTEAD[reference]
    try:
        return load_object(reference, root=entry.project)
    except ConfigError as error:
        if not needs_verl(error) or not install_verl_shim():
            raise
    return load_object(reference, root=entry.project)


def needs_verl(error: BaseException) -> bool:
    """Whether code did not import because verl is not installed."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ModuleNotFoundError) and (cause.name or "").split(".")[0] == "verl":
            return True
        cause = cause.__cause__
    return False


def _declare(entry: Entry, reference: str, target: Any) -> DeclaredTool:
    if inspect.isclass(target) and all(callable(getattr(target, m, None)) for m in ("create", "execute", "release")):
        return _declare_verl(entry, reference, target)
    if inspect.isclass(target) and callable(getattr(target, "call", None)):
        return _declare_class(entry, reference, target)
    if inspect.isroutine(target):
        return _declare_function(entry, reference, target)
    raise ConfigError(
        f"{entry.at}: `{reference}` is neither a function nor a class with `call` (or verl's `create`, `execute`, `release`)"
    )


def _name(entry: Entry, target: Any) -> str:
    given = entry.given.get("name") or tool_options(target).name
    in_schema = ((entry.given.get("tool_schema") or {}).get("function") or {}).get("name")
    if given or in_schema:
        return entry.named(str(given or in_schema))
    if inspect.isclass(target):
        own = target.__dict__.get("name")
        return entry.named(own if isinstance(own, str) else re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", target.__name__).lower())
    return entry.named(str(getattr(target, "__name__", "tool")))


def _declare_function(entry: Entry, reference: str, target: Any) -> DeclaredTool:
    name, options = _name(entry, target), tool_options(target)
    entry.refuse("scope", why=f"`{reference}` is a function and holds nothing between calls")
    if entry.config(reference, name):
        raise ConfigError(f"{entry.at}: `{reference}` is a function and takes no `config`; write a Tool class for settings")
    signature = _signature(entry, target, name, "", is_method=False)
    is_idempotent = entry.is_idempotent(options.idempotent)
    return DeclaredTool(
        schema=signature.schema,
        arguments=signature.arguments,
        limits=entry.limits(options, is_idempotent=is_idempotent),
        reference=reference,
        make=lambda context: FunctionInstance(target, signature, context),
        oracle=bool(entry.given.get("oracle", options.oracle)),
        is_stateful=False,
        is_idempotent=is_idempotent,
        kind="function",
        place=_place(reference, target),
    )


def _declare_class(entry: Entry, reference: str, target: Any) -> DeclaredTool:
    name, options = _name(entry, target), tool_options(target)
    config = entry.config(reference, name)
    if config.pop("type", "native") != "native":
        raise ConfigError(f"{entry.at}: a class takes `type: native` only; write MCP servers under `mcp:`")
    model: Any = getattr(target, "Config", None)
    arguments = config
    if isinstance(model, type) and issubclass(model, BaseModel):
        arguments = {"config": parsed(model, config, f"{entry.at}: config")}

    def construct() -> Any:
        return target(**arguments)

    try:
        construct()  # a setting that does not fit is found at start-up, not in the first rollout
    except TypeError as error:
        known = [p for p in inspect.signature(target).parameters if p not in ("args", "kwargs")]
        near = {k: difflib.get_close_matches(k, known, n=1) for k in config if k not in known}
        hints = "".join(f" Did you mean `{n[0]}` for `{k}`?" for k, n in near.items() if n)
        raise ConfigError(
            f"{entry.at}: config does not fit {reference}: {error}. It takes: {', '.join(known) or 'nothing'}.{hints}"
        ) from error
    summary = " ".join((inspect.getdoc(target) or "").split("\n\n")[0].split())
    signature = _signature(entry, target.call, name, summary, is_method=True)
    is_idempotent = entry.is_idempotent(options.idempotent)
    scope = entry.scope("call", "trajectory", "worker", why="it says how long an object lives")
    shared = PerWorker(name, construct, lambda made, context: ClassInstance(made, signature, context))

    def instance(context: ToolContext) -> ToolInstance:
        if scope == "worker":
            return shared.of(context)
        if scope == "call":
            return PerCall(name, lambda: ClassInstance(construct(), signature, context))
        return ClassInstance(construct(), signature, context)

    async def shutdown() -> None:
        await shared.aclose()
        if inspect.ismethod(end := getattr(target, "aclose", None)):
            await awaited(end())

    return DeclaredTool(
        schema=signature.schema,
        arguments=signature.arguments,
        limits=_class_limits(entry, target, is_idempotent, scope),
        reference=reference,
        make=instance,
        oracle=bool(entry.given.get("oracle", options.oracle)),
        is_stateful=scope == "trajectory",
        is_idempotent=is_idempotent,
        kind="class",
        place=_place(reference, target),
        shutdown=shutdown,
    )


def _declare_verl(entry: Entry, reference: str, target: Any) -> DeclaredTool:
    options = tool_options(target)
    config = entry.config(reference, _name(entry, target))
    if config.get("type", "native") != "native":
        raise ConfigError(f"{entry.at}: a class takes `type: native` only; write MCP servers under `mcp:`")
    given = entry.given.get("tool_schema")
    try:
        made = target(config=config, tool_schema=VerlSchema(given) if given else None)
    except Exception as error:
        raise ConfigError(f"{entry.at}: {reference} could not be made: {type(error).__name__}: {error}") from error
    if not given and hasattr(made, "get_openai_tool_schema"):
        own = made.get_openai_tool_schema()
        given = own.model_dump(exclude_none=True) if hasattr(own, "model_dump") else own
    if not given:
        raise ConfigError(f"{entry.at}: {reference} brings no schema; give `tool_schema:`")
    schema = entry.schema(given, str(entry.given.get("name") or ""))
    is_idempotent = entry.is_idempotent(options.idempotent)
    scope = entry.scope(
        "call", "trajectory", why="an object in verl's shape is one for the process; it says how often it creates"
    )

    def instance(context: ToolContext) -> ToolInstance:
        return PerCall(schema.name, lambda: VerlInstance(made, context)) if scope == "call" else VerlInstance(made, context)

    return DeclaredTool(
        schema=schema,
        arguments=entry.arguments(schema, allow_extra=True),
        limits=_class_limits(entry, target, is_idempotent, scope),
        reference=reference,
        make=instance,
        oracle=bool(entry.given.get("oracle", options.oracle)),
        is_stateful=scope == "trajectory",
        is_idempotent=is_idempotent,
        kind="verl",
        place=_place(reference, target),
        shutdown=getattr(made, "aclose", None),
    )


def _class_limits(entry: Entry, target: Any, is_idempotent: bool, scope: ToolScope) -> ToolLimits:
    limits = entry.limits(tool_options(target), is_idempotent=is_idempotent)
    if scope == "trajectory" and limits.cache and limits.cache.scope == "process":
        raise ConfigError(
            f"{entry.at}: a tool with a state of its own cannot share answers between trajectories. Say `scope: trajectory`"
        )
    return limits


def _signature(entry: Entry, function: Any, name: str, summary: str, *, is_method: bool) -> Signature:
    """From the signature; a ``tool_schema`` in the entry replaces what the model sees, if it fits."""
    signature = schema_of(function, name=name, description=summary, is_method=is_method)
    given: Mapping[str, Any] | None = entry.given.get("tool_schema")
    if not given:
        return signature
    schema = entry.schema(given, str(entry.given.get("name") or ""))
    own = set(signature.schema.parameters["properties"])
    foreign = sorted(set(schema.parameters.get("properties", {})) - own)
    missing = sorted(set(signature.schema.parameters.get("required", [])) - set(schema.parameters.get("properties", {})))
    if foreign or missing:
        raise ConfigError(
            f"{entry.at}: tool_schema of `{name}` does not fit the function: "
            f"{'unknown to it: ' + ', '.join(foreign) if foreign else ''}{'; ' if foreign and missing else ''}"
            f"{'required by it: ' + ', '.join(missing) if missing else ''}. Remove `tool_schema:` to use the signature, or rename"
        )
    return Signature(schema, entry.arguments(schema, allow_extra=False), signature.context_parameter)


def _place(reference: str, target: Any) -> str:
    point = installed_tools().get(reference)
    origin = f" (entry point {point.value})" if point else ""
    if inspect.isclass(target):
        try:
            return f"{inspect.getsourcefile(target)}:{inspect.getsourcelines(target)[1]}{origin}"
        except (OSError, TypeError):
            return f"{target.__module__}.{target.__qualname__}{origin}"
    return f"{place_of(target)}{origin}"
