"""What the tests of `megatron-flowrl score` feed it: a command line in a folder of its own, and ways to spoil it.

Also the tests' worker, for many command lines on the same ranks, as starting ranks takes longer than scoring:
torchrun ... -m tests.training.score_inputs COMMANDS.json OUT_FOLDER
runs [{"name", "port", "arguments": [of rank 0, of rank 1, ...]}, ...] and writes OUT_FOLDER/NAME.RANK.json, `Outcome`s.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from megatron_flowrl.data.batch import TokenSequence
from tests.distributed.ranks import REPOSITORY
from tests.tiny_models import random_sequences

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
GOOD_LINE = '{"prompt": [1, 2], "response": [3, 4, 5]}\n'
FP32 = "precision.dtype=float32"


@dataclasses.dataclass
class Command:
    """A `score` command line whose files lie in `folder`; as made, it is good."""

    folder: Path
    model: Path
    output: Path
    overrides: list[str] = dataclasses.field(default_factory=lambda: [FP32])
    environment: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def input(self) -> Path:
        return self.folder / "in.jsonl"

    @property
    def arguments(self) -> list[str]:
        files = ["--model", str(self.model), "--input", str(self.input), "--output", str(self.output)]
        return ["score", *files, *self.overrides]


def make_command(folder: Path, model: Path, *overrides: str, lines: Iterable[str] = (GOOD_LINE,)) -> Command:
    """A good command line in `folder`, which is made."""
    (folder / "out").mkdir(parents=True)
    command = Command(folder, model, folder / "out" / "out.jsonl", [FP32, *overrides])
    command.input.write_text("".join(lines), encoding="utf-8")
    return command


def json_lines(sequences: Iterable[TokenSequence]) -> list[str]:
    return [json.dumps({"prompt": s.prompt, "response": s.response}) + "\n" for s in sequences]


SEQUENCES = random_sequences(11, seed=5)
LINES = json_lines(SEQUENCES)
ENTROPY = "log_prob.entropy=true"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a command line did: its exit status and what it printed."""

    status: int
    out: str
    err: str


def run_main(arguments: Sequence[str]) -> Outcome:
    """The command in this process. Only SystemExit is taken for an ending: any other exception is the test's."""
    from megatron_flowrl.cli import main

    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(arguments)
        except SystemExit as error:
            assert isinstance(error.code, int)
            status = error.code
    return Outcome(status, out.getvalue(), err.getvalue())


