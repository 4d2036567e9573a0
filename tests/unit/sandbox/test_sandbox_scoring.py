"""Comparing outputs, sealing tests, adding up metrics."""

import pytest

from agentrl.sandbox.processes import add_metrics
from agentrl.sandbox.scoring import Compare, output_matches, seal_test


@pytest.mark.parametrize(
    ("output", "expected", "compare", "matches"),
    [
        ("1 2\n", "1 2", "exact", False),
        ("1 2  \n\n", "1 2", "lines", True),
        ("1 2\r\n3", "1 2\n3\n", "lines", True),
        ("1  2", "1 2", "lines", False),
        (" 1 2", "1 2", "lines", False),
        ("0.3333333\nyes", "0.33333331 \nyes", "numbers", True),
        ("0.34", "0.33", "numbers", False),
        ("1 2", "1", "numbers", False),
        ("nan", "nan", "numbers", True),
        ("1\n2", "1 2", "numbers", False),
        ("", "", "exact", True),
        ("", "x", "numbers", False),
    ],
)
def test_outputs_are_compared_as_asked(output: str, expected: str, compare: Compare, matches: bool) -> None:
    assert output_matches(output, expected, compare) is matches


def test_a_sealed_test_prints_its_proof_only_when_it_passes(capsys: pytest.CaptureFixture[str]) -> None:
    sealed, proof = seal_test("x = 3\nassert x * 2 == 6\nassert x < 4")
    exec(sealed, {})
    assert capsys.readouterr().out == f"\n{proof}"
    failing, proof = seal_test("assert 1 == 2")
    with pytest.raises(AssertionError):
        exec(failing, {})
    assert proof not in capsys.readouterr().out


def test_what_claims_to_equal_everything_equals_nothing_plain() -> None:
    class Yes:
        def __eq__(self, other: object) -> bool:
            return True

        def __hash__(self) -> int:
            return 0

    for value in ("answer", "[answer]", "{1: answer}"):
        sealed, _ = seal_test(f"assert {value} == {value.replace('answer', '5')}")
        with pytest.raises(AssertionError):
            exec(sealed, {"answer": Yes()})
        exec(sealed, {"answer": 5})
    own, _ = seal_test("assert a == b")
    exec(own, {"a": Yes(), "b": Yes()})  # where the test itself compares such objects, their own word counts


def test_two_tests_never_share_a_proof_and_nonsense_is_refused() -> None:
    assert seal_test("pass")[1] != seal_test("pass")[1]
    with pytest.raises(ValueError, match="does not parse"):
        seal_test("assert (")


def test_metrics_of_several_processes_are_added_up() -> None:
    pages = [
        b'# HELP a b\n# TYPE a counter\na{x="1"} 2.0\nb 1.0\n',
        b'# HELP a b\n# TYPE a counter\na{x="1"} 3.0\na{x="2"} 1.0\nb 1.0\n',
    ]
    assert add_metrics(pages).decode() == '# HELP a b\n# TYPE a counter\na{x="1"} 5.0\nb 2.0\na{x="2"} 1.0\n'
