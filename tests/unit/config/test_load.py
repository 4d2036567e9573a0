"""One YAML plus overrides in, a validated config or an error that names the key out."""

from pathlib import Path

import pytest

from agentrl.config import dump_config, load_config, parse_config
from agentrl.errors import ConfigError

ROOT = Path(__file__).parents[3]


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_file_and_overrides_are_combined(tmp_path: Path) -> None:
    path = write(tmp_path, "run: {name: a}\nlearn: {lr: 1e-5, groups: 4}\n")
    config = load_config(path, ["learn.lr=3e-4", "serve.n=2", "+eval.n=7", "learn.clip=[0.1,0.3]"])
    assert config.run.name == "a"
    assert config.learn.lr == 3e-4
    assert config.learn.groups == 4
    assert config.serve.n == 2
    assert config.eval.n == 7
    assert config.learn.clip == [0.1, 0.3]


def test_defaults_list_composes_files(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("serve: {n: 3, turns: 2}\n")
    path = write(tmp_path, "defaults: [base, _self_]\nserve: {n: 5}\n")
    config = load_config(path)
    assert (config.serve.n, config.serve.turns) == (5, 2)


def test_a_command_qualifies_its_own_keys(tmp_path: Path) -> None:
    path = write(tmp_path, "run: {name: a}\n")
    assert load_config(path, ["engine=sglang"], section="serve").serve.engine == "sglang"


def test_deleting_a_key_restores_its_default(tmp_path: Path) -> None:
    path = write(tmp_path, "serve: {n: 3, turns: 2}\n")
    assert load_config(path, ["~serve.n"]).serve.n == 8


@pytest.mark.parametrize(
    ("text", "override", "words"),
    [
        ("serve: {n: 2}", "serve.temprature=1", ["serve.temprature", "serve.temperature"]),
        ("rollout: {n: 2}", None, ["rollout"]),
        ("serve: {n: two}", None, ["serve.n", "two"]),
        ("serve: {n: 2}", "serve.n", ["serve.n", "key=value"]),
        ("- a\n- b", None, ["run.yaml"]),
        ("serve: {n: [}", None, ["run.yaml"]),
        ("learn: {pipeline_depth: 3, max_staleness: 1}", None, ["pipeline_depth=3", "max_staleness=1"]),
        ("queue: {max_items: 0}", None, ["queue.max_items", "greater than 0"]),
        ("serve: {tokens: 10, tokens_per_turn: 20}", None, ["tokens_per_turn=20", "tokens=10"]),
        ("env: a:B\nreward: {fn: c.py:d}", None, ["env", "reward.fn"]),
        ("serve: {weight_transport: broadcast}", None, ["weight_transport=broadcast", "engine=sglang"]),
        ("learn: {tis_cap: 2.0}", None, ["tis_cap", "recompute"]),
    ],
)
def test_bad_input_is_refused_with_the_place(tmp_path: Path, text: str, override: str | None, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text), [override] if override else [])
    for word in words:
        assert word in str(caught.value)


def test_a_missing_file_names_the_shipped_configs() -> None:
    with pytest.raises(ConfigError, match="quickstart"):
        load_config("no_such_config")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_config_loads(path: Path) -> None:
    config = load_config(path)
    assert config.max_items >= config.learn.groups * config.serve.n


def test_dump_hides_secrets_and_reads_back(tmp_path: Path) -> None:
    path = write(tmp_path, "serve: {api_key: s3cret}\nqueue: {url: 'redis://user:pa55@127.0.0.1:1/0'}\n")
    text = dump_config(load_config(path))
    assert "s3cret" not in text
    assert "pa55" not in text
    assert "<redacted>@127.0.0.1" in text
    import yaml

    assert parse_config(yaml.safe_load(text), place="dump").serve.n == 8
