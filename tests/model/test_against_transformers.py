"""Log-probs and entropies of every family against transformers', through a packing plan and Megatron's schedule."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_flowrl.checkpoint.load import load_weights
from megatron_flowrl.checkpoint.sources import SafetensorsSource
from megatron_flowrl.config import Config, load_config
from megatron_flowrl.data.batch import PackedBatch, TokenSequence
from megatron_flowrl.model.architecture import read_architecture
from megatron_flowrl.model.build import ParallelModel, build_parallel_model, freeze
from megatron_flowrl.model.packing_rules import packing_rules, plan
from megatron_flowrl.platform import Platform
from megatron_flowrl.training.passes import ScoredTokens, forward_only, gather_tokens, local_batches
from tests.tiny_models import MODELS, VOCABULARY, save_model

LONGEST = 300
# (prompt, response) lengths at every edge: one token in all, no response, one token of either, the longest of each.
EDGES = [(1, 0), (1, 1), (1, 2), (2, 1), (7, 0), (LONGEST, 0), (LONGEST - 1, 1), (1, LONGEST - 1)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny models' Hugging Face folders, by name."""
    return {name: save_model(name, tmp_path_factory.mktemp(name)) for name in MODELS}


def ragged_sequences(count: int, seed: int) -> list[TokenSequence]:
    """Sequences of 1 to LONGEST tokens, prompt and response cut anywhere, the edges among them; order shuffled."""
    draw = random.Random(seed)
    lengths = list(EDGES)
    while len(lengths) < count:
        total = draw.randint(1, LONGEST)
        prompt = draw.randint(1, total)
        lengths.append((prompt, total - prompt))
    draw.shuffle(lengths)

    def tokens(number: int) -> tuple[int, ...]:
        return tuple(draw.choices(range(VOCABULARY), k=number))

    return [TokenSequence(tokens(prompt), tokens(response)) for prompt, response in lengths]


@dataclass(frozen=True)
class Scorer:
    """A loaded model and how to run sequences through it."""

    model: ParallelModel
    config: Config
    platform: Platform

    def batches(self, sequences: Sequence[TokenSequence], tokens_per_micro_batch: int) -> list[PackedBatch]:
        data = replace(self.config.data, tokens_per_micro_batch=tokens_per_micro_batch)
        rules = packing_rules(replace(self.config, data=data), self.model.architecture, 1)
        return local_batches(sequences, plan([len(s) for s in sequences], rules), 0, self.platform.device)

    def score(
        self,
        sequences: Sequence[TokenSequence],
        *,
        tokens_per_micro_batch: int = 4096,
        temperature: float = 1.0,
        entropy: bool = False,
    ) -> ScoredTokens:
        batches = self.batches(sequences, tokens_per_micro_batch)
        settings = replace(self.config.log_prob, temperature=temperature)
        outputs = forward_only(self.model.chunks, batches, settings, entropy="detached" if entropy else "none")
        return gather_tokens(sequences, batches, outputs, entropy=entropy)


def load_scorer(folder: Path, platform: Platform, dtype: str = "float32") -> Scorer:
    config = load_config(None, [f"model.path={folder}", f"precision.dtype={dtype}"])
    architecture = read_architecture(folder)
    model = freeze(build_parallel_model(architecture, config, platform))
    load_weights(model, SafetensorsSource(folder, architecture))
    return Scorer(model, config, platform)


