"""Arguments against schemas as tool servers write them: references, unions, enums, ranges, nested objects; and the words for the model."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentrl.errors import ConfigError
from agentrl.rollout.tool_arguments import ArgumentError, Arguments

POINT = {"type": "object", "properties": {"x": {"type": "number"}, "on": {"type": "boolean"}}, "required": ["x"]}


@pytest.mark.parametrize(
    ("schema", "given", "expected"),
    [
        ({"$ref": "#/$defs/Point"}, '{"x": "1.5", "on": "true"}', {"x": 1.5, "on": True}),
        ({"allOf": [{"$ref": "#/$defs/Point"}], "description": "a place"}, {"x": "2"}, {"x": 2}),
        ({"anyOf": [{"$ref": "#/$defs/Point"}, {"type": "null"}]}, {"x": "2"}, {"x": 2}),
        ({"type": "array", "items": {"$ref": "#/$defs/Point"}}, '[{"x": "2"}]', [{"x": 2}]),
        ({"type": "array", "prefixItems": [{"type": "integer"}], "items": {"type": "string"}}, ["1", 2], [1, "2"]),
        ({"type": "object", "additionalProperties": {"type": "integer"}}, {"a": "1"}, {"a": 1}),
        ({"type": "object", "patternProperties": {"^n": {"type": "integer"}}}, {"n1": "1", "m": "1"}, {"n1": 1, "m": "1"}),
        ({"enum": [1, 2]}, "2", 2),
        ({"enum": ["celsius", "kelvin"], "type": "string"}, " Celsius ", "celsius"),
        ({"const": 3}, "3", 3),
        ({"$ref": "#/$defs/Node"}, {"next": {"next": {"value": "7"}}}, {"next": {"next": {"value": 7}}}),
        ({"type": "integer", "minimum": 1, "maximum": 9}, "9", 9),
    ],
)
def test_coercion_follows_the_whole_schema(schema: dict[str, Any], given: object, expected: object) -> None:
    node = {"type": "object", "properties": {"next": {"$ref": "#/$defs/Node"}, "value": {"type": "integer"}}}
    arguments = Arguments({"properties": {"v": schema}, "$defs": {"Point": POINT, "Node": node}})
    assert arguments.bind({"v": given}) == {"v": expected}


@pytest.mark.parametrize(
    ("schema", "given", "message"),
    [
        ({"type": "integer", "minimum": 1}, "0", "v: 0 is less than the minimum of 1"),
        (
            {"type": "integer", "maximum": 9, "multipleOf": 2},
            11,
            "v: 11 is greater than the maximum of 9; v: 11 is not a multiple",
        ),
        ({"type": "string", "minLength": 2}, "a", "v: 'a' is too short"),
        ({"type": "string", "pattern": "^[a-z]+$"}, "A1", "v: 'A1' does not match '^[a-z]+$'"),
        ({"enum": ["metric", "imperial"]}, "metrics", "is not one of ['metric', 'imperial'] (did you mean 'metric'?)"),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "x", "v: 'x' is not of type 'integer' or 'x' is not of type 'null'"),
        (POINT, {"x": 1, "onn": True, "z": 1}, None),
        ({**POINT, "additionalProperties": False}, {"x": 1, "onn": True}, "v: 'onn' was unexpected (did you mean 'on'?)"),
        ({"type": "array", "items": POINT, "minItems": 1}, [], "v: [] should be non-empty"),
        ({"type": "array", "items": POINT}, [{"x": "far"}], "v.0.x: 'far' is not of type 'number'"),
        ({"enum": ["a", "A"]}, "á", "is not one of"),
    ],
)
def test_what_does_not_fit_is_explained_where_it_is(schema: dict[str, Any], given: object, message: str | None) -> None:
    arguments = Arguments({"properties": {"v": schema}})
    if message is None:
        assert arguments.bind({"v": given}) == {"v": given}
        return
    with pytest.raises(ArgumentError) as caught:
        arguments.bind({"v": given})
    assert message in str(caught.value)


def test_a_schema_is_read_in_its_own_draft() -> None:
    pair = {"type": "array", "items": [{"type": "number"}, {"type": "integer"}], "additionalItems": False}
    for named in ({}, {"$schema": "http://json-schema.org/draft-07/schema#"}):
        arguments = Arguments({**named, "properties": {"v": pair}})
        assert arguments.bind({"v": ["0.5", "2"]}) == {"v": [0.5, 2]}
        with pytest.raises(ArgumentError, match="Additional items are not allowed"):
            arguments.bind({"v": [1, 2, 3]})
    old = Arguments(
        {
            "$schema": "http://json-schema.org/draft-04/schema#",
            "properties": {"v": {"type": "integer", "minimum": 0, "exclusiveMinimum": True}},
        }
    )
    with pytest.raises(ArgumentError, match="less than or equal to the minimum"):
        old.bind({"v": "0"})


def test_parameters_that_a_composition_names_are_known_and_others_are_not() -> None:
    either = [
        {"properties": {"kind": {"const": kind}, "value": {"type": of}}, "required": ["kind", "value"]}
        for kind, of in (("count", "integer"), ("name", "string"))
    ]
    arguments = Arguments({"type": "object", "oneOf": either})
    assert arguments.bind({"kind": "count", "value": "3"}) == {"kind": "count", "value": 3}
    assert arguments.bind({"kind": "name", "value": "3"}) == {"kind": "name", "value": "3"}
    with pytest.raises(ArgumentError, match="'more' was unexpected"):
        arguments.bind({"kind": "name", "value": "3", "more": 1})
    both = Arguments(
        {"allOf": [{"properties": {"a": {"type": "integer"}}}, {"$ref": "#/$defs/b"}], "$defs": {"b": {"properties": {"b": {}}}}}
    )
    assert both.bind({"a": "1", "b": 2}) == {"a": 1, "b": 2}


@pytest.mark.parametrize(("value", "fits"), [("0.07", True), (19.99, True), (10**40, True), (0.071, False)])
def test_multiples_are_of_decimal_numbers(value: object, fits: bool) -> None:
    arguments = Arguments({"properties": {"v": {"type": "number", "multipleOf": 0.01}}})
    if fits:
        assert arguments.bind({"v": value}) == {"v": float(value) if isinstance(value, str) else value}
    else:
        with pytest.raises(ArgumentError, match=r"0\.071 is not a multiple of 0\.01"):
            arguments.bind({"v": value})


def test_a_number_that_no_json_can_hold_is_none() -> None:
    with pytest.raises(ArgumentError, match="'1e400' is not of type 'number'"):
        Arguments({"properties": {"v": {"type": "number"}}}).bind({"v": "1e400"})


def test_a_misspelt_name_is_one_problem() -> None:
    arguments = Arguments(
        {"properties": {"expression": {"type": "string"}, "max_digits": {"type": "integer"}}, "required": ["expression"]}
    )
    with pytest.raises(ArgumentError) as caught:
        arguments.bind({"exprssion": "1", "maxDigits": 2})
    assert str(caught.value) == (
        "invalid arguments: 'exprssion' was unexpected (did you mean 'expression'?); "
        "'maxDigits' was unexpected (did you mean 'max_digits'?). Parameters: expression, max_digits"
    )
    with pytest.raises(ArgumentError, match=r"^invalid arguments: 'q' was unexpected; 'expression' is a required property\."):
        arguments.bind({"q": "1"})


@pytest.mark.parametrize("reference", ["http://example.org/schema.json", "#/$defs/Nowhere", "other.json#/A"])
def test_a_reference_that_leads_nowhere_or_abroad_is_refused_at_start_up(reference: str) -> None:
    with pytest.raises(ConfigError, match="leads nowhere"):
        Arguments({"properties": {"v": {"type": "array", "items": {"$ref": reference}}}})


def test_a_property_may_be_called_like_a_keyword() -> None:
    arguments = Arguments({"properties": {"$ref": {"type": "integer"}, "enum": {"type": "integer"}}, "default": {"$ref": "x"}})
    assert arguments.bind({"$ref": "1", "enum": "2"}) == {"$ref": 1, "enum": 2}


def test_schemas_and_values_without_end_neither_hang_nor_crash() -> None:
    loop = Arguments(
        {"properties": {"v": {"$ref": "#/$defs/A"}}, "$defs": {"A": {"anyOf": [{"$ref": "#/$defs/A"}, {"type": "null"}]}}}
    )
    with pytest.raises(ArgumentError):
        loop.bind({"v": "x"})
    value: Any = 1
    for _ in range(3000):
        value = [value]
    nested = Arguments({"properties": {"v": {"$ref": "#/$defs/L"}}, "$defs": {"L": {"anyOf": [{"type": "array", "items": {"$ref": "#/$defs/L"}}, {"type": "integer"}]}}})  # fmt: skip
    with pytest.raises(ArgumentError, match="nested too deeply"):
        nested.bind({"v": value})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(value=JSON)
def test_whatever_the_model_writes_is_bound_as_the_schema_says_or_explained(value: Any) -> None:
    arguments = Arguments(
        {
            "properties": {
                "n": {"type": "integer"},
                "p": {"$ref": "#/$defs/P"},
                "u": {"anyOf": [{"type": "number"}, {"enum": ["a"]}]},
            },
            "$defs": {"P": POINT},
        }
    )
    for name in ("n", "p", "u", "other"):
        said = ""
        try:
            bound = arguments.bind({name: value})
        except ArgumentError as error:
            said = str(error)
        if said:
            assert said.startswith("invalid arguments: ")
            assert len(said) < 1200
        else:
            assert arguments.bind(bound) == bound  # what was coerced stays


@given(
    arguments=st.dictionaries(st.sampled_from(["text", "count", "share", "loud", "texts"]), JSON, max_size=5),
    required=st.sets(st.sampled_from(["text", "count"])),
)
def test_plain_parameters_are_bound_as_the_validator_binds_them(arguments: dict[str, Any], required: set[str]) -> None:
    types = {"text": "string", "count": "integer", "share": "number", "loud": "boolean"}
    outcomes: list[object] = []
    for extra in ({}, {"$comment": "a keyword that leaves everything to the validator"}):
        properties = {name: {"type": kind, **extra} for name, kind in types.items()}
        try:
            bound = Arguments({"properties": properties, "required": sorted(required)}).bind(arguments)
            outcomes.append([(name, type(value), value) for name, value in bound.items()])
        except ArgumentError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]
