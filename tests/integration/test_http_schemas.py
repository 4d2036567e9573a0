"""Requests that schemathesis makes from our OpenAPI, right and wrong: whatever is sent, no service answers with a 5xx, or not at all.

The sandbox describes itself. The engine speaks SGLang's API and publishes no description, so its is made here from the very types
that decode its bodies.
"""

import os
import subprocess
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sandbox_harness import Service, running_service
from schemathesis import GenerationMode

from agentrl.sandbox.app import create_app
from agentrl.serving.embedded import http
from agentrl.serving.engine_process import EmbeddedEngineSpec
from agentrl.testing.tiny_model import make_tiny_model

EXAMPLES = int(os.environ.get("AGENTRL_FUZZ", "0")) // 10 or 12
"""Requests per route and kind (right, wrong); AGENTRL_FUZZ=10000 makes 1,000."""
HTTP = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES < 100, suppress_health_check=list(HealthCheck), database=None
)
ANSWER_LIMIT_S = 100.0

pytestmark = pytest.mark.timeout(1800 + EXAMPLES)


def operations(schema: schemathesis.BaseSchema) -> list[schemathesis.APIOperation]:
    return [found.ok() for found in schema.get_all_operations()]


def check(operation: schemathesis.APIOperation, mode: GenerationMode, url: str, headers: dict[str, str]) -> list[int]:
    """Send requests of this operation; the statuses that came back."""
    statuses: list[int] = []
    session = requests.Session()

    @HTTP
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case: schemathesis.Case) -> None:
        answer = case.call(base_url=url, session=session, headers=headers, timeout=ANSWER_LIMIT_S)
        statuses.append(answer.status_code)
        assert answer.status_code < 500, f"{case.as_curl_command()}\n{answer.status_code} {answer.text[:500]}"

    send()
    return statuses


# -- the sandbox ------------------------------------------------------------------------------------------------------

RUN_LIMIT_S = 10.0

SANDBOX = schemathesis.openapi.from_dict(create_app(max_concurrency=1).openapi())


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Service]:
    try:
        with running_service(max_concurrency=4, memory_limit_mb=128, max_sessions=8, token="right") as running:
            yield running
    except RuntimeError as error:
        pytest.skip(f"no tier isolates on this machine: {error}")


def shorten(context: Any, body: Any) -> Any:
    """Programs of noise end at once: no limit of an hour, when they do not, and none in which not even their interpreter starts, which
    is the service's failure (502), to be repeated where there is more time."""
    if isinstance(body, dict):
        body |= {
            name: RUN_LIMIT_S
            for name in ("run_timeout", "timeout", "total_timeout")
            if isinstance(body.get(name), int | float) and body[name] > 0
        }
        # Addresses of noise would be asked of whatever resolver this machine has.
        body.pop("fetch_files", None)
    return body


SANDBOX.hook("map_body")(shorten)


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["right", "wrong"])
@pytest.mark.parametrize("operation", operations(SANDBOX), ids=lambda o: o.label)
def test_no_request_makes_the_sandbox_fail(sandbox: Service, operation: Any, mode: GenerationMode) -> None:
    if mode is GenerationMode.NEGATIVE and operation.method.upper() != "POST":
        pytest.skip("takes no input that could be wrong")
    check(operation, mode, sandbox.url, sandbox.headers)
    assert sandbox.request("/health").status == 200


def test_every_route_of_the_sandbox_that_takes_a_body_describes_it() -> None:
    paths = create_app(max_concurrency=1).openapi()["paths"]
    bodies = {path: methods["post"].get("requestBody") for path, methods in paths.items() if "post" in methods}
    assert set(bodies) == {"/run_code", "/run_jupyter", "/run_tests", "/sessions", "/sessions/{session_id}/run"}
    assert all(body and body["content"]["application/json"]["schema"]["properties"] for body in bodies.values())
    assert "$defs" not in str(bodies), "references inside the document must resolve in the document"


# -- the engine -------------------------------------------------------------------------------------------------------

BODIES: dict[str, type[msgspec.Struct]] = {
    "/generate": http.GenerateBody,
    "/abort_request": http.AbortBody,
    "/update_weights_from_disk": http.UpdateFromDiskBody,
    "/update_weight_version": http.WeightVersionBody,
    "/weights_checker": http.CheckerBody,
    "/pause_generation": http.PauseBody,  # last: a paused engine answers no /generate
}
READS = ("/health", "/health_generate", "/ready", "/model_info", "/server_info", "/v1/loads", "/metrics", "/flush_cache")


def engine_description() -> dict[str, Any]:
    _, components = msgspec.json.schema_components(BODIES.values(), ref_template="#/components/schemas/{name}")
    # What a valid request may ask of so small a model in a test's time.
    components["GenerateBody"]["properties"]["input_ids"] = {
        "type": "array",
        "items": {"type": "integer", "minimum": 0, "maximum": 299},
        "minItems": 1,
        "maxItems": 12,
    }
    components["SamplingBody"]["properties"]["max_new_tokens"] = {"type": "integer", "minimum": 0, "maximum": 4}
    answer = {"200": {"description": "done"}}
    paths: dict[str, Any] = {
        path: {"post": {"requestBody": {"required": True, "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}}}, "responses": answer}}
        for path, kind in BODIES.items()
    }  # fmt: skip
    timeout = {"name": "timeout", "in": "query", "schema": {"type": "number", "minimum": 0, "maximum": 0.1}}
    paths |= {path: {"get": {"parameters": [timeout] if path == "/flush_cache" else [], "responses": answer}} for path in READS}
    return {
        "openapi": "3.1.0",
        "info": {"title": "engine", "version": "1"},
        "paths": paths,
        "components": {"schemas": components},
    }


ENGINE = schemathesis.openapi.from_dict(engine_description())


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    spec = EmbeddedEngineSpec(model_path=str(make_tiny_model(tmp_path_factory.mktemp("model"))), api_key="right")
    env = {**os.environ, "OMP_NUM_THREADS": "1", **spec.environment()}
    process = subprocess.Popen(spec.command("127.0.0.1", 0), stdout=subprocess.PIPE, text=True, env=env)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("LISTENING "), line
    yield line.split()[1]
    process.terminate()
    process.wait(60)
    process.stdout.close()


KEY = {"Authorization": "Bearer right"}


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["right", "wrong"])
@pytest.mark.parametrize("operation", operations(ENGINE), ids=lambda o: o.label)
def test_no_request_makes_the_engine_fail(engine: str, operation: Any, mode: GenerationMode) -> None:
    if mode is GenerationMode.NEGATIVE and operation.path in READS and operation.path != "/flush_cache":
        pytest.skip("takes no input")
    check(operation, mode, engine, KEY)
    with requests.Session() as session:
        assert session.post(engine + "/continue_generation", headers=KEY, timeout=ANSWER_LIMIT_S).status_code == 200
        body = {"input_ids": [5, 6], "sampling_params": {"max_new_tokens": 1}}
        assert session.post(engine + "/generate", json=body, headers=KEY, timeout=ANSWER_LIMIT_S).status_code == 200


@settings(parent=HTTP)
@given(
    token=st.text(st.characters(codec="latin-1", exclude_categories=["C"]), max_size=40).filter(
        lambda t: t.strip() != "Bearer right"
    )
)
def test_no_other_token_opens_a_route(engine: str, sandbox: Service, token: str) -> None:
    for url in (engine + "/model_info", sandbox.url + "/v1/isolation"):
        assert (
            requests.get(url, headers={"Authorization": token.strip().encode("latin-1")}, timeout=ANSWER_LIMIT_S).status_code
            == 401
        )
