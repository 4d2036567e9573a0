"""``agentrl doctor -c``: the template's self-test, with the tokens that differ."""

from pathlib import Path
from typing import Any

import pytest

from agentrl.assembly.doctor import diagnose_template
from agentrl.assembly.stalls import Finding
from agentrl.config import Config, parse_config
from agentrl.testing.tiny_model import CHAT_TEMPLATE, make_tiny_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_tiny_tokenizer().save_pretrained(path)
    return path


def finding(model: Path, **settings: Any) -> Finding:
    serve = {"parser": settings.pop("parser")} if "parser" in settings else {}
    config: Config = parse_config(
        {
            "model": {"path": str(model), **settings},
            "serve": serve,
            "tools": [{"use": "tools.calculator:calculator", "name": "calculator"}],
        },
        place="here.yaml",
    )
    return diagnose_template(config)


def test_a_sound_template_shows_its_call_format_and_where_turns_end(model: Path) -> None:
    found = finding(model)
    assert (found.level, found.fix) == ("ok", "")
    assert "is prefix-preserving; offers calculator; calls as hermes; turns end at <|im_end|>" in found.text


def test_a_rewriting_template_fails_with_the_tokens_that_differ_and_may_be_kept(model: Path, tmp_path: Path) -> None:
    counting = tmp_path / "counting.jinja"
    counting.write_text("{{- '[' ~ (messages | length) ~ ']\\n' }}" + CHAT_TEMPLATE)
    found = finding(model, chat_template=str(counting))
    assert found.level == "fail"
    assert "not prefix-preserving" in found.line()
    assert "  - @" in found.line()
    assert "  + @" in found.line()
    assert "model.template_rewrites=keep" in found.line()
    kept = finding(model, chat_template=str(counting), template_rewrites="keep")
    assert kept.level == "warn"
    assert "rewrites earlier turns" in kept.text
    assert "  - @" in kept.text


def test_a_parser_that_cannot_read_the_templates_calls_is_a_warning(model: Path) -> None:
    found = finding(model, parser="mistral")
    assert found.level == "warn"
    assert "set serve.parser=hermes" in found.fix
