"""`megatron-flowrl score` as its users run it: its numbers under every layout, and what it refuses."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from megatron_flowrl.config import UserError
from megatron_flowrl.platform import cuda_stand_in, current_platform
from megatron_flowrl.platform.distributed import destroy_process_groups
from megatron_flowrl.training import score
from tests.distributed.ranks import REPOSITORY, run_module
from tests.tiny_models import random_sequences, save_model
from tests.training.score_inputs import (
    BAD_INPUTS,
    GOOD_LINE,
    NORM,
    ODD_INPUTS,
    TEXT,
    BadInput,
    Command,
    Outcome,
    config,
    input_gone,
    json_lines,
    lines,
    make_command,
    run_main,
    save_tokenizer,
    weights,
)

SEQUENCES = random_sequences(11, seed=5)
LINES = json_lines(SEQUENCES)
ENTROPY = "log_prob.entropy=true"
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
Run = Callable[[Command], Outcome]


@pytest.fixture(scope="module", autouse=True)
def process_as_it_was() -> Iterator[None]:
    """What `main` leaves in a process that goes on: the CUDA stand-in, log handlers, seeds."""
    ours, megatron = logging.getLogger("megatron_flowrl"), logging.getLogger("megatron")
    before = list(ours.handlers), ours.propagate, ours.level, megatron.level
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        yield
    ours.handlers, ours.propagate = before[0], before[1]
    ours.setLevel(before[2])
    megatron.setLevel(before[3])
    destroy_process_groups()  # only where a test has failed
    cuda_stand_in.uninstall()
    current_platform.cache_clear()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("qwen2_tied", tmp_path_factory.mktemp("model"))


@pytest.fixture
def command(tmp_path: Path, model: Path) -> Command:
    return make_command(tmp_path / "run", model)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command line in this process, which belongs to no process group before and after."""

    def run_here(command: Command) -> Outcome:
        assert not dist.is_initialized(), "an earlier test left a process group"
        for name in TORCHRUN:
            monkeypatch.delenv(name, raising=False)
        for name, value in command.environment.items():
            monkeypatch.setenv(name, value)
        outcome = run_main(command.arguments)
        assert not dist.is_initialized()
        return outcome

    return run_here


def records(command: Command) -> list[dict[str, Any]]:
    return [json.loads(line) for line in command.output.read_text().splitlines()]


def scored(run: Run, command: Command) -> list[dict[str, Any]]:
    """The output of a command that has to succeed."""
    outcome = run(command)
    assert outcome.status == 0, outcome.err
    return records(command)


