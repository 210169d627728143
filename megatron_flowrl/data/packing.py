"""The packing plan: which sequences share a micro-batch, and which data-parallel rank computes it.

A plan is made once per RL step, from lengths alone, and used by every pass of the step (reference log-probs,
old log-probs, update). A *sequence* is a prompt with its response. A *micro-batch* is one forward pass:
sequences end to end (THD layout), each padded to `sequence_alignment`, their sum padded to
`micro_batch_alignment` by one trailing pad segment, the *tail*. A *mini-batch* is one optimizer step. A
*filler* is a micro-batch without sequences: one aligned pad segment of zero weight, computed because every
rank has to enter the collectives of a pass equally often. Nothing is padded up to the token budget:
micro-batches differ in length.

Example: lengths 5, 3, 2 over two ranks, sequences padded to 2 and micro-batches to 8, at most 8 tokens each

    rank 0: [0 0 0 0 0 . | . .]    sequence 0 padded to 6, a tail of 2
    rank 1: [1 1 1 . 2 2 | . .]    sequences 1 and 2 padded to 4 and 2, a tail of 2

Method, for one mini-batch
  1. Even ranks. Longest first, each sequence goes to the rank of least cost. Rank totals matter most: ranks
     wait for each other in the gradient reduction, once a mini-batch.
  2. Count. Best-fit decreasing packs the padded lengths into bins of the token budget: at most 11/9 of the
     fewest possible, up to a constant (Johnson 1974); on the length mixes of RL the fewest or one more.
     Rounded up to a multiple of ranks x `micro_batch_group`, that is the number of micro-batches.
  3. Fill. Longest first, each sequence of a rank goes to its cheapest micro-batch with room: stages of a
     pipeline wait for each other once a micro-batch. Where that strands a sequence, best fit packs the rank.
  4. Where the ranks of 1 need more micro-batches than 2 counts, that many are filled from all sequences at
     once and dealt to ranks, costliest first, each to the cheapest rank with a free place. If the costliest
     rank then costs over 5% more, 1 and 3 stand: nothing is padded to the budget, so more micro-batches cost
     less than that.

Invariants, asserted on every plan by `check_plan`
  a. Every sequence is whole in exactly one micro-batch, and no micro-batch mixes mini-batches.
  b. The padded tokens of a micro-batch are at most `tokens_per_micro_batch`.
  c. Every padded length is a multiple of `sequence_alignment`, every micro-batch one of
     `micro_batch_alignment`, and neither holds more padding than that takes.
  d. In a mini-batch every rank has the same number of micro-batches: one or more, a multiple of
     `micro_batch_group`. Megatron's interleaved schedule (virtual pipeline) accepts M micro-batches if
     PP <= N <= M and M mod N is 0 or at least PP, where PP is the pipeline size and N is
     `microbatch_group_size_per_vp_stage`, by default PP. Every positive multiple of N will do, and with
     N = PP nothing else: the group is N. The other schedules take any M >= 1: the group is 1.
  e. In a micro-batch, sequences ascend. On a rank, micro-batches go from most tokens to fewest, fillers last,
     so that a lack of memory shows in the first one.
A plan depends on its arguments alone: costs are integers, ties are broken by index.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from heapq import heappop, heappush, heapreplace
from itertools import accumulate, pairwise
from math import lcm


def attention_crossover_tokens(hidden_size: int) -> int:
    """The sequence length at which causal attention costs as much as the rest of a dense layer.

    A layer of hidden size h has about 12 h^2 weights, hence 24 h^2 forward FLOPs a token. Causal attention
    over n tokens makes two products of 2 h FLOPs for each of n^2 / 2 pairs, hence 2 h n a token. They meet at
    n = 12 h. The backward pass doubles both, so the ratio holds for training too.
    """
    return 12 * hidden_size


def packing_alignment(
    tensor_model_parallel_size: int,
    context_parallel_size: int,
    sequence_parallel: bool,
    fp8_multiple: int = 1,
) -> tuple[int, int]:
    """(sequence_alignment, micro_batch_alignment) of a layout, in tokens summed over context-parallel ranks.

    Context parallelism cuts every sequence into 2 x CP equal chunks. What one of its ranks holds of a
    micro-batch is scattered over TP ranks by sequence parallelism and, gathered again, makes the rows of the
    matrix products, of which FP8 wants a multiple: `fp8_multiple` is 32 for MXFP8, 16 for the other recipes
    (`megatron.core.fp8_utils.get_fp8_align_size`), 1 without FP8.
    """
    _require_positive("tensor_model_parallel_size", tensor_model_parallel_size)
    _require_positive("context_parallel_size", context_parallel_size)
    _require_positive("fp8_multiple", fp8_multiple)
    sequence_alignment = 2 * context_parallel_size if context_parallel_size > 1 else 1
    tokens_per_rank = lcm(tensor_model_parallel_size if sequence_parallel else 1, fp8_multiple)
    return sequence_alignment, lcm(sequence_alignment, context_parallel_size * tokens_per_rank)


@dataclass(frozen=True, kw_only=True)
class PackingRules:
    """What a plan has to respect. Token counts are global: summed over context-parallel ranks.

    Raises ValueError, with the name and value of the setting, where it is out of range.
    """

    data_parallel_size: int
    """Ranks that share the sequences; context-parallel ranks, which share every sequence, not counted."""
    tokens_per_micro_batch: int
    """The token budget: at most so many tokens in a micro-batch, padding included."""
    sequence_alignment: int = 1
    """Every sequence is padded to a multiple of it: see `packing_alignment`."""
    micro_batch_alignment: int = 1
    """Every micro-batch is padded to a multiple of it, itself a multiple of `sequence_alignment`."""
    micro_batch_group: int = 1
    """The micro-batches of a rank come in multiples of it: see invariant d."""
    attention_crossover: int = attention_crossover_tokens(hidden_size=4096)
    """The sequence length at which attention costs as much as the rest of the model."""

    def __post_init__(self) -> None:
        for field in fields(self):
            _require_positive(field.name, getattr(self, field.name))
        if self.micro_batch_alignment % self.sequence_alignment:
            raise ValueError(
                f"micro_batch_alignment={self.micro_batch_alignment} must be a multiple of "
                f"sequence_alignment={self.sequence_alignment}"
            )
        if self.tokens_per_micro_batch < self.micro_batch_alignment:
            raise ValueError(
                f"tokens_per_micro_batch={self.tokens_per_micro_batch} must be at least "
                f"micro_batch_alignment={self.micro_batch_alignment}"
            )

    @property
    def longest_sequence(self) -> int:
        """The largest multiple of `micro_batch_alignment` in the budget: a sequence alone may fill it."""
        return self.tokens_per_micro_batch // self.micro_batch_alignment * self.micro_batch_alignment

    def padded_length(self, length: int) -> int:
        return _round_up(length, self.sequence_alignment)

    def tail(self, tokens: int) -> int:
        """Pad tokens after sequences of so many padded tokens; without any, a whole filler."""
        return _round_up(max(tokens, 1), self.micro_batch_alignment) - tokens

    def cost(self, tokens: int) -> int:
        """FLOPs of a sequence up to a factor, n (1 + n / crossover), as an integer."""
        return tokens * (self.attention_crossover + tokens)


class SequenceTooLong(ValueError):
    """A sequence does not fit into a micro-batch of its own."""

    def __init__(self, index: int, length: int, budget: int) -> None:
        super().__init__(index, length, budget)
        self.index, self.length, self.budget = index, length, budget

    def __str__(self) -> str:
        return (
            f"sequence {self.index} of {self.length} tokens, padded to its alignment, does not fit "
            f"tokens_per_micro_batch={self.budget}: raise the budget or limit prompt + response"
        )


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass. Token counts are global: summed over context-parallel ranks."""

    sequences: tuple[int, ...]
    """Indices into the lengths that were planned, ascending."""
    lengths: tuple[int, ...]
    """Real tokens of each sequence."""
    padded_lengths: tuple[int, ...]
    """Tokens each sequence occupies."""
    tail: int
    """Pad tokens after the last sequence."""

    @property
    def is_filler(self) -> bool:
        return not self.sequences

    @property
    def num_real_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def num_tokens(self) -> int:
        return sum(self.padded_lengths) + self.tail

    @property
    def cu_seqlens(self) -> tuple[int, ...]:
        """Padded segment boundaries from 0 to num_tokens; a tail is the last segment."""
        boundaries = tuple(accumulate(self.padded_lengths, initial=0))
        return (*boundaries, self.num_tokens) if self.tail else boundaries