def save_tokenizer(folder: Path, tokenizer_class: str | None = None, *, unknown: bool = True) -> Path:
    """A tokenizer of a few words, among them some that are no ASCII, which begins a prompt with <bos>."""
    words = ["<bos>", "<unk>" if unknown else "<unused>", "what", "is", "the", "answer", "größer", "数", "?"]
    tokenizer = Tokenizer(models.WordLevel({word: 7 * i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>").save_pretrained(folder)
    if tokenizer_class is not None:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": tokenizer_class}))
    return folder


Spoil = Callable[[Command], None]


@dataclasses.dataclass(frozen=True)
class BadInput:
    """A way to spoil a good command line, and what the message has to name: the thing, its value, the cure."""

    spoil: Spoil
    says: tuple[str, ...]


def bad(spoil: Spoil, *says: str) -> BadInput:
    return BadInput(spoil, says)


def lines(*given: str | bytes) -> Spoil:
    """The input is these lines."""

    def spoil(command: Command) -> None:
        command.input.write_bytes(b"".join(x if isinstance(x, bytes) else x.encode() for x in given))

    return spoil


def tokens(prompt: str, response: str = "[3]") -> Spoil:
    """The input is a good line and one with this JSON."""
    return lines(GOOD_LINE, f'{{"prompt": {prompt}, "response": {response}}}\n')


def settings(*overrides: str) -> Spoil:
    """These overrides are added."""
    return lambda command: command.overrides.extend(overrides)


def together(*spoils: Spoil) -> Spoil:
    def spoil(command: Command) -> None:
        for each in spoils:
            each(command)

    return spoil


def input_gone(command: Command) -> None:
    command.input.unlink()


def output(name: str) -> Spoil:
    """The output is this, seen from the command's folder."""

    def spoil(command: Command) -> None:
        command.output = command.folder / name

    return spoil


def output_is_a_pipe(command: Command) -> None:
    os.mkfifo(command.output)


def environment(**variables: str) -> Spoil:
    return lambda command: command.environment.update(variables)


def model_folder(change: Callable[[Path], object]) -> Spoil:
    """The model is a copy, changed."""

    def spoil(command: Command) -> None:
        command.model = shutil.copytree(command.model, command.folder / "model")
        change(command.model)

    return spoil


def no_model_folder(command: Command) -> None:
    command.model = command.folder / "nowhere"


def config(**changes: Any) -> Spoil:
    """config.json is changed; its weights are random, as those of the folder would no longer fit."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        (folder / WEIGHTS).unlink()

    return together(model_folder(change), settings("model.init=random"))


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Spoil:
    """The tensors are changed."""

    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return model_folder(rewrite)


def model_file(name: str, content: str) -> Spoil:
    """The model's weights are this one file."""

    def change(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / name).write_text(content)

    return model_folder(change)


def tokenizer_without_unknown(command: Command) -> None:
    save_tokenizer(command.folder / "tokenizer", unknown=False)
    command.overrides.append(f"data.tokenizer={command.folder / 'tokenizer'}")


def truncate(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size // 2)


def quantise(folder: Path) -> None:
    """Turn it into what Hugging Face calls an FP8 checkpoint: the same names and shapes, and scales beside them."""
    tensors = load_file(folder / WEIGHTS)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        scale = tensors[name].abs().max() / 448
        tensors |= {name: (tensors[name] / scale).to(torch.float8_e4m3fn), f"{name}_scale_inv": scale.reshape(1, 1)}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "fp8"}}))


NORM, KEY = "model.norm.weight", "model.layers.1.self_attn.k_proj.weight"
TEXT = '{"prompt": "what is", "response": "the answer"}\n'

