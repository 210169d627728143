"""What a model makes of all right answers, by their probabilities and not by samples.

The writings of a problem are known, so each one's probability is what `megatron-flowrl score` says. A problem's answers
are its writings y and, as one, all others. With p the model, r the model that training began with, and

    target(y) = r(y) exp(beta R(y)) / Z, target(others) = r(others) / Z, R the reward, Z what makes the sum 1

    mass      sum of p(y)
    entropy   of p(y) / mass, in nats: how evenly the right answers are spread
    kl        KL(p || target) in nats, from below: others are not told apart

are means over problems.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from examples.countdown.task import PIECES
from megatron_flowrl.data.tokenizer import load_tokenizer


def log_probs_of(model: Path, tokenizer: Path, rows: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """log p of every writing of every row, EOS included. `model`: a checkpoint or a Hugging Face folder."""
    encode, end = load_tokenizer(tokenizer).encode, PIECES.index("<eos>")
    with tempfile.TemporaryDirectory() as folder:
        given, scored = Path(folder, "in.jsonl"), Path(folder, "out.jsonl")
        with given.open("w") as lines:
            for row in rows:
                for writing in row["writings"]:
                    line = {"prompt": encode(row["prompt"], True), "response": [*encode(writing, False), end]}
                    lines.write(f"{json.dumps(line)}\n")
        command = [sys.executable, "-m", "megatron_flowrl", "score", "--model", model, "--input", given]
        settings = ["precision.dtype=float32", "data.tokens_per_micro_batch=8192", "logging.level=warning"]
        subprocess.run([*map(str, command), "--output", str(scored), *settings], check=True)
        found = [json.loads(line)["log_prob"] for line in scored.read_text().splitlines()]
    ends = [0]
    for row in rows:
        ends.append(ends[-1] + len(row["writings"]))
    return [found[start:stop] for start, stop in pairwise(ends)]


def measures(
    policy: Sequence[Sequence[float]],
    start: Sequence[Sequence[float]],
    rewards: Sequence[Sequence[float]],
    beta: float,
) -> dict[str, float]:
    """mass, entropy and kl, of log-probs and rewards of writings."""
    masses, entropies, kls = [], [], []
    for mine, first, worth in zip(policy, start, rewards, strict=True):
        p, r = [math.exp(value) for value in mine], [math.exp(value) for value in first]
        mass, before = min(sum(p), 1.0), min(sum(r), 1.0)
        log_z = math.log(sum(b * math.exp(beta * x) for b, x in zip(r, worth, strict=True)) + 1 - before)
        pairs = [(a, math.log(b) + beta * x - log_z) for a, b, x in zip(p, r, worth, strict=True)]
        kl = sum(a * (math.log(a) - log_target) for a, log_target in pairs if a > 0)
        if mass < 1 and before < 1:
            kl += (1 - mass) * (math.log1p(-mass) - (math.log1p(-before) - log_z))
        masses.append(mass)
        entropies.append(-sum(a / mass * math.log(a / mass) for a in p if a > 0))
        kls.append(kl)
    return {"mass": fmean(masses), "entropy": fmean(entropies), "kl": fmean(kls)}


__all__ = ["log_probs_of", "measures"]