@dataclass(frozen=True)
class PackingPlan:
    """The micro-batches of one RL step."""

    mini_batches: tuple[tuple[tuple[MicroBatch, ...], ...], ...]
    """Indexed [mini_batch][data_parallel_rank][i]."""
    rules: PackingRules

    def for_rank(self, mini_batch: int, data_parallel_rank: int) -> tuple[MicroBatch, ...]:
        return self.mini_batches[mini_batch][data_parallel_rank]

    def num_micro_batches(self, mini_batch: int) -> int:
        """Micro-batches of each rank: `num_microbatches` of Megatron's schedules."""
        return len(self.mini_batches[mini_batch][0])

    def num_sequences(self, mini_batch: int) -> int:
        """Sequences over all ranks: what a loss averaged over the mini-batch divides by."""
        return sum(len(batch.sequences) for rank in self.mini_batches[mini_batch] for batch in rank)

    @cached_property
    def micro_batches(self) -> tuple[MicroBatch, ...]:
        """All micro-batches of the step, fillers included."""
        return tuple(batch for ranks in self.mini_batches for rank in ranks for batch in rank)

    @property
    def num_tokens(self) -> int:
        """Tokens computed in one pass over the step, padding included."""
        return sum(batch.num_tokens for batch in self.micro_batches)

    @property
    def num_padding_tokens(self) -> int:
        return self.num_tokens - sum(batch.num_real_tokens for batch in self.micro_batches)

    @property
    def efficiency(self) -> float:
        """Real tokens among computed tokens."""
        return 1 - self.num_padding_tokens / self.num_tokens

    @property
    def imbalance(self) -> float:
        """Cost of the step, a mini-batch lasting as long as its costliest rank, over that of even ranks."""
        costs = [
            [sum(self.rules.cost(b - a) for batch in rank for a, b in pairwise(batch.cu_seqlens)) for rank in ranks]
            for ranks in self.mini_batches
        ]
        return self.rules.data_parallel_size * sum(map(max, costs)) / sum(map(sum, costs))

    def describe(self) -> str:
        """One line for the log."""
        counts = sorted(self.num_micro_batches(m) for m in range(len(self.mini_batches)))
        per_rank = f"{counts[0]}" if counts[0] == counts[-1] else f"{counts[0]}-{counts[-1]}"
        return (
            f"packing: sequences {sum(len(batch.sequences) for batch in self.micro_batches)}, mini-batches "
            f"{len(counts)} x ranks {self.rules.data_parallel_size} x micro-batches {per_rank} "
            f"(fillers {sum(batch.is_filler for batch in self.micro_batches)}), tokens {self.num_tokens} "
            f"({self.efficiency:.2%} real), costliest rank {self.imbalance:.3f} x mean"
        )


