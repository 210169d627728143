"""The line that the log has of each step."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

_WIDTH = 7
COLUMNS: Mapping[str, str] = {
    "rollout/reward_mean": "reward",
    "rollout/accuracy": "acc",
    "evaluation/accuracy": "eval",
    "rollout/length_mean": "len",
    "update/loss": "loss",
    "update/residual_abs": "|res|",
    "update/weight_max": "w_max",
    "update/log_z_mean": "logZ",
    "update/entropy": "ent",
    "update/kl_reference": "kl",
    "update/grad_norm": "grad",
    "update/lr": "lr",
    "speed/tokens_per_second": "tok/s",
}
"""What the line shows of a step's scalars, in this order, and under which label."""
SECONDS = "time/step"
"""The scalar that closes the line, with what is left of the run."""


def step_line(
    step: int,
    steps: int,
    scalars: Mapping[str, float],
    known: Collection[str] | None = None,
    seconds_left: float | None = None,
) -> str:
    """`step  12/200  reward   0.431  acc   0.390 ...     3.2 s  eta    4 min`, every number as wide as any other.

    `known` are the names of scalars that any step of the run has: where this step has no number for one, its column is
    blank, so that lines stay aligned; what no step has takes no room. None: those of `scalars`.
    """
    known = scalars if known is None else {*known, *scalars}
    parts = [f"step {step:>{len(str(steps))}}/{steps}"]
    for name, label in COLUMNS.items():
        if name in known:
            width = len(label) + 1 + _WIDTH
            parts.append(f"{label} {number(scalars[name])}" if name in scalars else " " * width)
    if SECONDS in known:
        parts.append(f"{number(scalars[SECONDS])} s" if SECONDS in scalars else " " * (_WIDTH + 2))
    if seconds_left is not None:
        parts.append(f"eta {duration(seconds_left)}")
    return "  ".join(parts).rstrip()


def number(value: float) -> str:
    """Three digits that count, in seven characters whatever the magnitude: `0.431`, `14.2`, `123456`, `1.2e-6`."""
    return f"{_number(float(value)):>{_WIDTH}}"


def duration(seconds: float) -> str:
    """`45 s`, `4 min`, `3.2 h` or `12 d`, in seven characters."""
    if not math.isfinite(seconds):
        return f"{'?':>{_WIDTH}}"
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * length:
            amount = seconds / length
            return f"{f'{amount:.1f} {unit}' if unit == 'h' and amount < 10 else f'{amount:.0f} {unit}':>{_WIDTH}}"
    return f"{f'{max(seconds, 0):.0f} s':>{_WIDTH}}"


def _number(value: float) -> str:
    if value == 0 or not math.isfinite(value):
        return f"{abs(value) if value == 0 else value:.0f}"
    exponent = math.floor(math.log10(abs(value)))
    if exponent >= -2:
        fixed = f"{value:.{max(2 - exponent, 0)}f}"
        if len(fixed) <= _WIDTH:
            return fixed
    for digits in (1, 0):
        mantissa, _, power = f"{value:.{digits}e}".partition("e")
        if len(short := f"{mantissa}e{int(power)}") <= _WIDTH:
            break
    return short


__all__ = ["COLUMNS", "SECONDS", "duration", "number", "step_line"]
