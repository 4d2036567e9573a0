"""Schemas from signatures; arguments checked and coerced."""

import dataclasses
import logging
from enum import Enum
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field

from agentrl.errors import ConfigError
from agentrl.protocols import ToolContext
from agentrl.rollout.tool import ArgumentError, Arguments, schema_of


class Unit(Enum):
    METRE = "m"
    FOOT = "ft"


class Point(BaseModel):
    x: float
    y: float = 0.0


@dataclasses.dataclass
class Box:
    corner: Point
    label: str | None = None


async def everything(
    text: str,
    count: int,
    points: list[Point],
    box: Box,
    mode: Literal["fast", "slow"] = "fast",
    unit: Unit = Unit.METRE,
    limit: Annotated[int, Field(ge=1)] | None = None,
    *,
    schema: bool = False,
    ctx: ToolContext,
) -> str:
    """Do everything.

    In one go.

    Args:
        text: what to read;
            on two lines
        count (int): how many
        box: where

    Returns:
        nothing: of interest
    """
    return ""


def test_the_schema_is_complete() -> None:
    schema = schema_of(everything, name="everything").schema
    point = {
        "type": "object",
        "properties": {"x": {"type": "number"}, "y": {"type": "number", "default": 0.0}},
        "required": ["x"],
    }
    assert schema.description == "Do everything. In one go."
    assert schema.parameters == {
        "type": "object",
        "properties": {
            "text": {"type": "string", "description": "what to read; on two lines"},
            "count": {"type": "integer", "description": "how many"},
            "points": {"type": "array", "items": point},
            "box": {
                "type": "object",
                "properties": {"corner": point, "label": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None}},
                "required": ["corner"],
                "additionalProperties": False,
                "description": "where",
            },
            "mode": {"type": "string", "enum": ["fast", "slow"], "default": "fast"},
            "unit": {"type": "string", "enum": ["m", "ft"], "default": "m"},
            "limit": {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "null"}], "default": None},
            "schema": {"type": "boolean", "default": False},
        },
        "required": ["text", "count", "points", "box"],
    }
    assert schema.as_function["function"]["name"] == "everything"


def test_bound_arguments_are_what_the_hints_say() -> None:
    bound = schema_of(everything, name="everything").arguments.bind(
        {"text": "t", "count": "3", "points": [{"x": "1.5"}], "box": {"corner": {"x": 2}}, "unit": "ft", "schema": "true"}
    )
    assert bound == {
        "text": "t",
        "count": 3,
        "points": [Point(x=1.5)],
        "box": Box(corner=Point(x=2.0)),
        "unit": Unit.FOOT,
        "schema": True,
    }


def test_the_context_is_not_part_of_the_schema() -> None:
    signature = schema_of(everything, name="everything")
    assert signature.context_parameter == "ctx"
    with pytest.raises(ArgumentError, match="ctx"):
        signature.arguments.bind({"text": "", "count": 1, "points": [], "box": {"corner": {"x": 1}}, "ctx": {}})


@pytest.mark.parametrize(
    ("schema", "given", "expected"),
    [
        ({"type": "integer"}, "3", 3),
        ({"type": "integer"}, " -3 ", -3),
        ({"type": "integer"}, 3.0, 3),
        ({"type": "integer"}, "3.0", 3),
        ({"type": "number"}, "2.5e1", 25.0),
        ({"type": "number"}, "7", 7),
        ({"type": "boolean"}, "False", False),
        ({"type": "string"}, 42, "42"),
        ({"type": "string"}, 1.5, "1.5"),
        ({"type": "array", "items": {"type": "integer"}}, '["1", 2]', [1, 2]),
        ({"type": "object", "properties": {"a": {"type": "integer"}}}, '{"a": "1"}', {"a": 1}),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "5", 5),
        ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, "5", "5"),
        ({"type": ["integer", "null"]}, "5", 5),
        ({"type": ["integer", "null"]}, "null", None),
        ({"type": ["string", "null"]}, "null", "null"),
        ({"type": "string"}, "3", "3"),
    ],
)
def test_values_with_one_reading_are_coerced(schema: dict[str, Any], given: object, expected: object) -> None:
    bound = Arguments({"properties": {"v": schema}}).bind({"v": given})
    assert bound == {"v": expected}
    assert type(bound["v"]) is type(expected)


@pytest.mark.parametrize(
    ("schema", "given"),
    [
        ({"type": "integer"}, "3.5"),
        ({"type": "integer"}, "three"),
        ({"type": "integer"}, True),
        ({"type": "boolean"}, "yes"),
        ({"type": "boolean"}, 1),
        ({"type": "string"}, None),
        ({"type": "string"}, True),
        ({"type": "array"}, "a, b"),
        ({"type": "integer"}, "9" * 400),
        ({"enum": ["a", "b"]}, "c"),
    ],
)
def test_values_with_no_reading_are_refused_by_name(schema: dict[str, Any], given: object) -> None:
    with pytest.raises(ArgumentError, match=r"invalid arguments: v: .*Parameters: v"):
        Arguments({"properties": {"v": schema}}).bind({"v": given})


def test_the_message_for_the_model_names_what_is_missing_and_what_is_too_much_and_stays_short() -> None:
    arguments = Arguments({"properties": {"expression": {"type": "string"}}, "required": ["expression"]})
    with pytest.raises(ArgumentError, match=r"'expression' is a required property.*Parameters: expression"):
        arguments.bind({})
    with pytest.raises(ArgumentError, match="'exprssion' was unexpected"):
        arguments.bind({"expression": "1", "exprssion": "2"})
    with pytest.raises(ArgumentError) as caught:
        arguments.bind({"expression": ["x" * 10_000]})
    assert len(str(caught.value)) < 600


def test_checks_of_the_types_themselves_reach_the_model() -> None:
    class Even(BaseModel):
        n: int

        def model_post_init(self, _: object, /) -> None:
            if self.n % 2:
                raise ValueError("n must be even")

    def f(even: Even) -> str:
        return str(even.n)

    with pytest.raises(ArgumentError, match="n must be even"):
        schema_of(f, name="f").arguments.bind({"even": {"n": 3}})


def test_recursive_types_are_cut_rather_than_endless() -> None:
    class Node(BaseModel):
        value: int
        children: list["Node"] = []

    Node.model_rebuild(_types_namespace={"Node": Node})

    def f(node: Node) -> str:
        return ""

    schema = schema_of(f, name="f").schema.parameters
    assert schema["properties"]["node"]["properties"]["children"]["items"] == {"type": "object"}
    assert "$ref" not in str(schema)


def test_what_cannot_be_called_by_name_or_described_is_refused_with_its_place() -> None:
    def starred(*values: int) -> str:
        return ""

    def opaque(value: "NoSuchType") -> str:  # type: ignore[name-defined]  # noqa: F821
        return ""

    class Opaque: ...

    def undescribable(value: Opaque) -> str:
        return ""

    for function in (starred, opaque, undescribable):
        with pytest.raises(ConfigError, match=r"test_rollout_tool\.py:\d+"):
            schema_of(function, name="f")


def test_untyped_parameters_are_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    def f(value) -> str:  # type: ignore[no-untyped-def]
        return ""

    with caplog.at_level(logging.WARNING):
        assert schema_of(f, name="f").schema.parameters["properties"] == {"value": {}}
    assert "tool_parameter_untyped" in caplog.text
    assert "tool_undescribed" in caplog.text


def test_further_keywords_are_passed_on() -> None:
    def f(a: int, **rest: object) -> str:
        return ""

    assert schema_of(f, name="f").arguments.bind({"a": "1", "b": 2}) == {"a": 1, "b": 2}
