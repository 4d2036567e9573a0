"""What the documents name exists: links, files, commands, settings."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from agentrl.cli.main import app
from agentrl.config import load_config

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted(ROOT.glob("SECURITY.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_and_named_files_exist(page: Path) -> None:
    text = page.read_text()
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text)
    named = re.findall(r"`((?:tests|agentrl|bench|docs|configs|tools|envs)/[\w./{},*-]+\.(?:py|yaml|md|sh))`", text)
    missing = [link for link in links if not (page.parent / link).exists()]
    missing += [name for pattern in named for name in expand(pattern) if not any(ROOT.glob(name))]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_in_shell_blocks_exist(page: Path) -> None:
    runner = CliRunner()
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", page.read_text(), re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    for line in lines:
        match = re.match(r"(?:\.venv/bin/)?agentrl ((?:data |config |tools )?[\w-]+)", line)
        if match:
            result = runner.invoke(app, [*match[1].split(), "--help"])
            assert result.exit_code == 0, f"{page.name}: {line}: {result.output}"
        if line.startswith("make "):
            targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert line.split()[1] in targets, line


def test_settings_named_in_the_readme_exist() -> None:
    text = (ROOT / "README.md").read_text()
    for setting in re.findall(r"`((?:serve|learn|queue|reward|run|model|data|eval|sft)\.[a-z_]+)=", text):
        section, key = setting.split(".")
        assert hasattr(getattr(load_config(None), section), key), setting


def expand(pattern: str) -> list[str]:
    """``a/{b,c}.py`` as ``a/b.py`` and ``a/c.py``."""
    match = re.search(r"\{([^}]*)\}", pattern)
    return [pattern.replace(match[0], part) for part in match[1].split(",")] if match else [pattern]
