"""The figures of a report: curves of runs in the same axes, and where the time of a step goes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from megatron_flowrl.observe.drawing import COLUMNS, STYLE, Drawing, grid, legend, line_of, plain
from megatron_flowrl.observe.line import SECONDS
from megatron_flowrl.observe.runs import Course, Run

_PHASES = ("#4c83b6", "#e3a35a", "#67ab9f", "#c66b5c", "#a58bc4", "#d9c25f", "#8aa05a", "#c48aa8")
_REST = "#d5d9de"
_OTHER = "time/other"  # what is of no phase; worked out here, since other programs do not record it
_POINTS = 500  # of a curve, so that a report of long runs stays small


@dataclass(frozen=True)
class Panel:
    """One pair of axes. `names`: scalars, of which each run's first is drawn; `log`: where values span decades."""

    title: str
    unit: str
    names: tuple[str, ...]
    log: bool = False
    bounds: tuple[float, float] | None = None


_SHARE = (0.0, 1.0)
GROUPS: Mapping[str, Sequence[Panel]] = {
    "Reward": (
        Panel("Reward of the training answers", "mean reward", ("rollout/reward_mean",)),
        Panel("Accuracy of the training answers", "share correct", ("rollout/accuracy",), bounds=_SHARE),
        Panel("Accuracy on held-out prompts", "share correct", ("evaluation/accuracy",), bounds=_SHARE),
    ),
    "Diversity": (
        Panel(
            "Distinct valid answers",
            "valid answers per prompt",
            ("evaluation/distinct_correct", "rollout/distinct_correct"),
        ),
        Panel(
            "Coverage of all valid answers",
            "share of valid answers",
            ("evaluation/coverage", "rollout/coverage"),
        ),
        Panel("Entropy of the policy", "nats per token", ("update/entropy",)),
    ),
    "Distance from the target": (
        Panel("KL to the reference", "nats per token", ("update/kl_reference",), log=True),
        Panel("Residual", "mean |residual|, nats", ("update/residual_abs",), log=True),
        Panel("log Z", "mean over prompts, nats", ("update/log_z_mean",)),
    ),
    "Updates": (
        Panel(
            "Effective sample size of w",
            "share of the answers",
            ("update/weight_effective_sample_size",),
            bounds=_SHARE,
        ),
        Panel("Loss", "mean over answers", ("update/loss",), log=True),
        Panel("Loss on held-out rows", "nats per token", ("evaluation/loss",)),
        Panel("Gradient norm", "L2 norm before clipping", ("update/grad_norm",), log=True),
    ),
    "Length and speed": (
        Panel("Length of answers", "mean tokens", ("rollout/length_mean",)),
        Panel("Answers cut off by the limit", "share of answers", ("rollout/truncated_share",)),
        Panel("Throughput", "tokens per second", ("speed/tokens_per_second",)),
    ),
}


def draw_all(runs: Sequence[Run]) -> list[Drawing]:
    """A figure a group, of what any of the runs has, and one of the time that steps take."""
    with rc_context(STYLE):
        drawn = [_draw_group(title, panels, runs) for title, panels in GROUPS.items()]
        return [drawing for drawing in [*drawn, _draw_time(runs)] if drawing is not None]


def smoothed(course: Course) -> list[float]:
    """Running means over `window(course)` points, as many on either side; towards the ends over those there are."""
    values, half = np.array([value for _, value in course]), window(course) // 2
    sums, places = np.concatenate([[0.0], np.cumsum(values)]), np.arange(len(values))
    begin, end = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    means: list[float] = ((sums[end] - sums[begin]) / (end - begin)).tolist()
    return means


