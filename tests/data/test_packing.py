"""The packing plan: its invariants over arbitrary arguments, and its quality on the length mixes of RL."""

import math
import pickle
import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_flowrl.data.packing import (
    MicroBatch,
    PackingPlan,
    PackingRules,
    SequenceTooLong,
    attention_crossover_tokens,
    check_plan,
    packing_alignment,
    plan_packing,
)

Arguments = tuple[list[int], PackingRules, list[int]]


@st.composite
def arguments(draw: st.DrawFn) -> Arguments:
    """(lengths, rules, mini_batch_of): budgets from one alignment up, lengths up to the budget."""
    sequence_alignment = draw(st.sampled_from([1, 2, 4, 8]))
    micro_batch_alignment = sequence_alignment * draw(st.integers(1, 8))
    rules = PackingRules(
        data_parallel_size=draw(st.integers(1, 5)),
        tokens_per_micro_batch=micro_batch_alignment * draw(st.integers(1, 20)) + draw(st.integers(0, 7)),
        sequence_alignment=sequence_alignment,
        micro_batch_alignment=micro_batch_alignment,
        micro_batch_group=draw(st.integers(1, 4)),
        attention_crossover=draw(st.sampled_from([1, 64, 49152])),
    )
    lengths = draw(st.lists(st.integers(1, rules.longest_sequence), min_size=1, max_size=40))
    ids = [draw(st.integers(0, 3)) for _ in lengths]
    rank_of_id = {m: rank for rank, m in enumerate(sorted(set(ids)))}
    return lengths, rules, [rank_of_id[m] for m in ids]


def response_lengths(count: int, mean: int, seed: int, sigma: float = 0.9, cap: int = 8192) -> list[int]:
    """Log-normal with the given mean before the cap."""
    draw = random.Random(seed)
    mu = math.log(mean) - sigma**2 / 2
    return [min(cap, max(16, round(draw.lognormvariate(mu, sigma)))) for _ in range(count)]


def first_fit(sizes: list[int], capacity: int) -> int:
    """Bins that first-fit decreasing takes."""
    rooms: list[int] = []
    for size in sorted(sizes, reverse=True):
        at = next((i for i, room in enumerate(rooms) if room >= size), None)
        if at is None:
            rooms.append(capacity - size)
        else:
            rooms[at] -= size
    return len(rooms)


@given(arguments())
def test_every_sequence_is_whole_in_one_micro_batch_of_its_mini_batch(given_: Arguments) -> None:
    lengths, rules, mini_batch_of = given_
    plan = plan_packing(lengths, rules, mini_batch_of)
    found = {
        sequence: (m, length)
        for m, ranks in enumerate(plan.mini_batches)
        for rank in ranks
        for batch in rank
        for sequence, length in zip(batch.sequences, batch.lengths, strict=True)
    }
    assert found == dict(enumerate(zip(mini_batch_of, lengths, strict=True)))
    assert sum(len(batch.sequences) for batch in plan.micro_batches) == len(lengths)
    for m in range(len(plan.mini_batches)):
        assert plan.num_sequences(m) == mini_batch_of.count(m)


@given(arguments())
def test_budget_alignment_and_order_hold(given_: Arguments) -> None:
    lengths, rules, mini_batch_of = given_
    for batch in plan_packing(lengths, rules, mini_batch_of).micro_batches:
        assert 0 < batch.num_tokens <= rules.tokens_per_micro_batch
        assert batch.num_tokens % rules.micro_batch_alignment == 0
        assert all(boundary % rules.sequence_alignment == 0 for boundary in batch.cu_seqlens)
        assert batch.cu_seqlens[0] == 0 and batch.cu_seqlens[-1] == batch.num_tokens
        assert list(batch.cu_seqlens) == sorted(set(batch.cu_seqlens))
        assert len(batch.cu_seqlens) == 1 + len(batch.sequences) + (batch.tail > 0)
        assert list(batch.sequences) == sorted(batch.sequences)
        for length, padded in zip(batch.lengths, batch.padded_lengths, strict=True):
            assert 0 <= padded - length < rules.sequence_alignment
        if batch.is_filler:
            assert batch.num_tokens == batch.tail == rules.micro_batch_alignment
            assert batch.num_real_tokens == 0
        else:
            assert batch.tail < rules.micro_batch_alignment


