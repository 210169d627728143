"""Pictures of evaluations: how good the answers are, and how different."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from megatron_flowrl.evaluation.results import DIVERSITY, Numbers
from megatron_flowrl.observe.drawing import COLUMNS, STYLE, Drawing, grid, legend, line_of, plain

_WIDTH = 0.8  # of all bars of a benchmark


def draw_quality(evaluations: Mapping[str, Numbers]) -> Drawing:
    """Avg@n with its interval in one pair of axes, and pass@k over k in one a benchmark."""
    names = _benchmarks(evaluations)
    with rc_context(STYLE):
        figure, axes = grid(1 + len(names), narrowest=2)
        _draw_bars(axes[0], evaluations, names, "avg", "Avg@n", "share of answers that are right")
        axes[0].set_ylim(0.0, 1.0)
        for axis, name in zip(axes[1:], names, strict=True):
            for index, of in enumerate(evaluations.values()):
                if name in of:
                    _draw_pass(axis, of[name], line_of(index))
            axis.set_title(f"{plain(name)}: pass@k")
            axis.set_xlabel("k answers")
            axis.set_ylabel("share of problems solved")
        _names_below(figure, evaluations)
    return Drawing("Quality", min(1 + len(names), COLUMNS), figure)


def draw_diversity(evaluations: Mapping[str, Numbers]) -> Drawing | None:
    """A pair of axes a measure; None where no evaluation has any."""
    measures = [one for one in DIVERSITY if any(one in of for some in evaluations.values() for of in some.values())]
    if not measures:
        return None
    with rc_context(STYLE):
        figure, axes = grid(len(measures), narrowest=2)
        for axis, measure in zip(axes, measures, strict=True):
            _draw_bars(axis, evaluations, _benchmarks(evaluations, measure), measure, *DIVERSITY[measure])
            if measure == "judged":
                axis.set_ylim(1.0, 5.0)
        _names_below(figure, evaluations)
    return Drawing("Diversity", min(len(measures), COLUMNS), figure)


def _draw_bars(
    axis: Axes, evaluations: Mapping[str, Numbers], names: Sequence[str], measure: str, title: str, unit: str
) -> None:
    """A bar an evaluation, side by side at each benchmark, with 95% intervals."""
    width = _WIDTH / len(evaluations)
    for index, of in enumerate(evaluations.values()):
        color = line_of(index)["color"]
        for place, name in enumerate(names):
            if measure not in of.get(name, {}):
                continue
            x, value = place - _WIDTH / 2 + (index + 0.5) * width, of[name][measure]
            axis.bar(x, value, width=0.92 * width, color=color, alpha=0.85)
            low, high = of[name][f"{measure}_interval"]
            axis.plot([x, x], [low, high], color="#24292f", linewidth=1.1)
    axis.set_title(title)
    axis.set_ylabel(unit)
    crowded = len(names) > 3
    labels = [plain(name) for name in names]
    axis.set_xticks(range(len(names)), labels, rotation=30 if crowded else 0, ha="right" if crowded else "center")
    center, half = (len(names) - 1) / 2, max(len(names), 2) / 2 + 0.1
    axis.set_xlim(center - half, center + half)
    axis.grid(visible=False, axis="x")


def _draw_pass(axis: Axes, of: Mapping[str, Any], line: Mapping[str, Any]) -> None:
    points = sorted((int(name[5:]), name) for name in of if name.startswith("pass@") and name[5:].isdigit())
    ks = [k for k, _ in points]
    lows, highs = zip(*(of[f"{name}_interval"] for _, name in points), strict=True)
    axis.fill_between(ks, lows, highs, color=line["color"], alpha=0.15, linewidth=0)
    axis.plot(ks, [of[name] for _, name in points], marker="o", markersize=3, linewidth=1.7, **line)
    axis.set_xscale("log", base=2)
    axis.set_xticks(ks, [str(k) for k in ks])
    axis.xaxis.set_minor_locator(NullLocator())


def _benchmarks(evaluations: Mapping[str, Numbers], measure: str = "avg") -> list[str]:
    return list(dict.fromkeys(name for some in evaluations.values() for name, of in some.items() if measure in of))


def _names_below(figure: Any, evaluations: Mapping[str, Numbers]) -> None:
    handles = [Line2D([], [], linewidth=4, color=line_of(index)["color"]) for index in range(len(evaluations))]
    legend(figure, handles, list(evaluations))


__all__ = ["draw_diversity", "draw_quality"]