def window(course: Course) -> int:
    """An odd number of points: about one in fifteen, and 1 where there are too few to smooth."""
    return 1 if len(course) < 30 else 2 * (len(course) // 30) + 1


def _draw_group(title: str, panels: Sequence[Panel], runs: Sequence[Run]) -> Drawing | None:
    panels = [panel for panel in panels if any(run.first_of(*panel.names) for run in runs)]
    if not panels:
        return None
    figure, axes = grid(len(panels))
    for axis, panel in zip(axes, panels, strict=True):
        courses = {index: course for index, run in enumerate(runs) if (course := run.first_of(*panel.names))}
        log = panel.log and _spans_decades([value for course in courses.values() for _, value in course])
        if log:
            axis.set_yscale("log")
        for index, course in courses.items():
            _draw_course(axis, course, line_of(index), log)
        _label(axis, panel.title, panel.unit, runs)
        if not log:
            _bound(axis, panel.bounds, min(value for course in courses.values() for _, value in course))
    drawn = [index for index, run in enumerate(runs) if any(run.first_of(*panel.names) for panel in panels)]
    handles = [Line2D([], [], linewidth=1.7, **line_of(index)) for index in drawn]
    legend(figure, handles, [runs[index].label for index in drawn])
    return Drawing(title, min(len(panels), COLUMNS), figure)


def _draw_course(axis: Axes, course: Course, line: dict[str, Any], log: bool) -> None:
    """Faint as it was, and strong the running mean, of logarithms on an axis of such; few points as they were."""
    if log:
        course = [(step, value) for step, value in course if value > 0]
    if not course:
        return
    steps, values = [step for step, _ in course], [value for _, value in course]
    kept = [*range(0, len(steps) - 1, -(-len(steps) // _POINTS)), len(steps) - 1]
    if window(course) > 1:
        axis.plot([steps[i] for i in kept], [values[i] for i in kept], linewidth=0.8, alpha=0.25, **line)
        values = np.exp(smoothed([(s, math.log(v)) for s, v in course])).tolist() if log else smoothed(course)
    apart = steps[-1] - steps[0] >= 2 * (len(steps) - 1)  # not of every step
    mark = "o" if window(course) == 1 and apart else None
    axis.plot([steps[i] for i in kept], [values[i] for i in kept], linewidth=1.7, marker=mark, markersize=3, **line)


def _spans_decades(values: Sequence[float]) -> bool:
    positive = [value for value in values if value > 0]
    return len(positive) > 0.9 * len(values) and max(positive) > 100 * min(positive)


def _label(axis: Axes, title: str, unit: str, runs: Sequence[Run]) -> None:
    axis.set_title(title)
    axis.set_ylabel(unit)
    axis.set_xlabel("step")
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    first, last = min(run.steps[0] for run in runs), max(run.steps[-1] for run in runs)
    margin = 0.01 * (last - first) if first < last else 0.5
    axis.set_xlim(first - margin, last + margin)


def _bound(axis: Axes, bounds: tuple[float, float] | None, least: float) -> None:
    low, high = axis.get_ylim()
    if bounds is not None:
        margin = 0.03 * (bounds[1] - bounds[0])
        low, high = max(low, bounds[0] - margin), min(high, bounds[1] + margin)
    if least > 0 and least < 0.3 * high:  # from 0, where that costs little
        low = 0.0
    if high - low < 1e-9 * max(abs(high), 1e-30):
        low, high = low - 0.5, high + 0.5
    axis.set_ylim(low, high)


def _draw_time(runs: Sequence[Run]) -> Drawing | None:
    """Seconds of each step by phase, one pair of axes a run, all of one scale."""
    timed = [(run, _phases(run)) for run in runs]
    timed = [(run, phases) for run, phases in timed if phases]
    if not timed:
        return None
    totals: dict[str, float] = {}
    for _, phases in timed:
        for name, seconds in phases.items():
            totals[name] = totals.get(name, 0.0) + float(np.mean(seconds))
    order = sorted(totals, key=lambda name: -totals[name])
    shown, rest = order[: len(_PHASES)], order[len(_PHASES) :]
    colors = dict(zip(shown, _PHASES, strict=False))
    figure, axes = grid(len(timed), narrowest=2)
    top = 0.0
    for axis, (run, phases) in zip(axes, timed, strict=True):
        steps = _timed_steps(run)
        zero = np.zeros(len(steps))
        known = [_mean_of(steps, phases.get(name, zero)) for name in shown]
        other = _mean_of(steps, sum((phases.get(name, zero) for name in rest), zero) + _unnamed(run, steps, phases))
        stride = -(-len(steps) // _POINTS)
        stack = [part[::stride] for part in (*known, other)]
        axis.stackplot(steps[::stride], stack, colors=[*colors.values(), _REST], linewidth=0)
        top = max(top, float(np.max(np.sum(stack, axis=0))))
        _label(axis, plain(run.label), "seconds per step", [run])
    for axis in axes:
        axis.set_ylim(0, 1.08 * top or 1.0)
    names = [name.partition("/")[2].replace("_", " ") for name in shown]
    legend(figure, [Patch(color=color) for color in (*colors.values(), _REST)], [*names, "other"])
    return Drawing("Time of a step", min(max(len(timed), 2), COLUMNS), figure)


def _timed_steps(run: Run) -> list[int]:
    """Training steps: an evaluation before the first has a time, but is none."""
    steps = {step for name, course in run.scalars.items() if name.startswith("time/") for step, _ in course}
    return sorted(step for step in steps if step > 0)


def _phases(run: Run) -> dict[str, np.ndarray[Any, Any]]:
    steps = _timed_steps(run)
    found = {}
    for name, course in run.scalars.items():
        if name.startswith("time/") and name not in (SECONDS, _OTHER) and steps:
            seconds = dict(course)
            found[name] = np.array([max(seconds.get(step, 0.0), 0.0) for step in steps])
    return found


def _unnamed(run: Run, steps: Sequence[int], phases: Mapping[str, np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    whole = dict(run.scalars.get(SECONDS, ()))
    known = np.sum(list(phases.values()), axis=0)
    return np.array([max(whole.get(step, 0.0) - one, 0.0) for step, one in zip(steps, known, strict=True)])


def _mean_of(steps: Sequence[int], seconds: np.ndarray[Any, Any]) -> list[float]:
    """Smoothed twice: what comes every so many steps, as an evaluation does, leaves no saw."""
    once = smoothed(list(zip(steps, seconds.tolist(), strict=True)))
    return smoothed(list(zip(steps, once, strict=True)))


__all__ = ["GROUPS", "Panel", "draw_all", "smoothed", "window"]