@given(arguments())
def test_ranks_have_equally_many_micro_batches_in_whole_groups_largest_first(given_: Arguments) -> None:
    lengths, rules, mini_batch_of = given_
    plan = plan_packing(lengths, rules, mini_batch_of)
    for m, ranks in enumerate(plan.mini_batches):
        assert len(ranks) == rules.data_parallel_size
        assert {len(rank) for rank in ranks} == {plan.num_micro_batches(m)}
        assert plan.num_micro_batches(m) >= rules.micro_batch_group
        assert plan.num_micro_batches(m) % rules.micro_batch_group == 0
        for rank in ranks:
            sizes = [(not batch.is_filler, batch.num_tokens) for batch in rank]
            assert sizes == sorted(sizes, reverse=True)


@given(arguments())
def test_micro_batches_are_on_average_half_full_before_grouping(given_: Arguments) -> None:
    lengths, rules, mini_batch_of = given_
    plan = plan_packing(lengths, rules, mini_batch_of)
    step = rules.data_parallel_size * rules.micro_batch_group
    for m in range(len(plan.mini_batches)):
        padded = [rules.padded_length(n) for n, of in zip(lengths, mini_batch_of, strict=True) if of == m]
        most = 2 * math.ceil(sum(padded) / rules.longest_sequence)
        assert plan.num_micro_batches(m) * rules.data_parallel_size <= math.ceil(most / step) * step


@given(arguments())
def test_totals_add_up(given_: Arguments) -> None:
    lengths, rules, mini_batch_of = given_
    plan = plan_packing(lengths, rules, mini_batch_of)
    assert plan.num_tokens - plan.num_padding_tokens == sum(lengths)
    assert plan.efficiency == pytest.approx(sum(lengths) / plan.num_tokens)
    assert 1 <= plan.imbalance <= rules.data_parallel_size
    assert f"sequences {len(lengths)}," in plan.describe() and "\n" not in plan.describe()


@given(arguments())
def test_plan_depends_on_its_arguments_alone(given_: Arguments) -> None:
    lengths, rules, mini_batch_of = given_
    plan = plan_packing(lengths, rules, mini_batch_of)
    assert plan_packing(tuple(lengths), replace(rules), tuple(mini_batch_of)) == plan


def test_the_example_of_the_docstring() -> None:
    rules = PackingRules(data_parallel_size=2, tokens_per_micro_batch=8, sequence_alignment=2, micro_batch_alignment=8)
    plan = plan_packing([5, 3, 2], rules)
    assert plan.for_rank(0, 0) == (MicroBatch((0,), (5,), (6,), 2),)
    assert plan.for_rank(0, 1) == (MicroBatch((1, 2), (3, 2), (4, 2), 2),)
    assert plan.for_rank(0, 1)[0].cu_seqlens == (0, 4, 6, 8)


def test_one_sequence_for_two_ranks_makes_a_filler() -> None:
    rules = PackingRules(
        data_parallel_size=2, tokens_per_micro_batch=64, sequence_alignment=4, micro_batch_alignment=16
    )
    plan = plan_packing([30], rules)
    assert plan.for_rank(0, 0) == (MicroBatch((0,), (30,), (32,), 0),)
    (filler,) = plan.for_rank(0, 1)
    assert filler.is_filler and filler == MicroBatch((), (), (), tail=16) and filler.cu_seqlens == (0, 16)
    assert plan.num_sequences(0) == 1 and plan.num_padding_tokens == 18


def test_a_tight_budget_gives_each_sequence_its_own_micro_batch() -> None:
    plan = plan_packing([60, 64, 58, 62], PackingRules(data_parallel_size=2, tokens_per_micro_batch=64))
    assert sorted(batch.sequences for batch in plan.micro_batches) == [(0,), (1,), (2,), (3,)]
    assert plan.num_micro_batches(0) == 2 and plan.num_padding_tokens == 0


