import sys
from pathlib import Path

import pytest

from agentrl.errors import ConfigError
from agentrl.plugins import ToolOptions, load_object, shipped_dir, tool, tool_options


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture(autouse=True)
def _unchanged_sys_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_module_path_and_dotted_spellings_name_the_same_object(tmp_path: Path) -> None:
    write(tmp_path / "mine" / "scoring.py", "class Score:\n    def of(self): return 1\n")
    by_module = load_object("mine.scoring:Score", root=tmp_path)
    assert by_module is load_object("mine/scoring.py:Score", root=tmp_path)
    assert by_module is load_object("mine.scoring.Score", root=tmp_path)
    assert load_object("mine.scoring:Score.of", root=tmp_path) is by_module.of


def test_the_users_file_wins_over_the_shipped_one_of_the_same_name(tmp_path: Path) -> None:
    shipped = load_object("tools.calculator:calculator", root=tmp_path)
    assert Path(shipped.__code__.co_filename) == shipped_dir("tools") / "calculator.py"
    write(tmp_path / "tools" / "calculator.py", "def calculator(): return 'mine'\n")
    assert load_object("tools.calculator:calculator", root=tmp_path)() == "mine"
    assert "tools" not in sys.modules or not str(sys.modules["tools"].__file__).startswith(str(tmp_path))


def test_a_users_file_may_import_its_neighbours_and_a_package_its_relatives(tmp_path: Path) -> None:
    write(tmp_path / "neighbour_of_plugin.py", "VALUE = 3\n")
    write(tmp_path / "loose.py", "from neighbour_of_plugin import VALUE\n")
    assert load_object("loose:VALUE", root=tmp_path) == 3
    write(tmp_path / "plugin_package" / "__init__.py", "")
    write(tmp_path / "plugin_package" / "a.py", "X = 4\n")
    write(tmp_path / "plugin_package" / "b.py", "from .a import X\n")
    assert load_object("plugin_package.b:X", root=tmp_path) == 4


def test_installed_packages_are_found_last(tmp_path: Path) -> None:
    assert load_object("json.decoder:JSONDecoder", root=tmp_path).__name__ == "JSONDecoder"
    assert load_object("agentrl.errors:ConfigError", root=Path(__file__).parents[2]) is ConfigError


def test_a_missing_module_error_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no module `my\.tools`") as caught:
        load_object("my.tools:f", root=tmp_path)
    assert str(tmp_path / "my" / "tools.py") in str(caught.value)
    assert "installed packages" in str(caught.value)
    with pytest.raises(ConfigError, match=r"no file `x/y\.py`"):
        load_object("x/y.py:f", root=tmp_path)


def test_a_missing_attribute_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path / "near.py", "def compute_score(): ...\n")
    with pytest.raises(ConfigError, match="Did you mean `compute_score`"):
        load_object("near:compute_scores", root=tmp_path)


def test_an_error_inside_the_file_is_told_from_a_missing_file(tmp_path: Path) -> None:
    write(tmp_path / "broken.py", "import no_such_module_anywhere\n")
    with pytest.raises(ConfigError, match=r"broken\.py does not import: ModuleNotFoundError: .*no_such_module_anywhere"):
        load_object("broken:f", root=tmp_path)
    write(tmp_path / "broken.py", "f = 1\n")
    assert load_object("broken:f", root=tmp_path) == 1  # the failed import left nothing behind


@pytest.mark.parametrize("reference", ["", "calculator", ":f", "a.b:", "tools/calculator.py", "../x y:z"])
def test_what_names_no_object_is_refused(reference: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        load_object(reference, root=tmp_path)


def test_an_unknown_kind_of_shipped_file_is_refused() -> None:
    assert (shipped_dir("configs") / "tools").is_dir()
    with pytest.raises(ConfigError, match="tools, envs, configs"):
        shipped_dir("tool")


def test_the_decorator_leaves_the_function_alone() -> None:
    @tool
    async def bare(x: int) -> int:
        return x

    @tool(name="other", timeout_s=2, oracle=True)
    def plain(x: int) -> int:
        return x + 1

    assert tool_options(bare) == ToolOptions()
    assert tool_options(plain) == ToolOptions(name="other", timeout_s=2, oracle=True)
    assert plain(1) == 2
    assert tool_options(len) == ToolOptions()
