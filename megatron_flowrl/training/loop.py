"""`megatron-flowrl train`: the loop.

A step: prompts are answered by the present policy, and answers graded as they finish; passes before the update give
log-probs, of which the objective makes its constants; an update for each mini-batch; the policy as it then is is
evaluated, recorded and saved, and streamed to the sampler for the next step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import NoReturn

from megatron_flowrl.config import Config, SharedUserError, check_answers
from megatron_flowrl.observe.log import logger, progress
from megatron_flowrl.observe.profile import profiled
from megatron_flowrl.observe.timers import Timers
from megatron_flowrl.platform.distributed import World, alike
from megatron_flowrl.rollout.errors import Interrupted, LeaderStopped
from megatron_flowrl.training.answers import Answers
from megatron_flowrl.training.evaluate import Evaluator
from megatron_flowrl.training.experience import gather_experience
from megatron_flowrl.training.inputs import Inputs, read_inputs
from megatron_flowrl.training.journal import POSITION, Journal, RunFolder
from megatron_flowrl.training.measures import Measures
from megatron_flowrl.training.oversight import Oversight, overseen
from megatron_flowrl.training.rollouts import Rollouts, check_replay
from megatron_flowrl.training.session import Session, prepared
from megatron_flowrl.training.trainer import Trainer, mini_batches


def train(config: Config, world: World) -> None:
    """Train a policy as the configuration says, from where the run's folder says. Raises UserError."""
    with alike():
        check_answers(config)
    with prepared(config, world) as session, overseen(session) as oversight, ExitStack() as stack:
        inputs = read_inputs(session, RunFolder(config).logs)
        journal = Journal(session, critic=inputs.objective.needs.values)
        trainer = Trainer(
            inputs.architecture, inputs.source, inputs.objective, session.config, session.platform, session.replicas
        )
        place = journal.resume(trainer.state, trainer.critic.state if trainer.critic is not None else None)
        steps = range(place.step + 1, config.run.steps + 1)
        logger.info(
            "%s; %s", session.layout(), f"steps {steps[0]} to {steps[-1]}" if steps else "nothing is left to do"
        )
        with journal:
            if steps:
                check_replay(config, steps)
                answers = _answers(session, inputs, trainer, journal.folder, oversight, stack)
                with suppress(Interrupted):
                    _train(session, inputs, trainer, answers, journal, oversight, steps, place.progress[POSITION])


def _answers(
    session: Session,
    inputs: Inputs,
    trainer: Trainer,
    folder: RunFolder,
    oversight: Oversight,
    stack: ExitStack,
) -> Answers | None:
    if inputs.prompts is None:
        return None
    answers = Answers(session, trainer.model, inputs.tokenizer, folder.logs, oversight.on_wait)
    stack.callback(answers.close)
    answers.start()
    return answers


def _train(
    session: Session,
    inputs: Inputs,
    trainer: Trainer,
    answers: Answers | None,
    journal: Journal,
    oversight: Oversight,
    steps: range,
    position: int,
) -> None:
    config, rank = session.config, session.world.rank
    rollouts = Rollouts(
        config,
        inputs.prompts,
        answers,
        inputs.stop_token_ids,
        inputs.architecture.vocab_size,
        journal.folder.rollouts,
    )
    evaluator = None
    if answers is not None and inputs.held_out is not None:
        evaluator = Evaluator(config, inputs.held_out, answers, inputs.stop_token_ids)
    timers = Timers(session.platform.synchronize, oversight.watchdog.beat)
    measures = Measures(session, inputs, steps)
    if evaluator is not None and steps[0] == 1:
        with suppress(Interrupted):  # the first step will say so, too
            journal.record(0, evaluator(0, timers))
    timers.reset()
    for step in steps:
        with profiled(config.tracking, step, rank, journal.folder.root):
            with _kept(journal, step - 1, position):
                rollout = rollouts.take(step, position, timers)
                if answers is not None:
                    answers.rest()
            with alike():
                experience = gather_experience(
                    rollout.sequences, rollout.rewards, rollout.groups, config, rollout.answer_log_probs()
                )
            shares = mini_batches(experience.groups.tolist(), config.run.prompts_per_mini_batch)
            oversight.watchdog.step()
            with progress(config.logging, rank, len({*shares}), f"update {step}") as advance:
                trained = trainer.step(step, experience, shares, timers, advance, oversight.watchdog.sign)
            oversight.watchdog.done(trained.packing is not None)
        position, last = rollout.next_position, step == config.run.steps
        ending = oversight.notice.everywhere() and not last
        evaluated, trouble = {}, None
        if evaluator is not None and evaluator.due(step) and not ending:
            try:
                evaluated = evaluator(step, timers)
            except LeaderStopped:
                raise
            except SharedUserError as error:  # the step is kept, and what has stopped the evaluation comes after it
                trouble = error
        metrics = {**measures.of_step(rollout, experience.sequences, trained, answers, timers), **evaluated}
        journal.record(step, metrics, measures.histograms(rollout, trained), measures.samples(rollout))
        logger.info(measures.line(step, metrics))
        timers.reset()  # what follows is of the next step
        reward = evaluated.get("evaluation/reward_mean")
        if trouble is not None or ending:
            _end(journal, step, position, trouble or Interrupted("the run was asked to end"), reward)
        with timers("save"):
            journal.save(step, position, last=last, reward=reward)
            rollouts.prune(journal.saved)


@contextmanager
def _kept(journal: Journal, step: int, position: int) -> Iterator[None]:
    """Where there are no answers to go on with, what was trained up to `step` is saved before the error goes on."""
    try:
        yield
    except LeaderStopped:
        raise
    except SharedUserError as error:
        _end(journal, step, position, error)


def _end(journal: Journal, step: int, position: int, why: SharedUserError, reward: float | None = None) -> NoReturn:
    """Save what was trained, and end for this reason; where that cannot be saved, that is said too."""
    try:
        journal.end(step, position, reward)
    except SharedUserError as error:
        raise SharedUserError(*why.problems, *error.problems) from why
    raise why


__all__ = ["train"]