def assert_close(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """The same lines in the same order with the same keys, and numbers within 1e-5."""
    assert [list(record) for record in found] == [list(record) for record in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for key in set(theirs) - {"log_prob"}:
            assert ours[key] == pytest.approx(theirs[key], abs=1e-5, rel=0)
        assert ours["log_prob"] == pytest.approx(sum(ours["log_probs"]), abs=1e-9)


@torch.no_grad()
def by_transformers(folder: Path, temperature: float = 1.0) -> list[dict[str, Any]]:
    """What the output for SEQUENCES has to be, entropy included."""
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = []
    for sequence in SEQUENCES:
        logits = reference(torch.tensor([[*sequence.prompt, *sequence.response]])).logits[0]
        log_probs_TV = torch.log_softmax(logits[len(sequence.prompt) - 1 : -1].double() / temperature, dim=-1)
        chosen = log_probs_TV.gather(1, torch.tensor(sequence.response, dtype=torch.int64).unsqueeze(1)).squeeze(1)
        entropy = -(log_probs_TV.exp() * log_probs_TV).sum(dim=1)
        expected.append({"log_probs": chosen.tolist(), "log_prob": chosen.sum().item(), "entropy": entropy.tolist()})
    return expected


# One process


@pytest.fixture(scope="module")
def one_process(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Command:
    """`python -m megatron_flowrl score` of LINES with entropy: done."""
    command = make_command(tmp_path_factory.mktemp("one") / "run", model, ENTROPY, lines=LINES)
    outcome = run_process(command)
    assert outcome.status == 0, outcome.err
    assert outcome.out == "" and str(command.output) in outcome.err
    return command


def run_process(command: Command, **options: Any) -> Outcome:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "megatron_flowrl", *command.arguments],
        cwd=command.folder, env=environment, capture_output=True, text=True, timeout=240, **options,
    )  # fmt: skip
    return Outcome(done.returncode, done.stdout, done.stderr)


def test_one_process_equals_transformers(one_process: Command, model: Path) -> None:
    assert any(not s.response for s in SEQUENCES) and any(len(s.response) == 1 for s in SEQUENCES)
    assert_close(records(one_process), by_transformers(model))


def test_nothing_but_the_output_is_written(one_process: Command) -> None:
    assert sorted(p.name for p in one_process.folder.rglob("*")) == ["in.jsonl", "out", "out.jsonl"]


def test_temperature_and_a_recipe_with_an_override(run: Run, command: Command, model: Path) -> None:
    """The recipe may hold what other commands read; an override wins over it."""
    command.input.write_text("".join(LINES))
    recipe = command.folder / "recipe.yaml"
    recipe.write_text(
        "precision: {dtype: float32}\nlog_prob:\n  entropy: true\n  temperature: 3.0\noptimizer: {lr: 1e-3}\n"
    )
    command.overrides = ["--recipe", str(recipe), "log_prob.temperature=1.7"]
    assert_close(scored(run, command), by_transformers(model, temperature=1.7))


def test_model_from_the_recipe(run: Run, command: Command, one_process: Command, model: Path) -> None:
    recipe = command.folder / "recipe.yaml"
    recipe.write_text(f"model:\n  path: {model}\nprecision.dtype: float32\nlog_prob.entropy: true\n")
    arguments = ["--output", str(command.output), f"--recipe={recipe}", "--input", str(one_process.input)]
    assert run_main(["score", "seed=7", *arguments, "seed=7"]).status == 0
    assert command.output.read_bytes() == one_process.output.read_bytes()


def test_micro_batches_do_not_change_the_order(run: Run, command: Command, one_process: Command) -> None:
    command.input.write_text("".join(LINES))
    command.overrides += [ENTROPY, f"data.tokens_per_micro_batch={max(map(len, SEQUENCES))}"]
    assert_close(scored(run, command), records(one_process))


def test_entropy_is_there_only_when_asked_for(run: Run, command: Command) -> None:
    assert [list(record) for record in scored(run, command)] == [["log_probs", "log_prob"]]


def test_windows_line_ends_and_no_line_end(run: Run, command: Command) -> None:
    command.input.write_text(GOOD_LINE * 2)
    plain = scored(run, command)
    command.input.write_bytes(GOOD_LINE.replace("\n", "\r\n").encode() + GOOD_LINE.rstrip().encode())
    assert scored(run, command) == plain


def test_other_keys_are_ignored(run: Run, command: Command) -> None:
    plain = scored(run, command)
    command.input.write_text(GOOD_LINE.replace("}", ', "reward": 0.5}'))
    assert scored(run, command) == plain


def test_a_file_of_empty_responses(run: Run, command: Command) -> None:
    command.input.write_text('{"prompt": [1], "response": []}\n')
    command.overrides.append(ENTROPY)
    assert scored(run, command) == [{"log_probs": [], "log_prob": 0.0, "entropy": []}]


def test_numbers_that_are_not_finite_are_null_and_told(run: Run, command: Command) -> None:
    weights(lambda tensors: tensors.update({NORM: torch.full_like(tensors[NORM], torch.nan)}))(command)
    command.overrides.append(ENTROPY)
    outcome = run(command)
    assert outcome.status == 0 and "not finite" in outcome.err
    nulls = [None] * 3
    assert records(command) == [{"log_probs": nulls, "log_prob": None, "entropy": nulls}]


def test_an_output_is_replaced_whole(run: Run, command: Command) -> None:
    command.output.write_text("previous\n" * 100)
    assert len(scored(run, command)) == 1
    assert [p.name for p in command.output.parent.iterdir()] == ["out.jsonl"]


# Text


@pytest.mark.parametrize(
    "place, tokenizer_class",
    [
        ("data.tokenizer", None),
        pytest.param("data.tokenizer", "LlamaTokenizerFast"),
        pytest.param("model.path", None),
    ],
)
def test_text_is_scored_as_its_tokens(place: str, tokenizer_class: str | None, run: Run, command: Command) -> None:
    """The tokens are tokenizer.json's, whatever class a config file names; a response gets no special tokens."""
    if place == "model.path":
        command.model = shutil.copytree(command.model, command.folder / "model")
        save_tokenizer(command.model, tokenizer_class)
    else:
        command.overrides.append(f"data.tokenizer={save_tokenizer(command.folder / 'tokenizer', tokenizer_class)}")
    lines(
        '{"prompt": [0, 14, 21], "response": [28, 35]}\n',
        '{"prompt": [0, 14, 21, 42, 56], "response": [49, 7]}\n',
        '{"prompt": [7], "response": [28]}\n',
    )(command)
    expected = scored(run, command)
    lines(
        TEXT,
        '{"prompt": "what is größer ?", "response": "数 zzz"}\n',
        '{"prompt": [7], "response": "the"}\n',
    )(command)
    assert scored(run, command) == expected


# Two ranks

LAYOUTS = {
    "tp2": ["parallel.tensor_model_parallel_size=2"],
    "tp2_sp": ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"],
    "pp2": ["parallel.pipeline_model_parallel_size=2"],
    "pp2_vpp2": ["parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2"],
    "cp2": ["parallel.context_parallel_size=2"],
    "dp2": [],
}
RANDOM = ["model.init=random", "seed=99"]
TP2, PP2, CP2 = (LAYOUTS[name] for name in ("tp2", "pp2", "cp2"))


@pytest.fixture(scope="module")
def two_rank_commands(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Command]]:
    """Name -> the command lines of the two ranks, alike but where a rank is meant to see something else."""
    folder = tmp_path_factory.mktemp("two")

    def made(name: str, *overrides: str) -> list[Command]:
        return [make_command(folder / name, model, *overrides, lines=LINES)] * 2

    commands = {name: made(name, ENTROPY, *overrides) for name, overrides in LAYOUTS.items()}
    commands["dp2_one_line"] = made("dp2_one_line")
    lines(LINES[-1])(commands["dp2_one_line"][0])
    commands["random_tp2"] = made("random_tp2", ENTROPY, *TP2, *RANDOM)
    commands["heads"] = made("heads", *TP2)
    config(num_attention_heads=3, num_key_value_heads=3)(commands["heads"][0])
    commands["layers"] = made("layers", *PP2)
    config(num_hidden_layers=3, layer_types=None)(commands["layers"][0])
    commands["budget"] = made("budget", *CP2, "data.tokens_per_micro_batch=3")
    commands["world"] = made("world", *TP2, *PP2)
    for name in ("input_gone", "another_input"):
        commands[name] = [made(f"{name}.{rank}")[0] for rank in range(2)]
        commands[name][1].output = commands[name][0].output
    input_gone(commands["input_gone"][1])
    lines(*reversed(LINES))(commands["another_input"][1])
    return commands


