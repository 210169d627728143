"""A tiny GPT on Megatron-Core: its settings, samples of it, and the probability of everything that it can answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2Config

from examples.distribution_matching.tasks import Task, Tokens
from megatron_flowrl.config import Config, check_config, load_config
from megatron_flowrl.data.batch import PackedBatch, TokenSequence
from megatron_flowrl.model.build import ParallelModel
from megatron_flowrl.model.gpt import LogProbRequest
from megatron_flowrl.model.packed_sequences import packed_sequences
from megatron_flowrl.model.packing_rules import packing_rules, plan
from megatron_flowrl.model.partition_function import LogZRequest
from megatron_flowrl.training.passes import ask, local_batches

HIDDEN = 64


def write_architecture(task: Task, folder: Path) -> None:
    """A Hugging Face folder with config.json alone: weights are drawn from the seed. Its vocabulary is the task's."""
    Qwen2Config(
        vocab_size=task.vocab_size,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16,
        initializer_range=0.02,
        tie_word_embeddings=False,
    ).save_pretrained(folder)


def make_config(folder: Path, settings: Mapping[str, Any]) -> Config:
    """`settings` over what all runs have: fp32, random weights, no padding of the vocabulary."""
    shared = {
        "model.path": str(folder),
        "model.init": "random",
        "model.make_vocab_size_divisible_by": 1,
        "precision.dtype": "float32",
        "logging.level": "warning",
    }
    config = load_config(None, [f"{key}={json.dumps(value)}" for key, value in {**shared, **settings}.items()])
    check_config(config)
    return config


@torch.no_grad()
def next_token_log_probs(model: ParallelModel, contexts: Tensor) -> Tensor:
    """Log-probs of the token after each context: int64 [n, length] -> fp64 [n, vocabulary]."""
    count, length = contexts.shape
    (module,) = model.modules
    logits = module(
        input_ids=contexts.reshape(1, -1),
        position_ids=torch.arange(length, device=contexts.device).repeat(count)[None],
        attention_mask=None,
        packed_seq_params=packed_sequences(range(0, count * length + 1, length), 0, 1, contexts.device),
    )
    return torch.log_softmax(logits[0, length - 1 :: length].double(), dim=-1)


def sample(model: ParallelModel, task: Task, count: int, generator: torch.Generator) -> list[TokenSequence]:
    """`count` answers to each prompt, token by token, in the order of prompts; equal contexts are computed once."""
    prompts = [prompt for prompt in task.prompts for _ in range(count)]
    contexts, going = torch.tensor(prompts), torch.arange(len(prompts))
    answers: list[Tokens] = [()] * len(prompts)
    for step in range(1, task.longest + 1):
        distinct, which = torch.unique(contexts, dim=0, return_inverse=True)
        probabilities = next_token_log_probs(model, distinct).exp()[which]
        chosen = torch.multinomial(probabilities, 1, generator=generator)
        contexts = torch.cat([contexts, chosen], dim=1)
        ends = torch.full(going.shape, step == task.longest)
        if task.eos is not None:
            ends |= chosen.squeeze(1) == task.eos
        for index, tokens in zip(going[ends].tolist(), contexts[ends].tolist(), strict=True):
            answers[index] = tuple(tokens[-step:])
        contexts, going = contexts[~ends], going[~ends]
        if not len(going):
            break
    return [TokenSequence(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]


def answer_log_probs(model: ParallelModel, task: Task) -> Tensor:
    """Log-probs of all answers to all prompts, fp64 [P, K], in the order of `Task.log_target`."""
    prompts = torch.tensor(task.prompts)
    others = torch.tensor([token for token in range(task.vocab_size) if token != task.eos])
    beginnings = torch.zeros((1, 0), dtype=torch.int64)
    log_probs = torch.zeros((len(prompts), 1), dtype=torch.float64)  # of each beginning
    complete = []
    for _ in range(task.longest):
        count = len(beginnings)
        contexts = torch.cat([prompts.repeat_interleave(count, 0), beginnings.repeat(len(prompts), 1)], dim=1)
        following = next_token_log_probs(model, contexts).reshape(len(prompts), count, -1)
        joint = log_probs[:, :, None] + following
        if task.eos is not None:
            complete.append(joint[:, :, task.eos])
        log_probs = joint[:, :, others].flatten(1)
        beginnings = torch.cat([beginnings.repeat_interleave(len(others), 0), others.repeat(count)[:, None]], dim=1)
    return torch.cat([*complete, log_probs], dim=1)


def learned_log_z(model: ParallelModel, task: Task, config: Config) -> Tensor:
    """What the partition function says of each prompt, without dropout: fp64 [P]."""
    prompts = [TokenSequence(prompt, (0,)) for prompt in task.prompts]
    packing = plan([len(prompt) for prompt in prompts], packing_rules(config, model.architecture, 1))
    batches = local_batches(prompts, packing, 0, torch.device("cpu"))
    settings = config.log_prob

    def request(batch: PackedBatch) -> LogProbRequest:
        log_z = LogZRequest(batch.prompt_rows, batch.sequence_of_prompt_row, batch.prompt_lengths)
        return LogProbRequest(batch.rows, batch.labels, settings.temperature, settings.chunk_bytes, log_z=log_z)

    found = torch.zeros(len(prompts), dtype=torch.float64)
    for batch, output in zip(batches, ask(model.chunks, batches, request), strict=True):
        found[list(batch.sequences)] = output.log_z.double()
    return found
