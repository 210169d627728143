"""Tasks whose answers can be counted, so that it is known exactly what a policy has learned."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Task:
    """P prompts of one length, and the K answers that each can have.

    Where answers are longer than a token, a prompt has two different ones: attention over equal tokens alone is the
    same for any number of them, so that after the prompt (1,) a model could not tell (1,) from (1, 1).

    An answer ends with `eos`, or without it at `longest` tokens; where `eos` is None all have that length. So every
    answer that a model can sample is in `answers`, and their probabilities sum to 1.

    log_target fp64 [P, K], not normalised. modes: for each prompt the answers around each of its modes, as indices.
    """

    name: str
    vocab_size: int
    prompts: tuple[Tokens, ...]
    longest: int
    eos: int | None
    log_target: Tensor
    modes: tuple[tuple[Tensor, ...], ...]

    @cached_property
    def column(self) -> dict[Tokens, int]:
        """Where an answer stands in log_target."""
        answers = enumerate_answers(self.vocab_size, self.longest, self.eos)
        return {answer: index for index, answer in enumerate(answers)}

    @property
    def log_partition(self) -> Tensor:
        """log Z of each prompt, fp64 [P]."""
        return torch.logsumexp(self.log_target, dim=1)

    @property
    def num_modes(self) -> int:
        """Modes of all prompts."""
        return sum(map(len, self.modes))


def enumerate_answers(vocab_size: int, longest: int, eos: int | None) -> list[Tokens]:
    """Every answer: those that end with `eos` by length, then those that do not; each in the order of its tokens."""
    others = [token for token in range(vocab_size) if token != eos]
    ended = [] if eos is None else [
        (*tokens, eos) for length in range(longest) for tokens in itertools.product(others, repeat=length)
    ]  # fmt: skip
    return [*ended, *itertools.product(others, repeat=longest)]


def mixture() -> Task:
    """The paper's figure 1: 100 states, p(x) ~ exp(-(x-19)^2/10) + 2 exp(-(x-49)^2/10) + exp(-(x-79)^2/10).

    Nothing underflows, as its logarithm is computed directly: the least, at x = 99, is -40. A mode reaches 7 states to
    both sides, which is 0.998 of its mass.
    """
    states = torch.arange(100, dtype=torch.float64)
    centres, heights = (19, 49, 79), torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64)
    bumps = torch.stack([height.log() - (states - centre) ** 2 / 10 for centre, height in zip(centres, heights)])  # noqa: B905
    modes = tuple(torch.nonzero((states - centre).abs() <= 7).squeeze(1) for centre in centres)
    return Task("mixture", 100, ((0,),), 1, None, torch.logsumexp(bumps, dim=0)[None], (modes,))


_SYMBOLS, _FLOOR = 16, -5.0
# For each prompt: how high its modes are, and their centres.
_MODES: tuple[tuple[float, tuple[Tokens, ...]], ...] = (
    (0.0, ((7, 7, 7),)),
    (1.0, ((3, 3, 12), (12, 12, 3))),
    (-1.0, ((2, 13, 2), (13, 2, 13), (8, 8, 8))),
    (0.5, ((2, 2, 2), (2, 13, 13), (13, 2, 13), (13, 13, 2), (8, 8, 8))),
)


def conditional() -> Task:
    """Four prompts, 4,096 answers of three tokens; one, two, three and five modes, and another log Z for each prompt.

    The target is the sum of exp(height - |y - centre|^2 / 12) over the modes, and of exp(-5), so that no answer is
    impossible. A mode reaches as far as |y - centre|^2 = 24.
    """
    places = torch.tensor(enumerate_answers(_SYMBOLS, 3, None), dtype=torch.float64)
    rows, modes = [], []
    for height, centres in _MODES:
        distances = [((places - torch.tensor(centre, dtype=torch.float64)) ** 2).sum(1) for centre in centres]
        floor = torch.full_like(distances[0], _FLOOR)
        rows.append(torch.logsumexp(torch.stack([*(height - distance / 12 for distance in distances), floor]), dim=0))
        modes.append(tuple(torch.nonzero(distance <= 24).squeeze(1) for distance in distances))
    prompts = tuple((prompt, _SYMBOLS - 1 - prompt) for prompt in range(len(_MODES)))
    return Task("conditional", _SYMBOLS, prompts, 3, None, torch.stack(rows), tuple(modes))


def unequal() -> Task:
    """121 answers of one to four tokens; twelve, of every length, are worth 1 and the others exp(-3).

    Where lengths differ shows what dividing log-probs by the length does to the distribution that is learned.
    """
    answers = enumerate_answers(4, 4, 0)
    worth = []
    for length, count in ((1, 1), (2, 2), (3, 3), (4, 6)):
        indices = [index for index, answer in enumerate(answers) if len(answer) == length]
        worth += [indices[(2 * i + 1) * len(indices) // (2 * count)] for i in range(count)]
    log_target = torch.full((1, len(answers)), -3.0, dtype=torch.float64)
    log_target[0, worth] = 0.0
    return Task("unequal", 4, ((1, 2),), 4, 0, log_target, (tuple(torch.tensor([index]) for index in worth),))


TASKS = {task.name: task for task in (mixture(), conditional(), unequal())}


@dataclass(frozen=True)
class Distance:
    """How far a policy is from the target: KL divergences in nats, means over prompts; modes of all prompts."""

    kl_target_policy: float
    kl_policy_target: float
    modes_covered: int


def distance(task: Task, log_probs: Tensor) -> Distance:
    """log_probs fp64 [P, K]: the policy's. A mode is covered if the policy has a tenth of the target's mass there."""
    log_target = torch.log_softmax(task.log_target, dim=1)
    target, policy = log_target.exp(), log_probs.exp()
    covered = sum(
        bool(policy[prompt, around].sum() >= 0.1 * target[prompt, around].sum())
        for prompt, modes in enumerate(task.modes)
        for around in modes
    )
    return Distance(
        kl_target_policy=float((target * (log_target - log_probs)).sum(1).mean()),
        kl_policy_target=float((policy * (log_probs - log_target)).sum(1).mean()),
        modes_covered=covered,
    )