BAD_INPUTS: dict[str, BadInput] = {
    # the model
    "model folder missing": bad(no_model_folder, "model folder", "{folder}/nowhere", "does not exist"),
    "no config.json": bad(model_folder(lambda f: (f / "config.json").unlink()), "{folder}/model/config.json"),
    "config.json broken": bad(model_folder(lambda f: (f / "config.json").write_text("{")), "config.json"),
    "mixture of experts": bad(config(model_type="qwen2_moe"), "model_type", "'qwen2_moe'", "mixture of experts"),
    "another family": bad(config(model_type="gpt2"), "model_type", "'gpt2'", "llama, mistral, qwen2, qwen3"),
    "RoPE variant": bad(config(rope_parameters={"rope_type": "yarn", "factor": 4.0}), "rope_type", "'yarn'", "llama3"),
    "weights missing": bad(
        model_folder(lambda f: (f / WEIGHTS).unlink()), "{folder}/model", WEIGHTS, "model.init=random"
    ),
    "weights only in another format": bad(model_file("pytorch_model.bin", ""), "{folder}/model", "safetensors"),
    "weights truncated": bad(model_folder(truncate), f"{{folder}}/model/{WEIGHTS}", "fetch it again"),
    "weights are a pointer": bad(model_file(WEIGHTS, "version https://git-lfs.github.com/spec/v1"), WEIGHTS, "fetch"),
    "a tensor missing": bad(weights(lambda w: w.pop(KEY)), "{folder}/model", f"{KEY} is missing"),
    "a tensor of another shape": bad(
        weights(lambda w: w.update({KEY: torch.ones(48, 48)})), KEY, "(48, 48)", "(24, 48)"
    ),
    "index names a file that is missing": bad(
        model_file(INDEX, '{"weight_map": {"model.norm.weight": "b.safetensors"}}'),
        "{folder}/model/b.safetensors", INDEX,
    ),
    # the input file
    "input missing": bad(input_gone, "{folder}/in.jsonl", "does not exist"),
    "input empty": bad(lines(), "{folder}/in.jsonl", "no lines", "at least one"),
    "input is gzip": bad(lines(b"\x1f\x8b\x08\x00\x00\x00\x00\x00"), "{folder}/in.jsonl", "UTF-8"),
    "line 3 is no JSON": bad(lines(GOOD_LINE, GOOD_LINE, '{"prompt": [1],\n', GOOD_LINE), "in.jsonl:3: not JSON"),
    "a line is no object": bad(lines("[1, 2]\n"), "in.jsonl:1:", "list", "a key for each column"),
    "key missing": bad(
        lines(GOOD_LINE, '{"prompt": [1], "answer": [2]}\n'), "in.jsonl:2:", "response is missing", "answer"
    ),
    "prompt is a number": bad(tokens("3"), "in.jsonl:2:", "prompt is a", "list of token ids"),
    "token outside the vocabulary": bad(tokens("[1, 299]"), "in.jsonl:2: prompt[1] = 299", "vocabulary of 299"),
    "token below 0": bad(tokens("[1]", "[2, 3, -1]"), "in.jsonl:2: response[2] = -1", "vocabulary of 299"),
    "token is a float": bad(tokens("[1.0]"), "in.jsonl:2: prompt[0] = 1.0", "token id"),
    "token is a bool": bad(tokens("[1]", "[true]"), "in.jsonl:2: response[0] = ", "rue", "token id"),
    "token is text": bad(tokens("[1]", '[2, "7"]'), "in.jsonl:2: response[1] = ", "7", "token id"),
    "prompt empty": bad(tokens("[]"), "in.jsonl:2: prompt is empty", "at least one token"),
    "sequence too long": bad(tokens(str([1] * 500), str([2] * 13)), "in.jsonl:2:", "513 tokens", "512"),
    "sequence over the limit given": bad(
        together(tokens("[1, 2, 3]", "[4]"), settings("model.max_sequence_length=3")),
        "in.jsonl:1:", "5 tokens", "in.jsonl:2:", "4 tokens", "takes 3", "model.max_sequence_length",
    ),
    "25 bad lines": bad(lines(*['{"prompt": [], "response": [2]}\n'] * 25), "in.jsonl:1:", "in.jsonl:10:", "15 more"),
    "text, and the tokenizer folder is missing": bad(
        together(lines(TEXT), settings("data.tokenizer=/nowhere/tokenizer")), "/nowhere/tokenizer", "data.tokenizer"
    ),
    # the output file
    "output in a missing folder": bad(output("nowhere/out.jsonl"), "--output", "{folder}/nowhere", "does not exist"),
    "output is a folder": bad(output("out"), "--output '{folder}/out' is a folder", "give a file"),
    "output is the input": bad(output("in.jsonl"), "--output '{folder}/in.jsonl' is the input", "give another"),
    # settings
    "unknown key": bad(settings("log_prob.temprature=2"), "log_prob.temprature", "did you mean log_prob.temperature?"),
    "wrong type": bad(settings("log_prob.entropy=1"), "log_prob.entropy = 1", "true or false"),
    "out of range": bad(settings("log_prob.temperature=0"), "log_prob.temperature = 0", "float > 0"),
    "no setting": bad(settings("log_prob.entropy"), "'log_prob.entropy' is not a setting", "section.key=value"),
    "given twice": bad(settings("seed=3", "seed=4"), "seed is given twice, as 3 and 4", "keep one"),
    "model.path and --model": bad(settings("model.path=/other"), "model.path is given twice", "/other"),
    "not read by score": bad(settings("optimizer.lr=1e-6"), "`score` does not read optimizer.lr", "log_prob"),
    "unknown option": bad(settings("--entropy"), "--entropy"),
    "recipe missing": bad(settings("--recipe=/nowhere.yaml"), "recipe '/nowhere.yaml' cannot be read"),
    "sequence parallelism without TP": bad(
        settings("parallel.sequence_parallel=true"),
        "parallel.sequence_parallel = true", "parallel.tensor_model_parallel_size", "parallel.sequence_parallel=false",
    ),
    "virtual pipeline without PP": bad(
        settings("parallel.virtual_pipeline_model_parallel_size=2"),
        "parallel.virtual_pipeline_model_parallel_size = 2", "parallel.pipeline_model_parallel_size",
    ),
    "TP2 in one process": bad(
        settings("parallel.tensor_model_parallel_size=2"),
        "1 process", "parallel.tensor_model_parallel_size 2", "multiple",
    ),
    "above the position limit": bad(
        settings("model.max_sequence_length=513"), "model.max_sequence_length = 513", "512"
    ),
    "token budget too small": bad(
        settings("data.tokens_per_micro_batch=4"), "data.tokens_per_micro_batch = 4", "5 tokens", "raise it"
    ),
    # the environment
    "RANK without WORLD_SIZE": bad(environment(RANK="0"), "RANK", "WORLD_SIZE", "torchrun"),
    "RANK is no number": bad(
        environment(RANK="x", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT="1"), "RANK = 'x'"
    ),
}  # fmt: skip


