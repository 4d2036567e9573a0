"""Every example of docs/tools.md works, through the commands that the page names."""

import json
import re
import sys
import threading
from collections.abc import Generator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from agentrl.cli.main import _exit_code, app  # pyright: ignore[reportPrivateUsage]

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "tools.md").read_text()
EXAMPLES = dict(re.findall(r"```(?:python|yaml)\n# file: (\S+)\n(.*?)```", PAGE, re.DOTALL))


class Rates(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        known = self.path.startswith("/rates/USD")
        body = (
            {"rate": {"text": f"1.08 {self.path} {self.headers['Authorization']}"}} if known else {"detail": "no such currency"}
        )
        data = json.dumps(body).encode()
        self.send_response(200 if known else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        return


@pytest.fixture(scope="module")
def rates() -> Generator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Rates)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    for name, text in EXAMPLES.items():
        (folder / name).write_text(text)
    return folder


class Tools:
    """``agentrl tools …`` in the project's folder: exit code, stdout, stderr."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *words: str) -> tuple[int, str, str]:
        self._capsys.readouterr()
        code = _exit_code(lambda: app(["tools", *words], standalone_mode=False))
        out, err = self._capsys.readouterr()
        return code, out, err


@pytest.fixture
def tools(project: Path, rates: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Generator[Tools]:
    monkeypatch.chdir(project)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("RATES_URL", rates)
    monkeypatch.setenv("RATES_KEY", "sesame-7")
    yield Tools(capsys)
    for name in [n for n in sys.modules if n.split(".")[0] == "verl"]:
        del sys.modules[name]


def test_the_page_has_an_example_of_every_kind() -> None:
    assert set(EXAMPLES) == {
        "letters.py", "function.yaml", "notebook.py", "class.yaml", "worker.yaml", "adder.py", "verl.yaml", "http.yaml", "notes_server.py", "mcp.yaml",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("file", "name", "arguments", "answer"),
    [
        ("function.yaml", "count_letter", ["word=strawberry", "letter=r"], "3"),
        ("class.yaml", "notebook", ['{"note": "milk"}'], "written: 1 notes"),
        ("worker.yaml", "notebook_of_all", ['{"note": "milk"}'], "noted: 1 notes"),
        ("verl.yaml", "add", ["x=5"], "5"),
        ("http.yaml", "rates", ["currency=USD", "days=3"], "1.08 /rates/USD?days=3 Bearer <redacted>"),
        ("mcp.yaml", "notes_lookup", ["key=pi"], "3.14"),
    ],
)
def test_each_example_answers_a_call(tools: Tools, file: str, name: str, arguments: list[str], answer: str) -> None:
    code, out, err = tools("call", name, *arguments, "-c", file)
    assert (code, out) == (0, f"{answer}\n"), err


@pytest.mark.parametrize(
    ("file", "words", "text"),
    [
        ("function.yaml", ["count_letter", '{"wrd": "a", "letter": "a"}'], "'wrd' was unexpected (did you mean 'word'?)"),
        ("http.yaml", ["rates", "currency=XXX"], "Error: no such currency"),
        ("mcp.yaml", ["notes_lookup", "key=e"], "no note e"),
    ],
)
def test_the_models_errors_are_shown_as_it_reads_them(tools: Tools, file: str, words: list[str], text: str) -> None:
    code, out, _ = tools("call", *words, "-c", file)
    assert code == 1
    assert text in out


def test_a_list_of_all_kinds_is_listed_and_checked(tools: Tools, project: Path) -> None:
    files = [text for name, text in EXAMPLES.items() if name.endswith(".yaml")]
    (project / "all.yaml").write_text("tools:\n" + "".join(text.partition("tools:\n")[2] for text in files))
    code, out, err = tools("list", "-c", "all.yaml", "--json")
    assert code == 0, err
    listed = json.loads(out)
    assert [(t["name"], t["kind"]) for t in listed["tools"]] == [
        ("count_letter", "function"), ("notebook", "class"), ("notebook_of_all", "class"), ("add", "verl"), ("rates", "http"),
        ("notes_lookup", "mcp"),
    ]  # fmt: skip
    assert listed["tools"][4]["place"] == "GET ${env:RATES_URL}/rates/{currency}"
    assert listed["tools"][4]["limits"]["on_timeout"] == "infra"
    assert listed["search_order"][0] == f"the project: {project}"
    assert "sesame-7" not in out
    code, out, err = tools("check", "-c", "all.yaml")
    assert code == 0, out + err
    (project / "broken.yaml").write_text(
        "tools:\n  - use: letters:count_lettr\n  - use: letters:count_letter\n"
        "  - {name: gone, http: {url: 'http://127.0.0.1:1/', description: x}}\n"
    )
    code, out, _ = tools("check", "-c", "broken.yaml", "--json")
    assert code == 1
    assert [(f["subject"], f["level"]) for f in json.loads(out)] == [
        ("tools[0]", "fail"),
        ("count_letter", "ok"),
        ("gone", "fail"),
    ]


def test_the_schema_and_the_prompt_are_what_the_model_sees(tools: Tools, tmp_path: Path) -> None:
    from agentrl.testing.tiny_model import make_tiny_tokenizer

    code, out, _ = tools("schema", "count_letter", "-c", "function.yaml")
    (schema,) = json.loads(out)
    assert (code, schema["function"]["parameters"]["required"]) == (0, ["word", "letter"])
    make_tiny_tokenizer().save_pretrained(tmp_path)
    code, out, err = tools("schema", "-c", "function.yaml", "--rendered", "-m", str(tmp_path))
    assert code == 0, err
    assert '"count_letter"' in out
    assert re.search(r"^\d+ tokens describe the tools$", err, re.MULTILINE)
    code, _, err = tools("schema", "-c", "function.yaml", "--rendered")
    assert code == 2
    assert "give -m MODEL" in err


def test_a_run_s_yaml_gives_its_tools_and_a_wrong_file_is_refused(tools: Tools, project: Path) -> None:
    (project / "run.yaml").write_text("run: {name: x}\ntools: function.yaml\nserve: {tool_tokens: 64}\n")
    code, out, _ = tools("call", "count_letter", "word=aa", "letter=a", "-c", "run.yaml", "--json")
    assert (code, json.loads(out)["text"]) == (0, "2")
    code, _, err = tools("list", "-c", "nowhere.yaml")
    assert code == 2
    assert "nowhere.yaml" in err
    code, _, err = tools("call", "count_letter", "word", "-c", "run.yaml")
    assert (code, "is no argument" in err) == (2, True)
