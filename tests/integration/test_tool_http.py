"""HTTP services as tools, against a real server."""

import asyncio
import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web

from agentrl.errors import ConfigError, ToolBusy, ToolInfraError
from agentrl.rollout.http_tool import at_pointer, retry_after_s
from agentrl.rollout.tool_loading import load_tools
from agentrl.rollout.toolbox import Observation, Toolbox
from agentrl.types import Task, ToolCall


class Service:
    """Remembers what it was asked; answers what the test sets."""

    def __init__(self) -> None:
        self.url = ""
        self.requests: list[tuple[str, str, dict[str, str], dict[str, str], Any]] = []
        self.answers: list[web.Response] = []
        self.connections: list[Any] = []
        """Of each request."""
        self.hold_s = 0.0

    async def handle(self, request: web.Request) -> web.Response:
        body = await request.text()
        self.connections.append(request.transport)
        self.requests.append(
            (
                request.method,
                request.raw_path.partition("?")[0],
                dict(request.query),
                dict(request.headers),
                json.loads(body or "null"),
            )
        )
        await asyncio.sleep(self.hold_s)
        return self.answers.pop(0) if self.answers else web.Response(text="fine")


@pytest_asyncio.fixture
async def service() -> AsyncGenerator[Service]:
    made = Service()
    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", made.handle)
    runner = web.AppRunner(app, shutdown_timeout=1.0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    made.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield made
    await runner.cleanup()


SCHEMA = {"properties": {"currency": {"type": "string"}, "days": {"type": "integer"}}, "required": ["currency"]}


def make(http: dict[str, Any], **entry: Any) -> Toolbox:
    return load_tools([{"name": "rates", "http": {"schema": SCHEMA, **http}, **entry}])


async def ask(box: Toolbox, **arguments: Any) -> Observation:
    try:
        async with box.session(task=Task(id="t", prompt=[], data_source="d"), trajectory_id="t", sample_index=0) as tools:
            (result,) = await tools.run([ToolCall(name="rates", arguments=arguments)])
            return result
    finally:
        await box.aclose()


@pytest.mark.asyncio
async def test_arguments_go_to_the_path_the_query_or_the_body(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RATES_KEY", "sesame-7")
    headers = {"Authorization": "Bearer ${env:RATES_KEY}"}
    path = {"url": service.url + "/rates/{currency}", "headers": headers}
    await ask(make({**path, "method": "GET", "query": {"v": "2"}}), currency="a/b c", days="3")
    await ask(make({**path, "body": {"v": 2}}), currency="EUR", days=3)
    await ask(make({"url": service.url + "/rates", "arguments": "query", "method": "PUT"}), currency="EUR")
    assert [(m, p, q, b) for m, p, q, _, b in service.requests] == [
        ("GET", "/rates/a%2Fb%20c", {"v": "2", "days": "3"}, None),
        ("POST", "/rates/EUR", {}, {"v": 2, "days": 3}),
        ("PUT", "/rates", {"currency": "EUR"}, None),
    ]
    assert service.requests[0][3]["Authorization"] == "Bearer sesame-7"


@pytest.mark.asyncio
async def test_a_pointer_takes_the_text_out_of_the_answer(service: Service) -> None:
    service.answers = [web.json_response({"r": [{"text": "1.08"}, {"text": {"é": 1}}]}) for _ in range(3)]
    texts = [
        (await ask(make({"url": service.url, "text": pointer}), currency="EUR")).text
        for pointer in ("/r/0/text", "/r/1/text", "")
    ]
    assert texts == ["1.08", '{"é": 1}', '{"r": [{"text": "1.08"}, {"text": {"é": 1}}]}']
    service.answers = [web.json_response({"other": 1}), web.Response(text="<html>")]
    with pytest.raises(ToolInfraError, match="has no 'r'"):
        await ask(make({"url": service.url, "text": "/r"}), currency="EUR")
    with pytest.raises(ToolInfraError, match="answered no JSON"):
        await ask(make({"url": service.url, "text": "/r"}), currency="EUR")


@pytest.mark.asyncio
@pytest.mark.parametrize("status", [400, 404, 409, 422])
async def test_what_the_model_asked_wrongly_is_text_for_it(service: Service, status: int) -> None:
    service.answers = [web.json_response({"detail": "no such currency"}, status=status), web.Response(status=status)]
    result = await ask(make({"url": service.url, "error_text": "/detail"}), currency="XXX")
    assert (result.ok, result.error_kind, result.text) == (False, "tool", "Error: no such currency")
    bare = await ask(make({"url": service.url}), currency="XXX")
    assert bare.text.startswith("Error: ")
    assert len(bare.text) > len("Error: ")


@pytest.mark.asyncio
@pytest.mark.parametrize("status", [302, 401, 403, 407, 408, 429, 500, 502, 503])
async def test_what_the_model_cannot_help_is_infrastructure(service: Service, status: int) -> None:
    service.answers = [web.Response(status=status, text="sorry", headers={"Location": "/elsewhere"})]
    with pytest.raises(ToolInfraError, match=f"`rates`: {service.url}/ answered {status} .*: sorry") as caught:
        await ask(make({"url": service.url + "/"}), currency="EUR")
    assert isinstance(caught.value, ToolBusy) == (status == 429)
    service.answers = [web.Response(status=status, text="sorry")]
    named = await ask(make({"url": service.url, "model_errors": [status]}), currency="EUR")
    assert named.text == "Error: sorry"


@pytest.mark.asyncio
async def test_no_connection_and_no_answer_in_time_are_infrastructure(service: Service) -> None:
    with pytest.raises(ToolInfraError, match=r"no answer from http://127\.0\.0\.1:1/x: ClientConnectorError"):
        await ask(make({"url": "http://127.0.0.1:1/x"}), currency="EUR")
    service.hold_s = 600
    with pytest.raises(ToolInfraError, match=r"`rates` did not answer within 0\.1 s"):
        await ask(make({"url": service.url}, timeout_s=0.1), currency="EUR")


@pytest.mark.asyncio
async def test_retry_after_is_obeyed_within_the_deadline(service: Service) -> None:
    busy = {"status": 429, "text": "slow down"}
    service.answers = [web.Response(**busy, headers={"Retry-After": "0"}), web.Response(status=503), web.Response(text="1.08")]
    box = make({"url": service.url, "method": "GET"}, retries=2)
    assert (await ask(box, currency="EUR")).text == "1.08"
    stats = box.stats()["rates"]
    assert (stats["calls"], stats["retries"], stats["infra_errors"]) == (1, 2, 0)
    service.answers = [web.Response(**busy, headers={"Retry-After": "3600"})]
    asked = len(service.requests)
    box = make({"url": service.url, "method": "GET"}, retries=5, timeout_s=60)
    with pytest.raises(ToolBusy, match="answered 429"):  # at once: the next attempt would come after the deadline
        await ask(box, currency="EUR")
    assert len(service.requests) == asked + 1
    assert 3000 < box.tools[0].rate.delay_s() <= 3600  # and other rollouts hold back as well


@pytest.mark.asyncio
async def test_a_connection_that_its_server_may_be_closing_is_not_used_again(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = make({"url": service.url})
    call = [ToolCall(name="rates", arguments={"currency": "EUR"})]
    async with box.session(task=Task(id="t", prompt=[], data_source="d"), trajectory_id="t", sample_index=0) as tools:
        monkeypatch.setattr("aiohttp.connector.monotonic", lambda: 1000.0)
        await tools.run(call)
        await tools.run(call)
        monkeypatch.setattr("aiohttp.connector.monotonic", lambda: 1005.0)  # uvicorn closes what idled so long
        await tools.run(call)
    await box.aclose()
    first, second, third = service.connections
    assert first is second
    assert third is not first


@pytest.mark.asyncio
async def test_secrets_reach_the_service_and_nothing_else(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RATES_KEY", "sesame-7")
    http = {"url": service.url + "/k/${env:RATES_KEY}/{currency}", "headers": {"X-Key": "${env:RATES_KEY}"}}
    service.answers = [
        web.Response(text="you said sesame-7"),
        web.Response(status=404, text="no sesame-7"),
        web.Response(status=500, text="key sesame-7 is bad"),
    ]
    box = make(http)
    assert (await ask(box, currency="EUR")).text == "you said <redacted>"
    assert (await ask(box, currency="EUR")).text == "Error: no <redacted>"
    with pytest.raises(ToolInfraError) as caught:
        await ask(box, currency="EUR")
    monkeypatch.setenv("RATES_KEY", "127.0.0.1:1")
    with pytest.raises(ToolInfraError) as unreachable:
        await ask(make({**http, "url": "http://${env:RATES_KEY}/"}), currency="EUR")
    for text in (str(caught.value), str(unreachable.value), box.tools[0].place):
        assert "sesame-7" not in text
        assert "127.0.0.1:1/" not in text
    assert service.requests[0][1] == "/k/sesame-7/EUR"


@pytest.mark.asyncio
async def test_answers_are_read_up_to_their_limit(service: Service) -> None:
    service.answers = [web.Response(text="x" * 5000), web.json_response({"a": "x" * 5000}), web.Response(text="ä" * 10)]
    assert (await ask(make({"url": service.url, "max_bytes": 1000}), currency="EUR")).text == "x" * 1000
    large = await ask(make({"url": service.url, "max_bytes": 1000, "text": "/a"}), currency="EUR")
    assert large.text == "Error: the answer is larger than 1000 bytes. Ask for less"
    assert (await ask(make({"url": service.url, "max_bytes": 3}), currency="EUR")).text == "ä\N{REPLACEMENT CHARACTER}"


@pytest.mark.asyncio
@pytest.mark.parametrize("currency", ["", ".", ".."])
async def test_an_argument_does_not_lead_to_another_path(service: Service, currency: str) -> None:
    result = await ask(make({"url": service.url + "/rates/{currency}"}), currency=currency)
    assert result.error_kind == "tool"
    assert service.requests == []


@pytest.mark.parametrize(
    ("http", "entry", "message"),
    [
        ({"ulr": "x"}, {}, "http: unknown key `ulr`. Did you mean `url`?"),
        ({}, {}, "http: `url`: Field required"),
        ({"url": "ftp://x"}, {}, "is no http address"),
        ({"url": "http://{currency}.x"}, {}, "the model must not choose the host"),
        ({"url": "http://x/{days}"}, {}, "the url takes days, which the schema does not require"),
        ({"url": "http://x/${env:RATES_NOWHERE}"}, {}, "the environment variable RATES_NOWHERE is not set"),
        ({"url": "http://x", "method": "HEAD"}, {}, "`method`: Input should be"),
        ({"url": "http://x", "schema": "nowhere.json"}, {}, "schema=nowhere.json: cannot be read as JSON"),
        ({"url": "http://x", "schema": {"properties": {"a": {"$ref": "#/$defs/A"}}}}, {}, "`$ref: #/$defs/A` leads nowhere"),
        ({"url": "http://x", "schema": {"$ref": "http://x/schema"}}, {}, "leads nowhere"),
        ({"url": "http://x"}, {"config": {"a": 1}}, "`config` means nothing here"),
        ({"url": "http://x"}, {"retries": 2}, "`retries` asks a tool again"),
        ({"url": "http://x"}, {"cache": {"size": 2}}, "`cache` asks a tool again"),
        ({"url": "http://x"}, {"idempotent": True, "cache": {"ttl": 2}}, "cache: unknown key `ttl`. Did you mean `ttl_s`?"),
        ({"url": "http://x"}, {"on_timeout": "blame"}, "`on_timeout` must be observe or infra"),
    ],
)
def test_a_wrong_http_entry_is_refused_at_its_place(http: dict[str, Any], entry: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(http, **entry)
    assert message in str(caught.value)
    assert "tools[0]" in str(caught.value)


def test_who_only_reads_schemas_needs_no_secrets() -> None:
    spec = [{"name": "rates", "http": {"url": "http://x/{k}", "headers": {"X": "${env:RATES_NOWHERE}"}}}]
    assert load_tools(spec, only_schemas=True).names == ("rates",)  # as learn does, on a machine without them
    with pytest.raises(ConfigError, match="RATES_NOWHERE is not set"):
        load_tools(spec)


def test_a_schema_comes_from_a_file_a_function_or_the_url(tmp_path: Path) -> None:
    (tmp_path / "rates.json").write_text(json.dumps(SCHEMA))
    function = {"type": "function", "function": {"name": "f", "description": "d", "parameters": SCHEMA}}
    box = load_tools(
        [
            {"http": {"name": "a", "url": "http://x", "schema": "rates.json", "description": "From a file."}},
            {"http": {"url": "http://x"}, "tool_schema": function},
            {"http": {"name": "c", "url": "http://x/{key}", "method": "GET"}},
        ],
        base_dir=tmp_path,
    )
    a, f, c = (schema["function"] for schema in box.schemas())
    assert (a["name"], a["description"], a["parameters"]["required"]) == ("a", "From a file.", ["currency"])
    assert (f["name"], f["description"]) == ("f", "d")
    assert c["parameters"] == {"type": "object", "properties": {"key": {"type": "string"}}, "required": ["key"]}
    assert [t.is_idempotent for t in box.tools] == [False, False, True]


def test_pointers_and_retry_after_read_what_their_rfcs_say() -> None:
    document = {"foo": ["bar", "baz"], "": 0, "a/b": 1, "m~n": 8}
    cases = {"": document, "/foo": ["bar", "baz"], "/foo/0": "bar", "/": 0, "/a~1b": 1, "/m~0n": 8}
    assert {pointer: at_pointer(document, pointer) for pointer in cases} == cases
    for pointer in ("/foo/2", "/foo/-", "/nope", "/foo/0/x"):
        with pytest.raises(KeyError):
            at_pointer(document, pointer)
    assert (retry_after_s("12"), retry_after_s(""), retry_after_s("soon")) == (12.0, None, None)
    assert retry_after_s("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