@pytest.fixture(scope="module")
def two_ranks(
    two_rank_commands: dict[str, list[Command]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[Outcome]]:
    """Name -> what each rank did."""
    folder = tmp_path_factory.mktemp("outcomes")
    with_ports = [
        {"name": name, "port": port, "arguments": [command.arguments for command in commands]}
        for (name, commands), port in zip(two_rank_commands.items(), free_ports(len(two_rank_commands)), strict=True)
    ]
    (folder / "commands.json").write_text(json.dumps(with_ports))
    done = run_module("tests.training.score_inputs", [str(folder / "commands.json"), str(folder)], ranks=2)
    assert done.returncode == 0, done.stdout[-6000:]
    return {
        name: [Outcome(**json.loads((folder / f"{name}.{rank}.json").read_text())) for rank in range(2)]
        for name in two_rank_commands
    }


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("localhost", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.mark.distributed
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_agree(
    name: str,
    two_ranks: dict[str, list[Outcome]],
    two_rank_commands: dict[str, list[Command]],
    one_process: Command,
) -> None:
    assert [outcome.status for outcome in two_ranks[name]] == [0, 0], two_ranks[name][0].err
    assert two_ranks[name][1].err == "", "only the first rank reports"
    command = two_rank_commands[name][0]
    assert_close(records(command), records(one_process))
    assert [p.name for p in command.output.parent.iterdir()] == ["out.jsonl"]


@pytest.mark.distributed
def test_a_line_less_than_ranks(
    two_ranks: dict[str, list[Outcome]], two_rank_commands: dict[str, list[Command]], run: Run, command: Command
) -> None:
    assert [outcome.status for outcome in two_ranks["dp2_one_line"]] == [0, 0]
    lines(LINES[-1])(command)
    assert_close(records(two_rank_commands["dp2_one_line"][0]), scored(run, command))


@pytest.mark.distributed
def test_random_weights_do_not_depend_on_the_layout(
    two_ranks: dict[str, list[Outcome]],
    two_rank_commands: dict[str, list[Command]],
    one_process: Command,
    run: Run,
    command: Command,
) -> None:
    """The folder needs no weights, and another seed gives others."""
    assert [outcome.status for outcome in two_ranks["random_tp2"]] == [0, 0]
    config()(command)
    command.input.write_text("".join(LINES))
    command.overrides += [ENTROPY, *RANDOM[1:]]
    expected = scored(run, command)
    assert_close(records(two_rank_commands["random_tp2"][0]), expected)
    command.overrides[-1] = "seed=100"
    with pytest.raises(AssertionError):
        assert_close(scored(run, command), expected)
    with pytest.raises(AssertionError):
        assert_close(records(one_process), expected)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "name, says",
    [
        ("heads", ("parallel.tensor_model_parallel_size = 2", "num_attention_heads = 3")),
        ("layers", ("parallel.pipeline_model_parallel_size = 2", "3 layers")),
        ("budget", ("data.tokens_per_micro_batch = 3", "4")),
        ("world", ("2 processes", "parallel.tensor_model_parallel_size 2", "multiple of 4")),
        ("input_gone", ("input_gone.1/in.jsonl", "does not exist")),
        pytest.param(
            "another_input",
            ("another_input.0/in.jsonl", "not the same on rank 0 and on rank 1"),
        ),
    ],
)
def test_two_ranks_refuse_with_one_voice(
    name: str,
    says: tuple[str, ...],
    two_ranks: dict[str, list[Outcome]],
    two_rank_commands: dict[str, list[Command]],
) -> None:
    """No rank is left waiting, also where only the second one sees the problem; the first one tells it."""
    assert [outcome.status for outcome in two_ranks[name]] == [2, 2]
    first, second = (outcome.err for outcome in two_ranks[name])
    assert all(text in first for text in says), first
    assert first.count("error:") == 1 and second == ""
    assert not any(two_rank_commands[name][0].output.parent.iterdir())


@pytest.mark.distributed
def test_torchrun(command: Command, run: Run) -> None:
    """The whole way, as the manual has it, with one line of text for two data-parallel ranks."""
    save_tokenizer(command.folder / "tokenizer")
    lines(TEXT)(command)
    command.overrides.append(f"data.tokenizer={command.folder / 'tokenizer'}")
    expected = scored(run, command)
    command.output.unlink()
    done = run_module("megatron_flowrl", command.arguments, ranks=2)
    assert done.returncode == 0, done.stdout
    assert_close(records(command), expected)


# What is refused


def snapshot(folder: Path) -> dict[str, tuple[Any, ...]]:
    """All that lies in a folder: mode and, of files, time of change and content."""
    found: dict[str, tuple[Any, ...]] = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        found[str(path)] = (
            (status.st_mode, status.st_mtime_ns, path.read_bytes()) if path.is_file() else (status.st_mode,)
        )
    return found


def refused(case: BadInput, command: Command, run: Run) -> None:
    """Refused with a message, every file as it was: without a previous output, then with one."""
    case.spoil(command)
    names = {"folder": command.folder, "model": command.model}
    for previous in (False, True):
        if previous:
            if command.output.exists() or not command.output.parent.is_dir():
                break
            command.output.write_text("previous\n")
        before = snapshot(command.folder)
        outcome = run(command)
        assert outcome.status == 2 and outcome.out == ""
        for text in case.says:
            assert text.format(**names) in outcome.err
        assert "error:" in outcome.err and "Traceback" not in outcome.err
        assert len(outcome.err) < 4000, "a message is read by people"
        assert snapshot(command.folder) == before


@pytest.fixture
def no_model_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_: object) -> NoReturn:
        pytest.fail("the model was built before the input was refused")

    monkeypatch.setattr(score, "build_parallel_model", build)


