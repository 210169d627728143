"""`megatron-flowrl score` as its users run it: its numbers under every layout."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.distributed.ranks import run_module
from tests.training.conftest import Run
from tests.training.score_inputs import (
    ENTROPY,
    GOOD_LINE,
    LINES,
    NORM,
    SEQUENCES,
    TEXT,
    Command,
    Outcome,
    config,
    input_gone,
    lines,
    make_command,
    records,
    run_main,
    run_process,
    save_tokenizer,
    scored,
    weights,
)

pytestmark = pytest.mark.usefixtures("process_as_it_was")


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
