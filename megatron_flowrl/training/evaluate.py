"""Evaluation within a run: held-out prompts, with sampling settings of their own."""

from __future__ import annotations

from megatron_flowrl.config import Config
from megatron_flowrl.data.prompts import PromptSet
from megatron_flowrl.evaluation.summary import summarize_answers
from megatron_flowrl.rollout.generation import Sampling
from megatron_flowrl.training.answers import Answers
from megatron_flowrl.training.trainer import Timed


class Evaluator:
    """All ranks construct it and call it together."""

    def __init__(self, config: Config, prompts: PromptSet, answers: Answers, stop_token_ids: tuple[int, ...]) -> None:
        settings = config.evaluation
        self._config, self._prompts, self._answers = config, prompts, answers
        self._sampling = Sampling(
            max_tokens=settings.max_tokens or config.generation.max_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            stop_token_ids=stop_token_ids,
            seed=config.seed if config.generation.seeded else None,
        )

    def due(self, step: int) -> bool:
        """Before the first step, every evaluation.interval steps, and after the last."""
        return step % self._config.evaluation.interval == 0 or step == self._config.run.steps

    def __call__(self, step: int, timed: Timed) -> dict[str, float]:
        """Numbers of the policy as it is after `step`, by room/name; on rank 0, the others get none."""
        n, whole = self._config.evaluation.n, lambda _: timed("evaluation")
        graded = self._answers.sample(self._prompts.prompts, self._sampling, n, str(step), whole, "evaluation")
        found = summarize_answers([one.counted() for one in graded], self._config.reward.correct_from)
        return {f"evaluation/{name}": value for name, value in found.items()}