def test_a_budget_without_a_spare_token_is_packed_by_best_fit() -> None:
    """By cost alone, 5 and 4 would share a micro-batch, and the last 2 would need a third one."""
    plan = plan_packing([2, 4, 5, 4, 5], PackingRules(data_parallel_size=1, tokens_per_micro_batch=10))
    assert {batch.sequences for batch in plan.micro_batches} == {(2, 4), (0, 1, 3)}


@pytest.mark.parametrize(
    ("attention_crossover", "micro_batches"),
    [
        pytest.param(1000, 1, id="costs-like-tokens"),
        pytest.param(20, 1, id="unevenness-tolerated"),
        pytest.param(1, 2, id="one-more-for-even-ranks"),
    ],
)
def test_micro_batches_are_fewest_unless_that_makes_ranks_uneven(attention_crossover: int, micro_batches: int) -> None:
    """The budget holds {8, 2} and {2, 2, 2, 2, 2}, but with costly attention the 8 is better alone."""
    rules = PackingRules(data_parallel_size=2, tokens_per_micro_batch=10, attention_crossover=attention_crossover)
    plan = plan_packing([8, 2, 2, 2, 2, 2, 2], rules)
    assert plan.num_micro_batches(0) == micro_batches
    assert (MicroBatch((0,), (8,), (8,), 0) in plan.micro_batches) == (micro_batches == 2)


def test_a_micro_batch_too_full_for_one_sequence_takes_a_shorter_one() -> None:
    """{5, 4} is cheapest when the 2 comes but lacks room; the 1 then evens it with {7, 2}."""
    rules = PackingRules(data_parallel_size=1, tokens_per_micro_batch=10, attention_crossover=1)
    plan = plan_packing([1, 4, 7, 2, 5], rules)
    assert {batch.sequences for batch in plan.micro_batches} == {(0, 1, 4), (2, 3)}


def test_where_even_ranks_need_more_micro_batches_the_fewest_are_dealt_evenly() -> None:
    """Ranks {7, 5} and {6, 6, 5} would need three micro-batches each; {5, 5} and 7 go to different ranks."""
    rules = PackingRules(data_parallel_size=2, tokens_per_micro_batch=10, attention_crossover=1)
    plan = plan_packing([5, 6, 6, 5, 7], rules)
    assert [{batch.sequences for batch in rank} for rank in plan.mini_batches[0]] == [
        {(0, 3), (2,)},
        {(1,), (4,)},
    ]


@pytest.mark.parametrize(("sequences", "micro_batches"), [(1, 4), (16, 4), (17, 8), (33, 12)])
def test_micro_batches_come_in_groups_of_the_virtual_pipeline(sequences: int, micro_batches: int) -> None:
    rules = PackingRules(data_parallel_size=2, tokens_per_micro_batch=100, micro_batch_group=4)
    assert plan_packing([45] * sequences, rules).num_micro_batches(0) == micro_batches


def test_mini_batches_are_planned_apart() -> None:
    rules = PackingRules(data_parallel_size=1, tokens_per_micro_batch=100)
    plan = plan_packing([10, 90, 10, 90, 90], rules, [0, 1, 0, 1, 1])
    assert [plan.num_micro_batches(m) for m in (0, 1)] == [1, 3]
    assert [plan.num_sequences(m) for m in (0, 1)] == [2, 3]


REALISTIC = [
    pytest.param((1, 1, False, 1), id="plain"),
    pytest.param((4, 2, True, 1), id="TP4-CP2"),
    pytest.param((4, 2, True, 16), id="TP4-CP2-FP8"),
    pytest.param((8, 4, True, 32), id="TP8-CP4-MXFP8"),
]


