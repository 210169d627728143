"""What is logged of an objective: values of sequences, gathered over a mini-batch, and the numbers made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from megatron_flowrl.objectives.batch import Batch
from megatron_flowrl.objectives.mismatch import LOG_RATIO_LIMIT

COMMON = ("log_prob", "reference_log_prob", "kl_reference", "kl_old", "entropy")


def kl_k3(log_probs: Tensor, other: Tensor) -> Tensor:
    """exp(d) - 1 - d with d = other - log_probs, [N]: for samples of the first an estimate of KL(first || other).

    Schulman, "Approximating KL divergence" (2020): unbiased, and never below 0. d is kept in [-20, 20].
    """
    difference = (other - log_probs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return difference.expm1() - difference


def common_statistics(batch: Batch) -> dict[str, Tensor]:
    """Means over each sequence's tokens, [S], of log-probs, k3 divergences and entropy; NaN where one is not known.

    The answers are the old policy's, so `kl_old` is an estimate of KL(pi_old || pi); `kl_reference` is one of
    KL(pi || pi_ref) while the policy is the one that drew them, and drifts with it after that.
    """
    log_probs = batch.log_probs.detach()
    reference, unknown = batch.reference_log_probs, torch.full_like(batch.lengths, torch.nan)
    return {
        "log_prob": batch.mean_tokens(log_probs),
        "reference_log_prob": unknown if reference is None else batch.mean_tokens(reference),
        "kl_reference": unknown if reference is None else batch.mean_tokens(kl_k3(log_probs, reference)),
        "kl_old": batch.mean_tokens(kl_k3(batch.old_log_probs, log_probs)),
        "entropy": unknown if batch.entropy is None else batch.mean_tokens(batch.entropy.detach()),
    }


def effective_sample_size(weights: Tensor) -> Tensor:
    """(sum w)^2 / (count x sum w^2), in (0, 1]: the share of the answers that carry the sum (Kish, 1965)."""
    return weights.sum() ** 2 / (len(weights) * (weights**2).sum())


_Reduction = Callable[[Tensor], Tensor]
_REDUCTIONS: Mapping[str, Mapping[str, _Reduction]] = {
    "residual": {
        "residual_mean": torch.mean,
        "residual_abs": lambda values: values.abs().mean(),
        "residual_abs_max": lambda values: values.abs().max(),
    },
    "weight": {
        "weight_mean": torch.mean,
        "weight_max": torch.max,
        "weight_effective_sample_size": effective_sample_size,
    },
    "weight_clipped": {"weight_clipped_share": torch.mean},
    "log_ratio_clamped": {"log_ratio_clamped": torch.sum},
    "log_z": {"log_z_mean": torch.mean, "log_z_std": lambda values: values.std(correction=0)},
}


def summarize(statistics: Mapping[str, Tensor]) -> dict[str, float]:
    """Numbers of a mini-batch from the values of its sequences, [sequences] each; what is NaN throughout is left out.

    Anything without an entry of its own in the table above is averaged, under its own name.
    """
    found = {}
    for name, values in statistics.items():
        values = values.double()
        if values.numel() and not values.isnan().all():
            for metric, reduce in _REDUCTIONS.get(name, {name: torch.mean}).items():
                found[metric] = reduce(values)
    numbers = torch.stack(list(found.values())).tolist() if found else []
    return dict(zip(found, numbers, strict=True))
