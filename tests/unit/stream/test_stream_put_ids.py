"""The names under which put ids are remembered, and the bits behind them."""

import pytest

from agentrl.stream.put_ids import GROUPS_PER_MAP, names_in_maps, put_name


@pytest.mark.parametrize(
    ("trajectory_id", "name"),
    [
        ("gsm8k/train/7/1030/9/2", "1030/9/2"),
        ("t/5+again12/0/1", "5+again12/0/1"),
        ("5/0/0", "5/0/0"),
        ("t/5/0/0+replay17-0", "t/5/0/0+replay17-0"),
        ("t/05/0/0", "t/05/0/0"),
        ("t/5+again0/0/0", "t/5+again0/0/0"),
        ("t/x/0/0", "t/x/0/0"),
        ("t/\u0665/0/0", "t/\u0665/0/0"),
        ("t/1234567890123456/0/0", "t/1234567890123456/0/0"),
        ("t/5/0", "t/5/0"),
    ],
)
def test_ids_with_a_place_are_named_by_it_and_others_by_themselves(trajectory_id: str, name: str) -> None:
    assert put_name(trajectory_id) == name


def test_bits_are_read_as_the_server_sets_them() -> None:
    data = bytearray(7)
    data[6] = 0b0100_0001
    maps = [("0:0:0:0", b"\x80"), ("1:3:2:1", bytes(data))]
    assert names_in_maps(maps) == {"0/0/0", f"{GROUPS_PER_MAP + 6}+again3/9/2", f"{GROUPS_PER_MAP + 6}+again3/15/2"}
    assert names_in_maps([]) == set()
