"""The comparison as a picture: a panel a measure, a row a method, a dot a seed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LABELS = {
    "flowrl_exact": "FlowRL, exact",
    "flowrl_scaled": "FlowRL, scaled",
    "flowrl_paper": "FlowRL, paper",
    "grpo": "GRPO",
    "ppo": "PPO",
    "reinforce_plus_plus": "REINFORCE++",
}
PANELS = {
    "accuracy": "accuracy\n(share of answers that are right)",
    "distinct_correct": "distinct right answers\nof 16 to a problem",
    "entropy": "entropy over right answers\n(nats)",
    "kl": "KL(policy || tilted start)\n(nats; 0 is FlowRL's target)",
}
_FLOWRL, _PUBLISHED, _OTHERS = "#1769aa", "#8e5bb5", "#c2452d"


def draw(result: Mapping[str, Any], file: Path) -> None:
    """Means as bars, seeds as dots, the warm start as a line."""
    methods = list(result["methods"])
    figure, axes = plt.subplots(
        1, len(PANELS), figsize=(3.3 * len(PANELS), 0.42 * len(methods) + 1.6), sharey=True, layout="constrained"
    )
    for axis, (measure, title) in zip(axes, PANELS.items(), strict=True):
        for row, name in enumerate(methods):
            of = result["methods"][name][measure]
            color = _PUBLISHED if name == "flowrl_paper" else _FLOWRL if name.startswith("flowrl") else _OTHERS
            axis.barh(row, of["mean"], color=color, alpha=0.8, height=0.6)
            axis.plot(of["seeds"], [row] * len(of["seeds"]), "o", color="black", markersize=3)
            axis.annotate(f" {of['mean']:.2f}", (max([*of["seeds"], of["mean"], 0]), row), va="center", fontsize=9)
        axis.axvline(result["start"][measure], color="#777777", linestyle="--", linewidth=1, label="warm start")
        axis.set_title(title, fontsize=10)
        axis.set_xlim(right=1.18 * axis.get_xlim()[1])
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(methods)), [LABELS[name] for name in methods])
    axes[0].invert_yaxis()
    axes[-1].legend(fontsize=8, frameon=False, loc="lower right")
    figure.savefig(file, dpi=130)
    plt.close(figure)


__all__ = ["draw"]
