"""The order of rows: every epoch has each once, in an order of its own."""

from __future__ import annotations

from megatron_flowrl.data.order import PromptOrder, derived_seed


def test_an_epoch_is_a_permutation_and_epochs_differ() -> None:
    order = PromptOrder(50, seed=3, shuffle=True)
    first, second = order.take(0, 50), order.take(50, 50)
    assert sorted(first) == sorted(second) == list(range(50)) and first != second


def test_a_start_in_the_middle_goes_on() -> None:
    whole = PromptOrder(7, seed=3, shuffle=True).take(0, 40)
    assert PromptOrder(7, seed=3, shuffle=True).take(13, 27) == whole[13:]


def test_the_seed_decides() -> None:
    assert PromptOrder(50, 3, True).take(0, 50) == PromptOrder(50, 3, True).take(0, 50)
    assert PromptOrder(50, 3, True).take(0, 50) != PromptOrder(50, 4, True).take(0, 50)
    assert derived_seed(3, 1) == 2176989472  # on every machine


def test_without_shuffling_rows_come_as_they_are() -> None:
    assert PromptOrder(3, seed=3, shuffle=False).take(2, 5) == [2, 0, 1, 2, 0]