# Known faults: today a traceback, a wrong answer or a message that does not help. What is mended moves up.
ODD_INPUTS: dict[str, BadInput] = {
    "text, and no tokenizer in the model folder": bad(lines(TEXT), "{model}", "no tokenizer", "data.tokenizer"),
    "text, and no tokenizer, in the response": bad(tokens("[1]", '"the answer"'), "{model}", "no tokenizer"),
    "text the tokenizer has no token for": bad(
        together(tokenizer_without_unknown, tokens("[1]", '"unheard"')), "in.jsonl:2:", "response"
    ),
    "text that is no Unicode": bad(
        together(tokenizer_without_unknown, tokens("[1]", r'"\ud800"')), "in.jsonl:2:", "response"
    ),
    "JSON too deep": bad(lines(GOOD_LINE, "[" * 100_000 + "\n"), "in.jsonl:2:"),
    "FP8 checkpoint": bad(model_folder(quantise), "{folder}/model", "quantiz"),
    "a tensor of whole numbers": bad(weights(lambda w: w.update({NORM: w[NORM].long()})), NORM, "int64"),
    "index places a tensor in no file": bad(model_file(INDEX, '{"weight_map": {"model.norm.weight": 3}}'), INDEX),
    "rope_theta is text": bad(config(rope_parameters={"rope_type": "default", "rope_theta": "a"}), "rope_theta", "'a'"),
    "odd head_dim": bad(config(hidden_size=20), "head_dim", "5"),
    "text for a number in config.json": bad(config(num_attention_heads="4"), "num_attention_heads", "'4'"),
    "output is a pipe": bad(output_is_a_pipe, "--output '{folder}/out/out.jsonl'", "file"),
}


def run_commands(commands: Sequence[dict[str, Any]], folder: Path) -> None:
    rank = int(os.environ["RANK"])
    # Each command is a run of its own: torchrun's store keeps the keys of the process group before.
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    for command in commands:
        os.environ["MASTER_PORT"] = str(command["port"])
        outcome = run_main(command["arguments"][rank])
        (folder / f"{command['name']}.{rank}.json").write_text(json.dumps(dataclasses.asdict(outcome)))


if __name__ == "__main__":
    run_commands(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))


def records(command: Command) -> list[dict[str, Any]]:
    return [json.loads(line) for line in command.output.read_text().splitlines()]


def scored(run: Callable[[Command], Outcome], command: Command) -> list[dict[str, Any]]:
    """The output of a command that has to succeed."""
    outcome = run(command)
    assert outcome.status == 0, outcome.err
    return records(command)


def run_process(command: Command, **options: Any) -> Outcome:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "megatron_flowrl", *command.arguments],
        cwd=command.folder, env=environment, capture_output=True, text=True, timeout=240, **options,
    )  # fmt: skip
    return Outcome(done.returncode, done.stdout, done.stderr)