@pytest.mark.parametrize("layout", REALISTIC)
@pytest.mark.parametrize("mean", [1000, 2000])
@pytest.mark.parametrize("tokens_per_micro_batch", [16384, 32768])
def test_efficiency_and_balance_on_realistic_lengths(
    layout: tuple[int, int, bool, int], mean: int, tokens_per_micro_batch: int
) -> None:
    sequence_alignment, micro_batch_alignment = packing_alignment(*layout)
    rules = PackingRules(
        data_parallel_size=4,
        tokens_per_micro_batch=tokens_per_micro_batch,
        sequence_alignment=sequence_alignment,
        micro_batch_alignment=micro_batch_alignment,
    )
    for seed in range(3):
        lengths = response_lengths(1024, mean, seed)
        plan = plan_packing(lengths, rules, [i // 256 for i in range(1024)])
        assert plan.efficiency >= 0.97
        assert plan.imbalance <= 1.02
        for m in range(4):
            padded = [rules.padded_length(n) for n in lengths[256 * m : 256 * (m + 1)]]
            fewest = math.ceil(first_fit(padded, rules.longest_sequence) / 4)
            assert plan.num_micro_batches(m) <= fewest


@pytest.mark.parametrize("micro_batch_group", [1, 4])
def test_balance_beats_round_robin_on_a_heavy_tail(micro_batch_group: int) -> None:
    rules = PackingRules(
        data_parallel_size=8,
        tokens_per_micro_batch=32768,
        micro_batch_group=micro_batch_group,
        attention_crossover=attention_crossover_tokens(hidden_size=1024),
    )
    for seed in range(5):
        lengths = response_lengths(256, 1500, seed, sigma=1.4, cap=32768)
        plan = plan_packing(lengths, rules)
        costs = [sum(rules.cost(n) for n in lengths[rank::8]) for rank in range(8)]
        round_robin = max(costs) * 8 / sum(costs)
        costliest_alone = max(map(rules.cost, lengths)) * 8 / sum(costs)
        assert plan.imbalance <= 1.02 * max(1, costliest_alone)
        assert plan.imbalance - 1 < 0.7 * (round_robin - 1)


def test_micro_batches_of_a_rank_have_even_costs() -> None:
    rules = PackingRules(data_parallel_size=2, tokens_per_micro_batch=32768)
    plan = plan_packing(response_lengths(512, 1500, seed=0), rules)
    for rank in plan.mini_batches[0]:
        costs = [sum(map(rules.cost, batch.padded_lengths)) for batch in rank]
        assert max(costs) <= 1.05 * sum(costs) / len(costs)


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ((1, 1, False, 1), (1, 1)),
        ((4, 1, False, 1), (1, 1)),
        ((4, 1, True, 1), (1, 4)),
        ((4, 2, True, 1), (4, 8)),
        ((1, 3, False, 1), (6, 6)),
        ((1, 1, False, 16), (1, 16)),
        ((8, 2, True, 16), (4, 32)),
        ((6, 2, True, 16), (4, 96)),
        ((4, 4, True, 32), (8, 128)),
    ],
)
def test_alignment_of_parallel_layouts(layout: tuple[int, int, bool, int], expected: tuple[int, int]) -> None:
    assert packing_alignment(*layout) == expected


def test_attention_crossover_is_where_the_flops_meet() -> None:
    hidden_size = 1024
    tokens = attention_crossover_tokens(hidden_size)
    weights = 4 * hidden_size**2 + 2 * hidden_size * 4 * hidden_size
    pairs = tokens**2 / 2
    assert 2 * weights * tokens == 2 * (2 * hidden_size) * pairs