def plan_packing(
    lengths: Sequence[int], rules: PackingRules, mini_batch_of: Sequence[int] | None = None
) -> PackingPlan:
    """Plan the micro-batches of one RL step; the module docstring has the method and the invariants.

    Args:
        lengths: tokens of each sequence, prompt and response, at least 1.
        mini_batch_of: the mini-batch of each sequence, 0 to M - 1, none of them empty. None: all in one.

    Raises:
        SequenceTooLong: a sequence is over the budget on its own.
        ValueError: a length or mini-batch id is out of range.
    """
    mini_batch_of = [0] * len(lengths) if mini_batch_of is None else mini_batch_of
    mini_batches = _sequences_by_mini_batch(lengths, mini_batch_of)
    for i, length in enumerate(lengths):
        if length < 1:
            raise ValueError(f"lengths[{i}]={length} must be at least 1")
        if length > rules.longest_sequence:
            raise SequenceTooLong(i, length, rules.tokens_per_micro_batch)
    tokens = [rules.padded_length(length) for length in lengths]
    costs = [rules.cost(n) for n in tokens]

    def micro_batch(sequences: list[int]) -> MicroBatch:
        sequences = sorted(sequences)
        padded_lengths = tuple(tokens[i] for i in sequences)
        return MicroBatch(
            tuple(sequences),
            tuple(lengths[i] for i in sequences),
            padded_lengths,
            rules.tail(sum(padded_lengths)),
        )

    def rank(bins: list[list[int]]) -> tuple[MicroBatch, ...]:
        return tuple(sorted(map(micro_batch, bins), key=_place_in_rank))

    plan = PackingPlan(
        tuple(tuple(map(rank, _assign(sequences, tokens, costs, rules))) for sequences in mini_batches), rules
    )
    check_plan(plan, lengths, mini_batch_of)
    return plan


