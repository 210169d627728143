"""The figures: the distributions of the mixture in the manner of the paper's figure 1, and the way there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from examples.distribution_matching.tasks import TASKS

PANELS = {
    "flowrl_exact": "FlowRL, exact",
    "grpo": "GRPO",
    "ppo": "PPO",
    "reinforce_plus_plus": "REINFORCE++",
}
TITLES = {
    "mixture": "mixture: 1 prompt, 100 answers",
    "conditional": "conditional: 4 prompts, 4,096 answers each",
    "unequal": "unequal: 121 answers of 1 to 4 tokens",
}
_TARGET, _POLICY, _BASELINE = "#9aa5b1", "#1769aa", "#c2452d"
# Solid for what aims at the target itself, dashed for the published forms, dotted for what maximises reward.
_LINES = {
    "flowrl_exact": ("#1769aa", "-"),
    "flowrl_scaled": ("#2a9d8f", "-"),
    "flowrl_paper": ("#8e5bb5", "--"),
    "flowrl_official": ("#d4a017", "--"),
    "flowrl_paper_raw": ("#555555", "--"),
    "grpo": ("#c2452d", ":"),
    "ppo": ("#e07a5f", ":"),
    "reinforce_plus_plus": ("#7f1d1d", ":"),
}


def draw_distributions(policies: Mapping[str, Sequence[float]], kl: Mapping[str, float], file: Path) -> None:
    """Target and policies over the 100 states of `mixture`; kl: KL(target || policy) of each."""
    target = TASKS["mixture"].log_target[0].softmax(0).tolist()
    names = [name for name in PANELS if name in policies]
    figure, axes = plt.subplots(1, 1 + len(names), figsize=(3.1 * (1 + len(names)), 3.2), layout="constrained")
    axes = [axes] if not names else list(axes)
    states, top = range(len(target)), 1.3 * max(target)
    axes[0].fill_between(states, target, step="mid", color=_TARGET)
    axes[0].set_title("Target", fontsize=11)
    for axis, name in zip(axes[1:], names, strict=True):
        color = _POLICY if name.startswith("flowrl") else _BASELINE
        axis.bar(states, policies[name], width=1.0, color=color, label="policy")
        axis.step(states, target, where="mid", color="black", linewidth=0.9, label="target")
        axis.set_title(f"{PANELS[name]}\nKL(target || policy) = {_short(kl[name])}", fontsize=11)
        highest = max(states, key=policies[name].__getitem__)
        if policies[name][highest] > top:  # cut off, so that the target stays readable
            place = f"{policies[name][highest]:.3f} at state {highest}"
            axis.annotate(place, (highest + 3, 0.93 * top), fontsize=9, color=color)
        axis.legend(fontsize=8, loc="upper left", frameon=False)
    for axis in axes:
        axis.set_xlabel("state")
        axis.set_xlim(-0.5, len(target) - 0.5)
        axis.set_ylim(0, top)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("probability")
    figure.savefig(file, dpi=130)
    plt.close(figure)


def draw_courses(courses: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]], file: Path) -> None:
    """KL(target || policy) over the steps: {task: {method: [(step, KL)]}}, a panel a task."""
    figure, axes = plt.subplots(1, len(courses), figsize=(4.6 * len(courses), 3.8), layout="constrained", squeeze=False)
    drawn = {}
    for axis, (task, of_methods) in zip(axes[0], courses.items(), strict=True):
        for name, course in of_methods.items():
            color, style = _LINES[name]
            steps, kls = zip(*course, strict=True)
            (drawn[name],) = axis.plot(steps, [max(kl, 1e-5) for kl in kls], style, color=color, linewidth=1.8)
        axis.axhline(0.01, color="#bbbbbb", linewidth=0.8, zorder=0)
        axis.set_yscale("log")
        axis.set_xlabel("step")
        axis.set_title(TITLES[task], fontsize=11)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("KL(target || policy), nats")
    figure.legend(
        list(drawn.values()), list(drawn), loc="outside lower center", ncols=len(drawn), fontsize=9, frameon=False
    )
    figure.savefig(file, dpi=130)
    plt.close(figure)


def _short(kl: float) -> str:
    return f"{kl:.4f}" if kl < 0.1 else f"{kl:.2f}"
