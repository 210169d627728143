"""`megatron-flowrl score --compare-sampler` without vLLM: what it refuses, and what it makes of given answers."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from megatron_flowrl.config import load_config
from megatron_flowrl.model.architecture import read_architecture
from megatron_flowrl.model.build import build_parallel_model
from megatron_flowrl.objectives.mismatch import mismatch
from megatron_flowrl.platform.distributed import World
from megatron_flowrl.rollout.generation import Answer, Sampling, VersionSpan
from megatron_flowrl.rollout.sampler import Sampler, SyncReport
from megatron_flowrl.rollout.serve import make_servers
from megatron_flowrl.rollout.transfer.base import TransferTimes
from megatron_flowrl.training import compare_sampler as module
from megatron_flowrl.training import score
from megatron_flowrl.training.compare_sampler import describe
from tests.training.conftest import Run
from tests.training.score_inputs import (
    FP32,
    BadInput,
    Command,
    Spoil,
    bad,
    input_gone,
    lines,
    make_command,
    model_folder,
    output,
    records,
    settings,
    together,
)

pytestmark = pytest.mark.usefixtures("process_as_it_was")

FLAG = "--compare-sampler"
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [1, 2]]
MAX_TOKENS = "generation.max_tokens=8"


@pytest.fixture
def command(tmp_path: Path, model: Path) -> Command:
    """A good command line: 2 answers of at most 8 tokens to each prompt."""
    given = (json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS)
    logs = f"--server-logs={tmp_path / 'logs'}"
    return make_command(tmp_path / "run", model, FLAG, logs, MAX_TOKENS, "generation.n=2", lines=given)


# What is refused


def without(*names: str) -> Spoil:
    """Arguments that begin so are left out."""

    def spoil(command: Command) -> None:
        command.overrides = [given for given in command.overrides if not given.startswith(names)]

    return spoil


def prompts_of(*lengths: int) -> Spoil:
    return lines(*(json.dumps({"prompt": [1] * length}) + "\n" for length in lengths))


def generation_config(content: str) -> Spoil:
    return model_folder(lambda folder: (folder / "generation_config.json").write_text(content))


def logs_inside_a_file(command: Command) -> None:
    command.overrides.append(f"--server-logs={command.folder / 'in.jsonl' / 'logs'}")


BAD: dict[str, BadInput] = {
    "rollout without the flag": bad(
        together(without(FLAG, "--server-logs", "generation"), settings("rollout.dtype=float32")),
        "`score` does not read rollout.dtype",
    ),
    "generation without the flag": bad(without(FLAG, "--server-logs"), "`score` does not read generation.max_tokens"),
    "logs without the flag": bad(without(FLAG, "generation"), "--server-logs is for --compare-sampler"),
    "a section of no use": bad(settings("optimizer.lr=1"), "`score --compare-sampler` does not read optimizer.lr"),
    "settings that contradict one another": bad(
        settings("rollout.transfer_folder=/tmp/x"), "rollout.transfer_folder", "rollout.transfer=disk"
    ),
    "input missing": bad(input_gone, "{folder}/in.jsonl", "does not exist"),
    "no prompt": bad(lines('{"prompt": [1]}\n', '{"response": [1]}\n'), "in.jsonl:2: the key prompt is missing"),
    "a token outside the vocabulary": bad(lines('{"prompt": [299]}\n'), "in.jsonl:1: prompt[0] = 299"),
    "output in a missing folder": bad(output("nowhere/out.jsonl"), "--output", "{folder}/nowhere", "does not exist"),
    "answers as long as the model takes": bad(
        together(without(MAX_TOKENS), settings("generation.max_tokens=512")),
        "generation.max_tokens = 512", "at most 512 tokens", "position limit", "lower it",
    ),
    "prompts too long for the model": bad(
        prompts_of(504, 505, 1, 600), "in.jsonl:2: prompt of 505 tokens + generation.max_tokens = 8 is 513",
        "in.jsonl:4:", "608", "at most 512", "position limit",
    ),
    "a prompt too long for the limit given": bad(
        together(prompts_of(13), settings("model.max_sequence_length=20")),
        "in.jsonl:1:", "21", "at most 20 tokens (model.max_sequence_length = 20)",
    ),
    "a prompt too long for the servers": bad(
        together(prompts_of(3, 25), settings("rollout.max_model_len=32")),
        "in.jsonl:2:", "33", "at most 32 tokens (rollout.max_model_len = 32)", "lower generation.max_tokens",
    ),
    "servers longer than the model": bad(
        settings("rollout.max_model_len=513"), "rollout.max_model_len = 513", "limit of 512"
    ),
    "an answer that fits no micro-batch": bad(
        settings("data.tokens_per_micro_batch=12"), "data.tokens_per_micro_batch = 12", "13 tokens", "raise it"
    ),
    "a temperature vLLM does not sample at": bad(
        settings("log_prob.temperature=0.001"), "log_prob.temperature = 0.001", "0.01", "raise it"
    ),
    "heads that cannot be cut": bad(
        settings("rollout.tensor_parallel_size=3"), "rollout.tensor_parallel_size = 3", "num_attention_heads = 4"
    ),
    "a transfer for GPUs": bad(settings("rollout.transfer=nccl"), "rollout.transfer = nccl", "rollout.transfer=shm"),
    "EOS is text": bad(
        generation_config('{"eos_token_id": "</s>"}'), "{folder}/model/generation_config.json", "eos_token_id = '</s>'"
    ),
    "generation_config.json is broken": bad(generation_config("{"), "{folder}/model/generation_config.json"),
    "logs inside a file": bad(
        together(without("--server-logs"), logs_inside_a_file),
        "--server-logs '{folder}/in.jsonl/logs'", "'{folder}/in.jsonl' is not a folder", "give another",
    ),
}  # fmt: skip


@pytest.fixture
def nothing_expensive(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> NoReturn:
        pytest.fail("the model was built, or a server made ready, before the input was refused")

    monkeypatch.setattr(score, "build_parallel_model", fail)
    monkeypatch.setattr(module, "Sampler", fail)


@pytest.mark.usefixtures("nothing_expensive")
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name: str, command: Command, run: Run, tmp_path: Path) -> None:
    BAD[name].spoil(command)
    outcome = run(command)
    assert outcome.status == 2 and outcome.out == "" and "Traceback" not in outcome.err
    for text in BAD[name].says:
        assert text.format(folder=command.folder, model=command.model) in outcome.err
    assert not command.output.exists() and not (tmp_path / "logs").exists()


@pytest.mark.usefixtures("nothing_expensive")
def test_vllm_missing_is_told_before_the_model_is_read(
    command: Command, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "vllm" else find(name, *more))
    outcome = run(command)
    assert outcome.status == 2 and "vLLM cannot be imported" in outcome.err and "requirements" in outcome.err


# What is made of answers


class StandIn:
    """In the place of `Sampler`: these answers, whatever is asked; notes what was."""

    def __init__(self, answers: Sequence[Answer]) -> None:
        self.answers, self.done = list(answers), list[Any]()

    def __call__(self, config: Any, world: Any, model: Any, companions: Path, logs: Path) -> StandIn:
        self.done.append((companions, logs))
        return self

    def start(self) -> None:
        self.done.append("start")

    def sync(self, version: str) -> SyncReport:
        self.done.append(version)
        return SyncReport(version, TransferTimes(), 0, 1)

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, n: int, on_answer: Callable[[Answer], object]
    ) -> list[Answer]:
        self.done.append(([list(prompt) for prompt in prompts], sampling, n))
        for answer in self.answers:
            on_answer(answer)
        return self.answers

    def __enter__(self) -> StandIn:
        return self

    def __exit__(self, *_: object) -> None:
        self.done.append("close")


def answer(prompt: int, sample: int, tokens: Sequence[int], log_probs: Sequence[float]) -> Answer:
    spans = (VersionSpan("0", 0, len(tokens)),)
    return Answer(prompt, sample, tuple(tokens), tuple(log_probs), "length", spans, "http://127.0.0.1:1")


def scored_by_score(command: Command, run: Run, responses: Sequence[Sequence[int]], *more: str) -> list[dict[str, Any]]:
    """What plain `score` says of the responses, two to each prompt."""
    plain = make_command(command.folder / "plain", command.model, *more)
    pairs = [(PROMPTS[i // 2], response) for i, response in enumerate(responses)]
    lines(*(json.dumps({"prompt": p, "response": list(r)}) + "\n" for p, r in pairs))(plain)
    assert run(plain).status == 0
    return records(plain)


RESPONSES = [[3, 4, 5], [6], [7, 8], [], [9, 10, 11, 12, 13, 14, 15, 16], [17], [18, 19], [20]]


@pytest.fixture
def stand_in(command: Command, run: Run, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """The sampler says what the trainer does, but for one token, 0.25 lower, of the second answer to prompt 3."""
    expected = scored_by_score(command, run, RESPONSES, "log_prob.temperature=0.7")
    log_probs = [record["log_probs"] for record in expected]
    log_probs[5] = [log_probs[5][0] - 0.25]
    answers = [answer(i // 2, i % 2, RESPONSES[i], log_probs[i]) for i in range(len(RESPONSES))]
    made = StandIn(answers)
    monkeypatch.setattr(module, "Sampler", made)
    return made


def test_answers_are_scored_and_reported(command: Command, run: Run, stand_in: StandIn, tmp_path: Path) -> None:
    model_folder(lambda folder: (folder / "generation_config.json").write_text('{"eos_token_id": [9, 7]}'))(command)
    command.overrides += ["log_prob.temperature=0.7", "log_prob.entropy=true"]
    outcome = run(command)
    assert outcome.status == 0, outcome.err
    sampling = Sampling(max_tokens=8, temperature=0.7, stop_token_ids=(9, 7))
    made = (command.model, tmp_path / "logs")
    assert stand_in.done == [made, "start", "0", (PROMPTS, sampling, 2), "close"]

    found = records(command)
    expected = scored_by_score_again(command, run)
    assert [record["response"] for record in found] == RESPONSES
    assert [record["prompt"] for record in found] == [PROMPTS[i // 2] for i in range(8)]
    for record, plain, given in zip(found, expected, stand_in.answers, strict=True):
        assert record["log_probs"] == pytest.approx(plain["log_probs"], abs=1e-5)
        assert record["entropy"] == pytest.approx(plain["entropy"], abs=1e-5)
        assert record["sampler_log_probs"] == list(given.log_probs)
        assert record["finish_reason"] == "length"
        assert record["weight_versions"] == [{"version": "0", "start": 0, "stop": len(given.token_ids)}]

    assert "mismatch over 18 tokens of 8 answers" in outcome.err
    assert "max 2.500e-01" in outcome.err and "k1 -1.389e-02" in outcome.err
    assert "worst token: prompt 3, answer 2, position 1 of 1, token 17:" in outcome.err


def scored_by_score_again(command: Command, run: Run) -> list[dict[str, Any]]:
    plain = command.folder / "plain"
    plain.rename(command.folder / "before")
    return scored_by_score(command, run, RESPONSES, "log_prob.temperature=0.7", "log_prob.entropy=true")


def test_a_response_in_the_input_is_ignored(command: Command, run: Run, stand_in: StandIn) -> None:
    lines(*(json.dumps({"prompt": prompt, "response": "no list"}) + "\n" for prompt in PROMPTS))(command)
    command.overrides.append("log_prob.temperature=0.7")
    outcome = run(command)
    assert outcome.status == 0, outcome.err
    assert [record["response"] for record in records(command)] == RESPONSES


def test_answers_with_seeds(command: Command, run: Run, stand_in: StandIn) -> None:
    command.overrides += ["generation.seeded=true", "seed=5"]
    assert run(command).status == 0
    assert stand_in.done[3][1].seed == 5


def test_the_report_tells_what_was_left_out() -> None:
    trainer, sampler = torch.tensor([-50.0, torch.nan]), torch.tensor([-1.0, -1.0])
    text = "\n".join(describe(mismatch(trainer, sampler, [0, 1, 2])))
    assert "clamped to [-20, 20]: of 1 tokens, of 1 answers" in text
    assert "not finite, left out: 1 tokens, in 1 answers" in text
    assert len(describe(mismatch(sampler, sampler, [0, 2]))) == 4


# Servers without weights


def test_servers_that_are_sent_weights_start_without(model: Path, tmp_path: Path) -> None:
    """The user's own arguments come later, and win."""
    config = load_config(None, [f"model.path={model}", 'rollout.extra_arguments=["--enforce-eager"]'])
    without_weights, with_weights = (
        make_servers(config, model, tmp_path, random_weights=random)[0].command() for random in (True, False)
    )
    place = without_weights.index("--load-format")
    assert without_weights[place + 1] == "dummy" and place < without_weights.index("--enforce-eager")
    assert "--load-format" not in with_weights


@pytest.mark.usefixtures("one_rank_platform")
def test_nothing_is_sampled_before_the_weights_are_sent(model: Path, tmp_path: Path, one_rank_platform: Any) -> None:
    config = load_config(None, [f"model.path={model}", FP32, 'generation.urls=["http://127.0.0.1:9"]'])
    parallel_model = build_parallel_model(read_architecture(model), config, one_rank_platform)
    with (
        Sampler(config, World(), parallel_model, model, tmp_path) as sampler,
        pytest.raises(RuntimeError, match="no weights of the trainer's yet: sync"),
    ):
        sampler.begin([[1]], Sampling(max_tokens=1), 1)