def test_a_sequence_over_the_budget_is_named() -> None:
    rules = PackingRules(data_parallel_size=1, tokens_per_micro_batch=100, micro_batch_alignment=8)
    assert rules.longest_sequence == 96
    plan_packing([96], rules)
    with pytest.raises(SequenceTooLong, match=r"sequence 1 of 97 tokens.*=100") as caught:
        plan_packing([5, 97], rules)
    error = pickle.loads(pickle.dumps(caught.value))
    assert (error.index, error.length, error.budget) == (1, 97, 100) and str(error) == str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data_parallel_size": 0}, "data_parallel_size=0 "),
        ({"tokens_per_micro_batch": -1}, "tokens_per_micro_batch=-1 "),
        ({"sequence_alignment": 0}, "sequence_alignment=0 "),
        ({"micro_batch_alignment": 0}, "micro_batch_alignment=0 "),
        ({"micro_batch_group": 0}, "micro_batch_group=0 "),
        ({"attention_crossover": 0}, "attention_crossover=0 "),
        ({"sequence_alignment": 4, "micro_batch_alignment": 6}, "micro_batch_alignment=6 .*alignment=4"),
        ({"micro_batch_alignment": 128}, "tokens_per_micro_batch=100 .*micro_batch_alignment=128"),
    ],
)
def test_bad_rules_are_named(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PackingRules(**{"data_parallel_size": 1, "tokens_per_micro_batch": 100, **settings})


@pytest.mark.parametrize(
    ("lengths", "mini_batch_of", "message"),
    [
        ([], None, "lengths is empty"),
        ([3, 0], None, r"lengths\[1\]=0 "),
        ([3, 4], [0], "1 entries for 2 lengths"),
        ([3, 4], [0, 2], "mini-batch 1 has no sequence"),
        ([3, 4], [1, 2], "mini-batch 0 has no sequence"),
        ([3, 4], [-1, 0], "mini-batch 1 has no sequence.*from -1 to 0"),
    ],
)
def test_bad_sequences_are_named(lengths: list[int], mini_batch_of: list[int] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_packing(lengths, PackingRules(data_parallel_size=1, tokens_per_micro_batch=100), mini_batch_of)


def test_bad_layouts_are_named() -> None:
    with pytest.raises(ValueError, match="context_parallel_size=0 "):
        packing_alignment(1, 0, False)


CORRUPTIONS: list[Any] = [
    pytest.param("a: .* missing or planned twice", lambda a, b, f: ((a, f), (f, f)), id="lost"),
    pytest.param("a: .* missing or planned twice", lambda a, b, f: ((a, b), (b, f)), id="twice"),
    pytest.param("a: not whole", lambda a, b, f: ((a, replace(b, lengths=(19,))), (f, f)), id="cut"),
    pytest.param("d: uneven", lambda a, b, f: ((a, b), (f,)), id="uneven"),
    pytest.param("d: uneven", lambda a, b, f: ((a, b),), id="rank-missing"),
    pytest.param("d: count", lambda a, b, f: ((a, b, f), (f, f, f)), id="group"),
    pytest.param("c: wrong tail", lambda a, b, f: ((a, replace(b, tail=12)), (f, f)), id="tail"),
    pytest.param("c: Micro", lambda a, b, f: ((replace(a, padded_lengths=(32, 10)), b), (f, f)), id="padding"),
    pytest.param("e: micro-batch order", lambda a, b, f: ((b, a), (f, f)), id="order"),
    pytest.param(
        "e: not ascending",
        lambda a, b, f: ((MicroBatch((1, 0), (10, 30), (12, 32), 4), b), (f, f)),
        id="descending",
    ),
    pytest.param(
        "b: over budget",
        lambda a, b, f: ((MicroBatch((0, 1, 2), (30, 10, 20), (32, 12, 20), 0), f), (f, f)),
        id="budget",
    ),
]


@pytest.mark.parametrize(("message", "corrupt"), CORRUPTIONS)
def test_check_refuses_a_corrupt_plan(message: str, corrupt: Any) -> None:
    rules = PackingRules(
        data_parallel_size=2,
        tokens_per_micro_batch=48,
        sequence_alignment=4,
        micro_batch_alignment=8,
        micro_batch_group=2,
    )
    lengths, mini_batch_of = [30, 10, 20], [0, 0, 0]
    a, b = MicroBatch((0, 1), (30, 10), (32, 12), 4), MicroBatch((2,), (20,), (20,), 4)
    filler = MicroBatch((), (), (), 8)
    check_plan(PackingPlan((((a, b), (filler, filler)),), rules), lengths, mini_batch_of)
    with pytest.raises(AssertionError, match=message):
        check_plan(PackingPlan((corrupt(a, b, filler),), rules), lengths, mini_batch_of)


def test_check_refuses_mixed_mini_batches() -> None:
    rules = PackingRules(data_parallel_size=1, tokens_per_micro_batch=8)
    plan = plan_packing([3, 4], rules)
    with pytest.raises(AssertionError, match="a: not all of 0"):
        check_plan(plan, [3, 4], [0, 1])


def test_arguments_are_left_as_they_are() -> None:
    lengths = response_lengths(64, 100, seed=1)
    before = list(lengths)
    plan_packing(lengths, PackingRules(data_parallel_size=2, tokens_per_micro_batch=8192))
    assert lengths == before
