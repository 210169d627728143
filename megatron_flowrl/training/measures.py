"""The numbers of a step, beside those of its updates: of its answers, its time, its speed, its memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from megatron_flowrl.config import UserError
from megatron_flowrl.data.batch import TokenSequence
from megatron_flowrl.evaluation.summary import GradedAnswer, summarize_answers
from megatron_flowrl.model.architecture import Architecture
from megatron_flowrl.observe.flops import TransformerSize, forward_flops, memory, peak_flops, training_flops
from megatron_flowrl.observe.line import step_line
from megatron_flowrl.observe.log import logger
from megatron_flowrl.observe.recorder import Sample
from megatron_flowrl.observe.timers import Timers
from megatron_flowrl.rollout.record import RolloutRecord
from megatron_flowrl.training.answers import Answers, num_solutions
from megatron_flowrl.training.inputs import Inputs
from megatron_flowrl.training.session import Session
from megatron_flowrl.training.trainer import TrainedStep

_GIB = 2.0**30
_FORWARD_PASSES = ("old_log_probs", "reference_log_probs", "values")
_HISTOGRAMS = ("residual", "weight", "log_z")


class StepMeasures:
    """What any program measures of its steps. All ranks call `cost` together."""

    def __init__(self, session: Session, architecture: Architecture, steps: range) -> None:
        self._session, self._steps = session, steps
        self._size = TransformerSize(
            hidden=architecture.hidden_size,
            layers=architecture.num_layers,
            heads=architecture.num_attention_heads,
            kv_heads=architecture.num_query_groups,
            ffn=architecture.ffn_hidden_size,
            vocab=architecture.vocab_size,
            head_dim=architecture.head_dim,
        )
        self._peak = self._peak_flops() * session.world.size
        self._known: set[str] = set()
        self._seconds = 0.0
        self._lines = 0

    def cost(
        self, sequences: Sequence[TokenSequence], trained: Sequence[TokenSequence], timers: Timers
    ) -> dict[str, float]:
        """Seconds by phase, tokens a second, share of the peak that the passes use, memory: the largest of any rank.

        `sequences`: those of the step; `trained`: those of them that passes and updates were over.

        speed/mfu is of the updates, speed/passes_share_of_peak of the passes before them: the model's operations, by
        the seconds that they took on the slowest rank, over what all devices could do at best.
        """
        phases, taken = timers.seconds(), memory()
        own = [timers.elapsed(), taken.resident, taken.accelerator_peak or 0, *phases.values()]
        worst = torch.tensor(own, dtype=torch.float64).to(self._session.platform.device)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        elapsed, resident, peak, *slowest = worst.tolist()
        seconds = dict(zip(phases, slowest, strict=True))
        lengths = [len(sequence) for sequence in trained]
        responses = sum(len(sequence.response) for sequence in trained)
        generated = sum(len(sequence.response) for sequence in sequences)
        metrics = {f"time/{name}": value for name, value in seconds.items()}
        metrics |= {
            "time/other": max(elapsed - sum(seconds.values()), 0.0),
            "time/step": elapsed,
            "speed/tokens_per_second": sum(map(len, sequences)) / elapsed,
            "speed/samples_per_second": len(sequences) / elapsed,
            "memory/resident_gib": resident / _GIB,
        }
        if peak:
            metrics["memory/accelerator_peak_gib"] = peak / _GIB
        if seconds.get("generate"):
            metrics["speed/generated_tokens_per_second"] = generated / seconds["generate"]
            metrics["speed/wait_share"] = (seconds["generate"] + seconds.get("grade", 0.0)) / elapsed
        if not math.isnan(self._peak):
            if seconds.get("update"):
                work = training_flops(self._size, lengths, responses)
                metrics["speed/mfu"] = work / seconds["update"] / self._peak
            passes = [seconds[name] for name in _FORWARD_PASSES if seconds.get(name)]
            if passes:
                work = len(passes) * forward_flops(self._size, lengths, responses)
                metrics["speed/passes_share_of_peak"] = work / sum(passes) / self._peak
        self._seconds += elapsed
        self._lines += 1
        return metrics

    def line(self, step: int, metrics: Mapping[str, float], known: Sequence[str] = ()) -> str:
        """The line that is printed of the step."""
        self._known |= {*metrics, *known}
        left = self._seconds / max(self._lines, 1) * (self._steps[-1] - step)
        return step_line(step, self._steps[-1], metrics, self._known, left)

    def _peak_flops(self) -> float:
        config, platform = self._session.config, self._session.platform
        if config.tracking.peak_tflops is not None:
            return config.tracking.peak_tflops * 1e12
        return peak_flops(platform.device_name, config.precision.dtype if config.precision.fp8 is None else "fp8")


class Measures:
    """What `train` measures."""

    def __init__(self, session: Session, inputs: Inputs, steps: range) -> None:
        self._session, self._inputs = session, inputs
        self._cost = StepMeasures(session, inputs.architecture, steps)
        self._texts = session.world.rank == 0 and session.config.tracking.samples > 0

    def of_step(
        self,
        rollout: RolloutRecord,
        sequences: Sequence[TokenSequence],
        trained: TrainedStep,
        answers: Answers | None,
        timers: Timers,
    ) -> dict[str, float]:
        """All numbers of a step; `sequences`: what was trained on. All ranks call it together."""
        config = self._session.config
        found = summarize_answers(self._graded(rollout), config.reward.correct_from)
        metrics = {f"rollout/{name}": value for name, value in found.items()}
        metrics |= {**trained.metrics, **self._cost.cost(rollout.sequences, sequences, timers)}
        if self._inputs.prompts is not None:
            metrics["rollout/epoch"] = rollout.next_position / len(self._inputs.prompts.prompts)
        report = answers.last_sync if answers is not None else None
        if report is not None and metrics.get("time/weight_sync"):
            metrics["sync/gib"] = report.nbytes / _GIB
            metrics["sync/gib_per_second"] = report.nbytes / _GIB / metrics["time/weight_sync"]
        return metrics

    def histograms(self, rollout: RolloutRecord, trained: TrainedStep) -> dict[str, Sequence[float]]:
        """Of which TensorBoard gets the distribution."""
        found: dict[str, Sequence[float]] = {
            "rollout/reward": rollout.rewards,
            "rollout/length": [float(len(sequence.response)) for sequence in rollout.sequences],
        }
        found |= {f"update/{name}": trained.values[name].tolist() for name in _HISTOGRAMS if name in trained.values}
        return found

    def samples(self, rollout: RolloutRecord) -> list[Sample]:
        """Some answers as text, of as many prompts as possible."""
        if not self._texts:
            return []
        try:
            decode = self._inputs.tokenizer().decode
        except UserError as error:  # records are trained on without a tokenizer
            logger.warning("no answer is recorded as text: %s", error)
            self._texts = False
            return []
        first = {group: index for index, group in reversed([*enumerate(rollout.groups)])}
        leading = sorted(first.values())
        chosen = leading + [i for i in range(len(rollout.groups)) if i not in leading]
        return [
            Sample(
                decode(rollout.sequences[i].prompt),
                decode(rollout.sequences[i].response),
                rollout.rewards[i],
                rollout.keys[i],
            )
            for i in chosen[: self._session.config.tracking.samples]
        ]

    def line(self, step: int, metrics: Mapping[str, float]) -> str:
        """The line that is printed of the step."""
        return self._cost.line(step, metrics, ["evaluation/accuracy"] if self._inputs.held_out is not None else [])

    def _graded(self, rollout: RolloutRecord) -> list[GradedAnswer]:
        prompts = self._inputs.prompts.prompts if self._inputs.prompts is not None else None
        return [
            GradedAnswer(
                rollout.groups[i],
                rollout.rewards[i],
                len(sequence.response),
                rollout.finish_reasons[i] == "length",
                rollout.keys[i],
                rollout.problems[i] is not None,
                num_solutions(prompts[rollout.prompt_numbers[i]]) if prompts is not None else None,
            )
            for i, sequence in enumerate(rollout.sequences)
        ]


__all__ = ["Measures", "StepMeasures"]