@pytest.mark.usefixtures("no_model_is_built")
@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_is_refused(name: str, command: Command, run: Run) -> None:
    refused(BAD_INPUTS[name], command, run)


@pytest.mark.usefixtures("no_model_is_built")
@pytest.mark.parametrize("name", ODD_INPUTS)
def test_odd_input_is_refused(name: str, command: Command, run: Run) -> None:
    refused(ODD_INPUTS[name], command, run)


@pytest.mark.usefixtures("no_model_is_built")
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine may have FP8")
def test_fp8_is_refused_on_the_cpu(command: Command, run: Run) -> None:
    command.overrides = ["precision.fp8=hybrid"]
    refused(BadInput(lambda _: None, ("precision.fp8 = ", "hybrid", "GPU", "precision.dtype")), command, run)


def test_a_name_too_long_is_refused_before_the_work(no_model_is_built: None, run: Run, command: Command) -> None:
    command.output = command.output.parent / ("x" * 300)
    outcome = run(command)
    assert outcome.status == 2 and "--output" in outcome.err and "too long" in outcome.err


def test_a_link_as_output_stays_one(run: Run, command: Command) -> None:
    real = command.folder / "real.jsonl"
    command.output.symlink_to(real)
    assert run(command).status == 0
    assert command.output.is_symlink() and real.read_text()


