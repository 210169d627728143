"""Settings of what the policy is trained on. Their defaults per method are in presets.py."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from .strict import STRICT

UnitInterval = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ObjectiveConfig:
    """What the policy is trained on, and what is common to all methods."""

    name: Annotated[str, Field(min_length=1)] = "flowrl"
    """flowrl; the reward-maximising grpo, dapo, gspo, rloo, reinforce_plus_plus, ppo; gflownet_ppo (ppo's loss and a
    trajectory balance); or package.module.factory, called with the configuration. A name sets the defaults of
    policy_gradient."""

    preset: Literal["paper", "official", "exact", "scaled"] = "scaled"
    """Sets the defaults of flowrl and log_z. `paper`: as published, w in [0.8, 1.28], log-probs divided by length,
    group-normalised reward, beta 15. `official`: as its code, w at most 10, log Z without the prompt's last token, with
    dropout. `exact`: token sums and raw reward, so that the policy samples in proportion to pi_ref exp(beta r).
    `scaled`: the same target, the whole residual divided by length."""

    degenerate_groups: Literal["keep", "drop"] = "keep"
    """Answers to a prompt that all have the same reward: `keep` trains on them (FlowRL then pulls them to the
    reference), `drop` leaves them out, as DAPO's dynamic sampling does."""

    overlong_buffer: PositiveInt | None = None
    """Answers lose up to 1 of their reward over the last overlong_buffer tokens before generation.max_tokens (DAPO).
    null: they do not."""

    force_old_pass: bool = False
    """Compute the log-probs of the policy before its updates in a pass of their own, also where they are the first
    update's own."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FlowRLConfig:
    """FlowRL's residual, log Z + log pi - beta r - log pi_ref, and the importance weight w of its square."""

    beta: PositiveFloat = 8.0
    """How sharply the target prefers rewards: pi_ref exp(beta r)."""

    length_normalization: Literal["none", "log_probs", "residual"] = "residual"
    """`log_probs`: sums of log-probs are divided by length, as published; it makes beta grow with length. `residual`:
    the whole residual is divided by length ** length_exponent, which leaves the target where it is. `none`."""

    length_exponent: UnitInterval = 1.0
    """Exponent of length_normalization=residual."""

    reward: Literal["raw", "group_mean", "leave_one_out", "group_norm"] = "raw"
    """What is made of the rewards of a prompt's answers: nothing; less their mean; less the mean of the others; less
    the mean, divided by the standard deviation."""

    importance_level: Literal["sum", "mean", "none"] = "sum"
    """w is exp of the sum over the tokens of log pi - log pi_old, or of its mean; `none`: 1."""

    importance_clip: Literal["none", "max", "two_sided"] = "max"
    """w is at most importance_max; or within 1 - importance_clip_low and 1 + importance_clip_high. Its logarithm is
    kept within -20 and 20 in any case."""

    importance_max: PositiveFloat = 10.0
    """Upper bound of importance_clip=max."""

    importance_clip_low: UnitInterval = 0.2
    """Lower bound of importance_clip=two_sided, below 1."""

    importance_clip_high: NonNegativeFloat = 0.28
    """Upper bound of importance_clip=two_sided, above 1."""

    log_z: Literal["mlp", "group", "none"] = "mlp"
    """`mlp`: learned, from the prompt. `group`: the mean of beta r - log pi + log pi_ref over a prompt's answers, from
    before the update. `none`: 0."""

    reference: Literal["reference", "old", "none"] = "reference"
    """What the target is a tilt of: the frozen reference model, the policy before the update, or nothing (exp(beta r)
    itself)."""

    residual_limit: PositiveFloat | None = None
    """The squared residual goes on as a straight line from here, so that its gradient is limited (Huber). null: it
    does not."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LogZConfig:
    """The learned partition function, a head of three layers on the last pipeline stage."""

    lr: NonNegativeFloat | None = None
    """Its learning rate, which takes the same course. null: optimizer.lr."""

    weight_decay: NonNegativeFloat | None = None
    """Its weight decay. null: optimizer.weight_decay."""

    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout after each of its hidden layers, in training passes. What is dropped for a prompt is the same however the
    batch is cut."""

    prompt_tokens: Literal["all", "drop_last"] = "all"
    """The prompt's tokens whose hidden states are averaged. `drop_last`: without the last one, if there is another."""

    detach: bool = False
    """Keep its gradient from the rest of the model."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PolicyGradientConfig:
    """The reward-maximising methods: a clipped ratio times an advantage. Defaults go with objective.name."""

    advantage: Literal["group_norm", "group_mean", "leave_one_out", "reinforce_plus_plus", "gae"] = "group_norm"
    """Reward less the group's mean, divided by its standard deviation (grpo) or not; less the others' mean; sums of
    token rewards, standardised over all tokens (reinforce_plus_plus); from a critic (ppo)."""

    ratio: Literal["token", "sequence"] = "token"
    """The ratio pi / pi_old of each token, or its geometric mean over the answer (gspo)."""

    aggregation: Literal["token_mean", "sequence_mean"] = "token_mean"
    """Mean over all tokens of a mini-batch, or over its answers of the means over their tokens."""

    clip_low: UnitInterval = 0.2
    """The ratio counts no less than 1 - clip_low."""

    clip_high: NonNegativeFloat = 0.2
    """The ratio counts no more than 1 + clip_high."""

    clip_dual: Annotated[float, Field(gt=1)] | None = None
    """With a negative advantage the loss is at most this times it. null: no limit."""

    kl_coef: NonNegativeFloat = 0.0
    """Times the KL divergence to the reference (k3 estimate), added to the loss."""

    kl_in_reward: NonNegativeFloat = 0.0
    """Times log pi - log pi_ref of each token, taken from its reward. For reinforce_plus_plus and gae."""

    entropy_coef: NonNegativeFloat = 0.0
    """Times the entropy of the policy, taken from the loss."""

    entropy_top_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the tokens, those with the highest entropy, that the advantage is for."""

    balance_coef: NonNegativeFloat = 1.0
    """Times the trajectory balance, added to the loss. For gflownet_ppo."""

    discount: UnitInterval = 1.0
    """Discount of later tokens. For reinforce_plus_plus and gae."""

    gae_lambda: UnitInterval = 1.0
    """Weight of later differences of values. For gae."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CriticConfig:
    """The critic of advantage=gae: the policy's architecture with a value head, and weights of its own."""

    lr: NonNegativeFloat = 1e-5
    """Its learning rate, which takes the same course as the policy's."""

    weight_decay: NonNegativeFloat = 0.1
    """Its weight decay."""

    clip_grad: NonNegativeFloat = 1.0
    """Largest global L2 norm of its gradient. 0: no clipping."""

    value_clip: PositiveFloat | None = 0.2
    """How far values may move from the old ones before their loss no longer falls. null: as far as they like."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SamplerCorrectionConfig:
    """A weight for what the sampler's arithmetic differs by from the trainer's: rho = pi_old / pi_sampler."""

    level: Literal["token", "sequence"] | None = None
    """rho of each token, or of whole answers. null: no weight. A loss of whole answers (flowrl) takes the mean of its
    tokens' rhos."""

    mode: Literal["truncate", "mask"] = "truncate"
    """`truncate`: min(rho, maximum). `mask`: 0 where rho is not within minimum and maximum."""

    maximum: PositiveFloat = 2.0
    """Largest rho."""

    minimum: NonNegativeFloat = 0.0
    """Smallest rho of mode=mask."""


__all__ = [
    "CriticConfig",
    "FlowRLConfig",
    "LogZConfig",
    "ObjectiveConfig",
    "PolicyGradientConfig",
    "SamplerCorrectionConfig",
]