@torch.no_grad()
def transformers_scores(
    folder: Path,
    sequences: Sequence[TokenSequence],
    *,
    dtype: torch.dtype = torch.float32,
    weights: torch.dtype = torch.float32,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(log-probs, entropies) of all response tokens, sequence by sequence, computed in `dtype` on weights rounded to
    `weights`; the softmax is fp32. Sequences of similar length share a batch, padded on the right."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=weights, local_files_only=True).to(dtype).eval()
    results: dict[int, tuple[Tensor, Tensor]] = {}
    by_length = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    for start in range(0, len(by_length), 32):
        batch = by_length[start : start + 32]
        input_ids = torch.zeros((len(batch), len(sequences[batch[-1]])), dtype=torch.int64)
        for row, i in enumerate(batch):
            input_ids[row, : len(sequences[i])] = torch.tensor([*sequences[i].prompt, *sequences[i].response])
        all_log_probs = torch.log_softmax(model(input_ids).logits.float() / temperature, dim=-1)
        for row, i in enumerate(batch):
            predicting = all_log_probs[row, len(sequences[i].prompt) - 1 : len(sequences[i]) - 1]
            labels = torch.tensor(sequences[i].response, dtype=torch.int64)
            entropies = -(predicting.exp() * predicting).sum(-1)
            results[i] = predicting.gather(1, labels.unsqueeze(1)).squeeze(1), entropies
    log_probs, entropies = zip(*(results[i] for i in range(len(sequences))), strict=True)
    return torch.cat(log_probs), torch.cat(entropies)


def largest(difference: Tensor) -> float:
    return float(difference.abs().max())


def mean(difference: Tensor) -> float:
    return float(difference.abs().mean())


@pytest.mark.parametrize("name", MODELS)
def test_log_probs_and_entropies_equal_transformers(
    name: str, folders: dict[str, Path], one_rank_platform: Platform
) -> None:
    sequences = ragged_sequences(500, seed=len(name))
    expected, expected_entropy = transformers_scores(folders[name], sequences)
    exact, exact_entropy = transformers_scores(folders[name], sequences, dtype=torch.float64)
    scored = load_scorer(folders[name], one_rank_platform).score(sequences, entropy=True)
    assert scored.entropy is not None
    for ours, theirs, in_float64 in (
        (scored.log_probs, expected, exact),
        (scored.entropy, expected_entropy, exact_entropy),
    ):
        # Where transformers' own rounding is more than that (Mistral: 2e-5, which processor it is decides), by it.
        assert largest(ours - theirs) <= max(1e-5, largest(theirs - in_float64))
        assert mean(ours - theirs) <= 1e-6
    for index, sequence in enumerate(sequences):
        assert len(scored.of_sequence(index)[0]) == len(sequence.response)


def test_the_vocabulary_was_padded_and_the_sequences_packed(
    folders: dict[str, Path], one_rank_platform: Platform
) -> None:
    """The comparison above covers what it claims to: padded ids, several micro-batches, several sequences in one."""
    scorer, sequences = load_scorer(folders["qwen2"], one_rank_platform), ragged_sequences(500, seed=5)
    assert scorer.model.modules[0].vocab_size > VOCABULARY
    assert {len(s) for s in sequences} >= {1, LONGEST} and {len(s.response) for s in sequences} >= {0, 1}
    batches = scorer.batches(sequences, tokens_per_micro_batch=4096)
    assert len(batches) > 10 and max(batch.num_sequences for batch in batches) > 10
    assert sum(len(batch.rows) for batch in batches) == sum(len(s.response) for s in sequences)


@pytest.mark.parametrize("name", ["qwen2_tied", "qwen3"])
@pytest.mark.parametrize("temperature", [0.6, 1.7])
def test_temperature_divides_the_logits(
    name: str, temperature: float, folders: dict[str, Path], one_rank_platform: Platform
) -> None:
    sequences = ragged_sequences(60, seed=2)
    expected, expected_entropy = transformers_scores(folders[name], sequences, temperature=temperature)
    scored = load_scorer(folders[name], one_rank_platform).score(sequences, temperature=temperature, entropy=True)
    assert scored.entropy is not None
    assert largest(scored.log_probs - expected) <= 1e-5
    assert largest(scored.entropy - expected_entropy) <= 1e-5


def test_nothing_but_empty_responses_gives_nothing(folders: dict[str, Path], one_rank_platform: Platform) -> None:
    scorer = load_scorer(folders["qwen2"], one_rank_platform)
    scored = scorer.score([TokenSequence((3, 4), ()), TokenSequence((5,), ())], entropy=True)
    assert scored.offsets == (0, 0, 0)
    assert scored.log_probs.shape == (0,) and scored.entropy is not None and scored.entropy.shape == (0,)


@pytest.mark.parametrize("name", MODELS)
def test_bf16_is_as_close_to_the_truth_as_transformers_bf16(
    name: str, folders: dict[str, Path], one_rank_platform: Platform
) -> None:
    """The truth: fp32 arithmetic on the same bf16-rounded weights.

    Ours is off by no more than transformers' bf16 on average, as the softmax is fp32 on both sides and ours also sums
    the logits in fp32; at the worst token by half as much again at most. In numbers, for log-probs down to -11:
    0.02 on average, 0.25 at the worst token.
    """
    sequences = ragged_sequences(120, seed=11)
    truth, _ = transformers_scores(folders[name], sequences, weights=torch.bfloat16)
    theirs, _ = transformers_scores(folders[name], sequences, weights=torch.bfloat16, dtype=torch.bfloat16)
    ours = load_scorer(folders[name], one_rank_platform, "bfloat16").score(sequences).log_probs
    assert ours.dtype == torch.float32
    assert mean(ours - truth) <= min(0.02, mean(theirs - truth))
    assert largest(ours - truth) <= min(0.25, 1.5 * largest(theirs - truth))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_passes_are_bitwise_equal(dtype: str, folders: dict[str, Path], one_rank_platform: Platform) -> None:
    scorer, sequences = load_scorer(folders["llama"], one_rank_platform, dtype), ragged_sequences(60, seed=3)
    first, second = (scorer.score(sequences, entropy=True) for _ in range(2))
    assert first.entropy is not None and second.entropy is not None
    assert torch.equal(first.log_probs, second.log_probs) and torch.equal(first.entropy, second.entropy)


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama"])
def test_packing_does_not_matter(name: str, folders: dict[str, Path], one_rank_platform: Platform) -> None:
    scorer, sequences = load_scorer(folders[name], one_rank_platform), ragged_sequences(60, seed=4)
    expected = scorer.score(sequences, tokens_per_micro_batch=100_000)
    backwards = list(reversed(range(len(sequences))))
    for tokens_per_micro_batch in (LONGEST, 1000):
        scored = scorer.score([sequences[i] for i in backwards], tokens_per_micro_batch=tokens_per_micro_batch)
        for place, index in enumerate(backwards):
            assert torch.allclose(scored.of_sequence(place)[0], expected.of_sequence(index)[0], rtol=1e-5, atol=1e-5)


def test_sequences_of_a_micro_batch_do_not_see_one_another(
    folders: dict[str, Path], one_rank_platform: Platform
) -> None:
    """Other tokens in one sequence change nothing, not even a bit, in the others of its micro-batch."""
    scorer, sequences = load_scorer(folders["llama"], one_rank_platform), ragged_sequences(20, seed=6)
    changed = max(range(len(sequences)), key=lambda i: len(sequences[i].response))
    flipped = tuple(VOCABULARY - 1 - token for token in sequences[changed].prompt)
    others = [*sequences[:changed], replace(sequences[changed], prompt=flipped), *sequences[changed + 1 :]]
    before, after = (scorer.score(s, tokens_per_micro_batch=100_000) for s in (sequences, others))
    for index in range(len(sequences)):
        same = torch.equal(before.of_sequence(index)[0], after.of_sequence(index)[0])
        assert same == (index != changed), f"sequence {index}"