def check_plan(plan: PackingPlan, lengths: Sequence[int], mini_batch_of: Sequence[int]) -> None:
    """Assert the invariants of the module docstring."""
    rules, planned = plan.rules, sorted(i for batch in plan.micro_batches for i in batch.sequences)
    assert planned == list(range(len(lengths))), "a: a sequence is missing or planned twice"
    for m, ranks in enumerate(plan.mini_batches):
        counts = {len(rank) for rank in ranks}
        assert len(ranks) == rules.data_parallel_size and len(counts) == 1, f"d: uneven ranks, mini-batch {m}"
        assert 0 not in counts and counts.pop() % rules.micro_batch_group == 0, f"d: count, mini-batch {m}"
        for rank in ranks:
            assert list(rank) == sorted(rank, key=_place_in_rank), f"e: micro-batch order, mini-batch {m}"
            for batch in rank:
                assert all(mini_batch_of[i] == m for i in batch.sequences), f"a: not all of {m}: {batch}"
                assert batch.lengths == tuple(lengths[i] for i in batch.sequences), f"a: not whole: {batch}"
                assert batch.num_tokens <= rules.tokens_per_micro_batch, f"b: over budget: {batch}"
                assert batch.padded_lengths == tuple(map(rules.padded_length, batch.lengths)), f"c: {batch}"
                assert batch.tail == rules.tail(sum(batch.padded_lengths)), f"c: wrong tail: {batch}"
                assert all(a < b for a, b in pairwise(batch.sequences)), f"e: not ascending: {batch}"


def _place_in_rank(batch: MicroBatch) -> tuple[bool, int, tuple[int, ...]]:
    return batch.is_filler, -batch.num_tokens, batch.sequences


_TOLERATED_UNEVENNESS = 1.05  # how much costlier the costliest rank may become to save micro-batches


def _assign(sequences: list[int], tokens: list[int], costs: list[int], rules: PackingRules) -> list[list[list[int]]]:
    """The sequences of one mini-batch, [rank][micro-batch][i]; a filler is an empty list."""
    num_ranks, group, capacity = rules.data_parallel_size, rules.micro_batch_group, rules.longest_sequence
    longest_first = sorted(sequences, key=tokens.__getitem__, reverse=True)
    even_ranks = _spread(longest_first, tokens, costs, num_ranks, capacity=sum(tokens))

    fewest = _round_up(len(_best_fit(longest_first, tokens, capacity)), num_ranks * group)
    per_even_rank = _round_up(max(len(_best_fit(rank, tokens, capacity)) for rank in even_ranks), group)
    if per_even_rank * num_ranks > fewest:
        ranks = _deal(_fill(longest_first, tokens, costs, fewest, capacity), costs, num_ranks)
        costliest = max(_total([i for bin_ in rank for i in bin_], costs) for rank in ranks)
        if costliest <= _TOLERATED_UNEVENNESS * max(_total(rank, costs) for rank in even_ranks):
            return ranks
    return [_fill(rank, tokens, costs, per_even_rank, capacity) for rank in even_ranks]


