"""How different answers are, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

from megatron_flowrl.evaluation.diversity import clusters, distinct_finals, distinct_n, self_bleu, words


def test_words() -> None:
    assert words("Let x_1 = 20, été!") == ["Let", "x", "_", "1", "=", "20", ",", "été", "!"]


def test_distinct_finals() -> None:
    assert distinct_finals(["1", "2", None, "1"]) == 2 and distinct_finals([None]) == 0


def test_distinct_n() -> None:
    assert distinct_n(["a b a", "a b"], 1) == 2 / 5
    assert distinct_n(["a b a", "a b"], 2) == 2 / 3
    assert distinct_n(["a"], 2) == distinct_n([], 1) == 0.0


def test_self_bleu() -> None:
    assert self_bleu(["a b c d e"] * 3) == pytest.approx(1.0)
    assert math.isnan(self_bleu(["alone"]))
    # One word of two in common, in the same place; no pair: precisions 1/2 and half a match of one pair, no brevity.
    assert self_bleu(["a b", "a c"]) == pytest.approx(math.sqrt(0.5 * 0.5))
    # Twice as long a reference: all three n-grams match, and the answer is short by e^(1 - 2).
    short, long = "a b", "a b c d"
    long_against_short = math.exp((math.log(2 / 4) + math.log(1 / 3) + math.log(0.5 / 2) + math.log(0.5 / 1)) / 4)
    assert self_bleu([short, long]) == pytest.approx((math.exp(-1) + long_against_short) / 2)


def test_clusters() -> None:
    one, two = "we add three and four to get seven", "first factor the polynomial then read its roots off"
    assert clusters([one, one + " .", two, two]) == 2
    assert clusters(["x", "x", "y"]) == 2 and clusters([]) == 0
