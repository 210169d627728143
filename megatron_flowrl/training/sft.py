"""`megatron-flowrl sft`: supervised training on given responses, by the same model, plan, update and checkpoints."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_flowrl.config import Config
from megatron_flowrl.data.batch import TokenSequence
from megatron_flowrl.data.order import PromptOrder
from megatron_flowrl.model.packing_rules import packing_rules, plan
from megatron_flowrl.objectives.supervised import Supervised
from megatron_flowrl.observe.log import logger
from megatron_flowrl.observe.timers import Timers
from megatron_flowrl.platform.distributed import World
from megatron_flowrl.training.experience import Experience, score
from megatron_flowrl.training.inputs import Responses, read_responses
from megatron_flowrl.training.journal import POSITION, Journal
from megatron_flowrl.training.measures import StepMeasures
from megatron_flowrl.training.oversight import Oversight, overseen
from megatron_flowrl.training.session import Session, prepared
from megatron_flowrl.training.trainer import Trainer


def sft(config: Config, world: World) -> None:
    """Train on the rows of sft.path, from where the run's folder says. Raises UserError."""
    with prepared(config, world) as session, overseen(session) as oversight:
        inputs = read_responses(session)
        journal = Journal(session)
        objective = Supervised()
        trainer = Trainer(
            inputs.architecture, inputs.source, objective, session.config, session.platform, session.replicas
        )
        place = journal.resume(trainer.state)
        with journal:
            _train(session, inputs, trainer, journal, oversight, place.step, place.progress[POSITION])


def _train(
    session: Session,
    inputs: Responses,
    trainer: Trainer,
    journal: Journal,
    oversight: Oversight,
    done: int,
    position: int,
) -> None:
    config, training, validation = session.config, inputs.training, inputs.validation
    order = PromptOrder(len(training), config.seed, shuffle=True)
    timers = Timers(session.platform.synchronize, oversight.watchdog.beat)
    steps = range(done + 1, config.run.steps + 1)
    measures = StepMeasures(session, trainer.model.architecture, steps)
    for step in steps:
        oversight.watchdog.step()
        sequences = [training[number] for number in order.take(position, config.sft.sequences_per_step)]
        trained = trainer.step(
            step, _experience(sequences), [0] * len(sequences), timers, on_progress=oversight.watchdog.sign
        )
        oversight.watchdog.done(trained.packing is not None)
        position += len(sequences)
        evaluated, last = {}, step == config.run.steps
        if validation and (last or step % config.evaluation.interval == 0):
            with timers("evaluation"):
                evaluated["evaluation/loss"] = _loss(session, validation, trainer)
        metrics = {**trained.metrics, **measures.cost(sequences, sequences, timers), **evaluated}
        journal.record(step, metrics)
        logger.info(measures.line(step, metrics))
        timers.reset()  # what follows is of the next step
        if not last and oversight.notice.everywhere():
            journal.end(step, position)
            return
        with timers("save"):
            journal.save(step, position, last=last, reward=None)


def _experience(sequences: Sequence[TokenSequence]) -> Experience:
    count = len(sequences)
    return Experience(
        sequences=sequences, rewards=torch.zeros(count, dtype=torch.float64), groups=torch.arange(count)
    )  # fmt: skip


def _loss(session: Session, sequences: Sequence[TokenSequence], trainer: Trainer) -> float:
    """- mean log-prob of the validation rows' response tokens."""
    config, architecture = session.config, trainer.model.architecture
    packing = plan([len(sequence) for sequence in sequences], packing_rules(config, architecture, session.replicas))
    scored = score(trainer.model.chunks, _experience(sequences), packing, config, session.platform.device)
    return -float(scored.log_probs.double().mean())


__all__ = ["sft"]
