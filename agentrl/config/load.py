"""YAML file plus ``key=value`` overrides in, validated ``Config`` out. Hydra composes, pydantic judges."""

import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from agentrl.config.schema import Config
from agentrl.errors import ConfigError

SECTIONS = tuple(Config.model_fields)


# `${env:NAME}` in a tool list is filled in where it is used, so that no secret reaches the resolved config.
OmegaConf.register_new_resolver("env", lambda name: f"${{env:{name}}}", replace=True)


def load_config(path: str | Path | None, overrides: Sequence[str] = (), *, section: str | None = None) -> Config:
    """Compose and validate one run's config.

    Args:
        path: YAML file; its ``defaults:`` list names files beside it. None starts from the defaults.
        overrides: ``a.b=value``, ``+a.b=value``, ``++a.b=value``, ``~a.b`` in Hydra's grammar. A key of the schema that the
            file leaves out may be set without ``+``.
        section: a command's own section; ``engine=sglang`` then means ``<section>.engine=sglang``.

    Raises:
        ConfigError: naming the file, the key, and the nearest valid key.
    """
    prepared = [_qualified(override, section) for override in overrides]
    place = str(path) if path else "defaults"
    try:
        raw = _compose(find_config(path), prepared) if path else _compose_overrides(prepared)
    except (
        HydraException,
        OmegaConfBaseException,
        yaml.YAMLError,
        ValueError,
        TypeError,
        OSError,
        RecursionError,
    ) as error:
        # The last four come from inside these libraries: bytes that are not UTF-8, keys of odd types, nesting without end.
        raise ConfigError(f"{place}: {_first_cause(error) or type(error).__name__}") from error
    return parse_config(raw, place=place)


def parse_config(raw: Any, *, place: str) -> Config:
    """Validate plain data as a ``Config``; ``place`` names its origin in errors."""
    if not isinstance(raw, dict):
        raise ConfigError(f"{place}: the file must hold a mapping of sections ({', '.join(SECTIONS)}), not {type(raw).__name__}")
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{place}: {line}" for line in _explain(error))) from error


def find_config(path: str | Path) -> Path:
    """The file itself, or a shipped config of that name."""
    from agentrl.plugins import shipped_dir  # only when a file is really looked for

    given = Path(path)
    shipped = shipped_dir("configs")
    candidates = [given, shipped / given, shipped / given.name, shipped / f"{given.name}.yaml"]
    for candidate in candidates:
        if candidate.is_file():
            return candidate.resolve()
    names = sorted(p.stem for p in shipped.glob("*.yaml"))
    raise ConfigError(f"no config file {str(path)!r}. Give a path, or one of the shipped configs: {', '.join(names)}")


def dump_config(config: Config) -> str:
    """YAML of every value, defaults included, secrets replaced."""
    data = config.model_dump(mode="json")
    for section, key in (("serve", "api_key"), ("serve", "admin_key")):
        if data[section][key]:
            data[section][key] = "<redacted>"
    data["queue"]["url"] = re.sub(r"(?<=//)[^@/]*@", "<redacted>@", data["queue"]["url"])
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


def _qualified(override: str, section: str | None) -> str:
    match = re.match(r"^([+~]{0,2})([A-Za-z_][\w.]*)(.*)$", override, re.DOTALL)
    if match is None or ("=" not in match[3] and match[1] != "~"):
        raise ConfigError(f"override {override!r} is not key=value. Write for example learn.lr=1e-5")
    prefix, key, rest = match.groups()
    if section and "." not in key and key not in SECTIONS:
        key = f"{section}.{key}"
    return f"{prefix or '++'}{key}{rest}" if prefix != "~" else f"~{key}{rest}"


def _compose(file: Path, overrides: Sequence[str]) -> Any:
    with initialize_config_dir(config_dir=str(file.parent), version_base=None):
        return OmegaConf.to_container(compose(config_name=file.stem, overrides=list(overrides)), resolve=True)


def _compose_overrides(overrides: Sequence[str]) -> Any:
    with initialize_config_dir(config_dir=str(Path.cwd()), version_base=None):
        return OmegaConf.to_container(compose(config_name=None, overrides=list(overrides)), resolve=True)


def _first_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip()


def _explain(error: ValidationError) -> Iterable[str]:
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            nearest = difflib.get_close_matches(where, list(_keys(Config)), n=2, cutoff=0.5) or difflib.get_close_matches(
                where.rsplit(".", 1)[-1], [k.rsplit(".", 1)[-1] for k in _keys(Config)], n=2, cutoff=0.5
            )
            hint = (
                f"Did you mean {' or '.join(f'`{n}`' for n in nearest)}?" if nearest else f"Sections are {', '.join(SECTIONS)}."
            )
            yield f"unknown key `{where}`. {hint}"
        else:
            message = problem["msg"].removeprefix("Value error, ")
            shown = "" if problem["type"] == "value_error" else f" (got {problem['input']!r})"
            yield f"{f'`{where}`: ' if where else ''}{message}{shown}"


def _keys(model: type[BaseModel], prefix: str = "") -> Iterable[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys(field.annotation, f"{prefix}{name}.")