def _total(sequences: list[int], costs: list[int]) -> int:
    return sum(costs[i] for i in sequences)


def _best_fit(longest_first: list[int], tokens: list[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: each sequence into the fullest bin that has room, or into a new one."""
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room, bin), ascending
    for i in longest_first:
        fullest = bisect_left(rooms, (tokens[i], 0))
        if fullest == len(rooms):
            room, bin_ = capacity, len(bins)
            bins.append([])
        else:
            room, bin_ = rooms.pop(fullest)
        bins[bin_].append(i)
        insort(rooms, (room - tokens[i], bin_))
    return bins


def _fill(
    longest_first: list[int], tokens: list[int], costs: list[int], num_bins: int, capacity: int
) -> list[list[int]]:
    """Bins of even cost where that fits the capacity, else best-fit bins, of which num_bins are enough."""
    try:
        return _spread(longest_first, tokens, costs, num_bins, capacity)
    except _NoRoom:
        bins = _best_fit(longest_first, tokens, capacity)
        return bins + [[] for _ in range(num_bins - len(bins))]


class _NoRoom(Exception):
    """An item found every bin too full."""


def _spread(
    largest_first: Sequence[int], sizes: Sequence[int], costs: Sequence[int], num_bins: int, capacity: int
) -> list[list[int]]:
    """Each item into the cheapest bin with room for its size.

    Takes O((items + bins) log bins): a bin without room is parked until the items have shrunk to it, so that
    an item is placed between any two parkings of the same bin.
    """
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    rooms = [capacity] * num_bins
    cheapest = [(0, bin_) for bin_ in range(num_bins)]  # heap of (cost, bin)
    parked: list[tuple[int, int, int]] = []  # heap of (-room, cost, bin)
    for i in largest_first:
        while parked and -parked[0][0] >= sizes[i]:
            _, cost, bin_ = heappop(parked)
            heappush(cheapest, (cost, bin_))
        while cheapest and rooms[cheapest[0][1]] < sizes[i]:
            cost, bin_ = heappop(cheapest)
            heappush(parked, (-rooms[bin_], cost, bin_))
        if not cheapest:
            raise _NoRoom
        cost, bin_ = cheapest[0]
        bins[bin_].append(i)
        rooms[bin_] -= sizes[i]
        heapreplace(cheapest, (cost + costs[i], bin_))
    return bins


def _deal(bins: list[list[int]], costs: list[int], num_ranks: int) -> list[list[list[int]]]:
    """Equally many bins to each rank: costliest first, each to the cheapest rank with a free place."""
    bin_costs = [_total(bin_, costs) for bin_ in bins]
    costliest_first = sorted(range(len(bins)), key=bin_costs.__getitem__, reverse=True)
    ranks = _spread(costliest_first, [1] * len(bins), bin_costs, num_ranks, len(bins) // num_ranks)
    return [[bins[b] for b in rank] for rank in ranks]


def _sequences_by_mini_batch(lengths: Sequence[int], mini_batch_of: Sequence[int]) -> list[list[int]]:
    if not lengths:
        raise ValueError("lengths is empty: there is nothing to pack")
    if len(mini_batch_of) != len(lengths):
        raise ValueError(f"mini_batch_of has {len(mini_batch_of)} entries for {len(lengths)} lengths")
    sequences: dict[int, list[int]] = {}
    for i, m in enumerate(mini_batch_of):
        sequences.setdefault(m, []).append(i)
    for m in range(len(sequences)):
        if m not in sequences:
            raise ValueError(
                f"mini-batch {m} has no sequence: mini_batch_of has ids from {min(sequences)} to "
                f"{max(sequences)}, and must use every one from 0 on"
            )
    return [sequences[m] for m in range(len(sequences))]


def _require_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name}={value} must be at least 1")


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
