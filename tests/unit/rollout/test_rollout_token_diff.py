"""Differences of token sequences, as people read them."""

from agentrl.rollout.token_diff import show_difference


def test_a_difference_shows_positions_ids_and_texts_with_what_stands_around_it() -> None:
    shown = show_difference([1, 2, 3, 4, 9, 9, 5], [1, 2, 3, 4, 7, 5], str, context=2)
    assert shown.splitlines() == [
        "    @2 3:'3' 4:'4'",
        "  - @4 9:'9' 9:'9'  (pieces, 2 tokens)",
        "  + @4 7:'7'  (whole, 1 tokens)",
        "    @6 5:'5'",
    ]


def test_long_equal_heads_and_long_differences_stay_short() -> None:
    head = list(range(20_000))
    shown = show_difference([*head, 1, 2], [*head, *([3] * 500)], str)
    assert shown.count("\n") < 14
    assert len(shown) < 2_000
    assert "(whole, 500 tokens)" in shown
    assert "@20000" in shown


def test_a_tail_that_is_missing_on_one_side_is_shown() -> None:
    assert "+ @2 3:'3'" in show_difference([1, 2], [1, 2, 3], str)
    assert show_difference([1, 2], [1, 2], str) == "    @0 1:'1' 2:'2'"