def test_several_problems_are_told_at_once(run: Run, command: Command) -> None:
    command.overrides += ["seed=-1", "log_prob.temprature=2", "optimizer.lr=1"]
    outcome = run(command)
    assert outcome.status == 2
    assert all(name in outcome.err for name in ("3 problems", "seed = -1", "log_prob.temprature", "optimizer.lr"))


@pytest.mark.parametrize(
    "arguments, says",
    [
        ([], "command"),
        (["train"], "'train'"),
        (["score"], "--input, --output"),
        (["score", "--input", "in.jsonl"], "--output"),
        (["score", "--input", "in.jsonl", "--output", "out.jsonl"], "model.path"),
    ],
)
def test_what_is_missing_is_named(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = run_main(arguments)
    assert outcome.status == 2 and says in outcome.err
    assert not any(tmp_path.iterdir())


def test_help_has_every_setting_that_is_read_and_no_other() -> None:
    outcome = run_main(["score", "--help"])
    assert outcome.status == 0
    read = ("--model", "--recipe", "log_prob.entropy", "model.init", "parallel.context_parallel_size", "seed")
    assert all(name in outcome.out for name in read)
    assert "optimizer.lr" not in outcome.out and "ddp." not in outcome.out


def test_a_problem_that_only_the_second_rank_meets_before_they_are_joined_is_told(
    run: Run, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as more processes than GPUs."""

    def current_platform(local_rank: int) -> NoReturn:
        raise UserError(f"local rank {local_rank} has no GPU")

    monkeypatch.setattr(score, "current_platform", current_platform)
    command.environment = dict(zip(TORCHRUN, ("1", "2", "1", "localhost", "1"), strict=True))
    outcome = run(command)
    assert outcome.status == 2 and "local rank 1 has no GPU" in outcome.err


# Writing


@pytest.mark.parametrize("previous", [None, "previous\n"])
def test_an_interrupted_write_leaves_the_previous_output(
    previous: str | None, run: Run, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the last moment: the new file is there, and not yet in place."""
    if previous is not None:
        command.output.write_text(previous)
    before = snapshot(command.folder)
    monkeypatch.setattr(os, "replace", raising(KeyboardInterrupt()))
    assert run(command).status == 130
    assert snapshot(command.folder) == before
    assert not dist.is_initialized()


def test_an_output_that_cannot_be_put_in_place(run: Run, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    command.output.write_text("previous\n")
    before = snapshot(command.folder)
    monkeypatch.setattr(os, "replace", raising(OSError(errno.EIO, os.strerror(errno.EIO))))
    outcome = run(command)
    assert outcome.status == 2
    assert f"--output '{command.output}'" in outcome.err and os.strerror(errno.EIO) in outcome.err
    assert snapshot(command.folder) == before


def raising(error: BaseException) -> Callable[..., NoReturn]:
    def fail(*_: object) -> NoReturn:
        raise error

    return fail


def test_a_full_disk_in_the_middle_of_the_write(command: Command) -> None:
    """Played by the process's limit on the size of a file."""
    resource = pytest.importorskip("resource")
    command.input.write_text("".join(LINES * 5))
    command.output.write_text("previous\n")
    before = snapshot(command.folder)
    limit = 4096
    outcome = run_process(command, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert outcome.status == 2, outcome.err
    assert f"--output '{command.output}'" in outcome.err and os.strerror(errno.EFBIG) in outcome.err
    assert "Traceback" not in outcome.err
    assert snapshot(command.folder) == before
