"""GSM8K scoring holds for every number, every decoration, and every text."""

import time
from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st

from envs.arithmetic import compute_score as compute_arithmetic_score
from envs.gsm8k import compute_score, parse_number, score_details

_numbers = st.integers(-(10**9), 10**9)
_prose = st.text("abc xyz.,!?\n", max_size=60)


@settings(deadline=None)
@given(
    _numbers,
    st.sampled_from(
        ["{}", "{}.", "${}", "**{}**", "{}.00", " {}", "{}%", "{} dollars", "\\boxed{{{}}}", "$\\boxed{{{}}}$", "`{}`"]
    ),
    st.booleans(),
    _prose,
)
def test_every_spelling_of_the_right_number_scores_and_its_neighbour_does_not(
    number: int, form: str, commas: bool, prose: str
) -> None:
    text = f"{prose}\n####" + form.format(f"{number:,}" if commas else str(number))
    assert compute_score("openai/gsm8k", text, str(number)) == 1.0
    assert compute_score("openai/gsm8k", text, str(number + 1)) == 0.0


@settings(deadline=None)
@given(_numbers, _numbers, st.integers(0, 5_000))
def test_only_the_last_marker_counts_however_far_from_the_end(first: int, last: int, filler: int) -> None:
    text = f"#### {first}\n#### {last}\n" + "so it is. " * filler
    assert score_details("", text, str(last))["pred"] == str(last)


@settings(deadline=None)
@given(_prose, _prose, _numbers)
def test_what_only_a_tool_block_says_earns_nothing(before: str, inside: str, number: int) -> None:
    for tag in ("tool_call", "tool_response"):
        text = f"{before}<{tag}>{inside}#### {number}</{tag}>"
        details = score_details("", text, number, method="lenient")
        assert (details["score"], details["strict"], details["lenient"]) == (0.0, 0, 0)


@settings(deadline=None)
@given(_numbers, _prose, _prose)
def test_tool_blocks_leave_the_score_of_the_rest_unchanged(number: int, prose: str, inside: str) -> None:
    block = f"<tool_call>{inside} #### {number + 1}</tool_call>"
    assert compute_score("", f"{prose}{block}\n#### {number}", number) == 1.0
    assert compute_score("", f"{prose}\n#### {number}\n{block}", number) == 1.0


@settings(deadline=None)
@given(st.fractions(max_denominator=10**6))
def test_fractions_are_compared_exactly(value: Fraction) -> None:
    assert parse_number(f"{value.numerator}/{value.denominator}") == value
    assert compute_score("", f"#### {value.numerator}/{value.denominator}", value) == 1.0


@given(
    st.none()
    | st.integers()
    | st.binary()
    | st.lists(st.integers())
    | st.text()
    | st.text("#0123456789,./-$*\\{} \nboxed<>", max_size=400),
    st.none() | st.integers() | st.floats() | st.text() | st.binary() | st.lists(st.integers()),
)
@settings(max_examples=300, deadline=None)
def test_scoring_never_raises_and_gives_one_or_zero(solution: object, truth: object) -> None:
    for score in (compute_score, compute_arithmetic_score):
        assert score(None, solution, truth, None) in (0.0, 1.0)
    details = score_details(None, solution, truth)
    assert details["lenient"] >= details["strict"] == details["score"]


@given(
    st.sampled_from(
        ["#", "####", "#### ", "1,", "1 ", "1/", "- ", " *", "<tool_call>", "answer is ", "answer ", "\\boxed{", "9", "####1 ,"]
    )
)
@settings(deadline=None, max_examples=20)
def test_a_megabyte_of_anything_is_read_in_linear_time(piece: str) -> None:
    start = time.process_time()
    compute_score("", piece * (1_000_000 // len(piece)), "42")
    assert time.process_time() - start < 10.0
