"""The calculator against Python's own exact arithmetic, and against anything at all."""

import time
from contextlib import suppress
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentrl.errors import ToolError
from tools.calculator import evaluate, format_number

Tree = tuple[str, Fraction | None]
"""An expression and its value; None where it has none."""


def _leaf(value: Fraction, text: str) -> Tree:
    return text, value


_integers = st.integers(0, 10_000).map(lambda n: _leaf(Fraction(n), str(n)))
_grouped = st.integers(1_000, 10_000_000).map(lambda n: _leaf(Fraction(n), f"{n:,}"))
_decimals = st.tuples(st.integers(0, 999), st.integers(0, 999)).map(
    lambda p: _leaf(Fraction(f"{p[0]}.{p[1]:03}"), f"{p[0]}.{p[1]:03}")
)


def _combine(children: st.SearchStrategy[Tree]) -> st.SearchStrategy[Tree]:
    def binary(parts: tuple[Tree, str, Tree]) -> Tree:
        (left, a), operator, (right, b) = parts
        text = f"({left}) {operator} ({right})"
        if a is None or b is None or (operator in ("/", "//", "%") and b == 0):
            return text, None
        match operator:
            case "+":
                return text, a + b
            case "-":
                return text, a - b
            case "*":
                return text, a * b
            case "/":
                return text, a / b
            case "//":
                return text, Fraction(a // b)
            case _:
                return text, a % b

    def power(parts: tuple[Tree, int]) -> Tree:
        (text, value), exponent = parts
        undefined = value is None or (value == 0 and exponent < 0)
        return f"({text})**{exponent}", None if undefined else value**exponent

    def negative(child: Tree) -> Tree:
        return f"-({child[0]})", None if child[1] is None else -child[1]

    operators = st.sampled_from(["+", "-", "*", "/", "//", "%"])
    return (
        st.tuples(children, operators, children).map(binary)
        | st.tuples(children, st.integers(-3, 3)).map(power)
        | children.map(negative)
    )


_trees = st.recursive(_integers | _grouped | _decimals, _combine, max_leaves=12).filter(lambda tree: len(tree[0]) <= 900)


@given(_trees)
@settings(max_examples=300, deadline=None)
def test_the_value_equals_python_fractions(tree: Tree) -> None:
    text, value = tree
    if value is None:
        with pytest.raises(ToolError, match="division by zero"):
            evaluate(text)
    else:
        assert evaluate(text) == value


@settings(deadline=None)
@given(_integers, st.sampled_from("+-*"), _integers, st.sampled_from("+-*"), _integers)
def test_precedence_without_parentheses_equals_pythons(a: Tree, first: str, b: Tree, second: str, c: Tree) -> None:
    text = f"{a[0]} {first} {b[0]} {second} {c[0]}"
    assert evaluate(text) == eval(text)


@given(st.fractions())
@settings(deadline=None)
def test_what_is_printed_reads_back_to_within_its_rounding(value: Fraction) -> None:
    text = format_number(value)
    back = evaluate(text)
    assert abs(back - value) <= abs(value) * Fraction(5, 10**12)
    if value.denominator == 1:
        assert back == value


@given(st.text(max_size=1_200) | st.text("0123456789.,+-*/%^()eEx× $=", max_size=1_200))
@settings(max_examples=300, deadline=None)
def test_any_text_at_all_gives_a_number_or_a_tool_error_quickly(text: str) -> None:
    start = time.process_time()
    with suppress(ToolError):
        assert format_number(evaluate(text))
    assert time.process_time() - start < 5.0
