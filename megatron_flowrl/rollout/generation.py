"""What is asked of a sampler and what it answers, in token ids; vLLM's form of both, checked as it comes in."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any, Literal

from megatron_flowrl.rollout.errors import BadReply

FinishReason = Literal["stop", "length", "abort"]
ROUTE = "/inference/v1/generate"
_LARGE = 1e300  # JSON knows integers that no float can hold


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How answers are drawn. The log-probs are those of the distribution that is drawn from.

    With `top_p` below 1 or a `top_k`, a trainer that knows the whole distribution does not give the same log-probs.
    An answer ends with one of `stop_token_ids`, which EOS has to be among: servers know of none.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        wrong = {
            "max_tokens": self.max_tokens < 1,
            "temperature": not (math.isfinite(self.temperature) and self.temperature >= 0),
            "top_p": not 0 < self.top_p <= 1,
            "top_k": self.top_k is not None and self.top_k < 1,
            "min_tokens": not 0 <= self.min_tokens <= self.max_tokens,
        }
        for name, is_wrong in wrong.items():
            if is_wrong:
                raise ValueError(f"Sampling.{name} = {getattr(self, name)!r} cannot be")


@dataclass(frozen=True)
class VersionSpan:
    """Tokens `start` to `stop` of an answer were made by the weights `version`."""

    version: str
    start: int
    stop: int


@dataclass(frozen=True)
class Answer:
    """One sampled answer: token ids, the log-prob of each, why it ended, and which weights made which tokens.

    A stop token is the answer's last. `finish_reason` is "length" where a limit cut it off, and
    "abort" only where it was told to stop and not continued.
    """

    prompt_index: int
    sample_index: int
    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    finish_reason: FinishReason
    weight_versions: tuple[VersionSpan, ...]
    url: str


@dataclass(frozen=True)
class Job:
    """One answer in the making: what is to be sampled, and what an aborted request has already brought."""

    prompt_index: int
    sample_index: int
    prompt: tuple[int, ...]
    sampling: Sampling
    so_far: Answer | None = None
    continuations: int = 0

    def body(self) -> dict[str, Any]:
        """The request in vLLM's form."""
        sampling, had = self.sampling, self.so_far.token_ids if self.so_far else ()
        params: dict[str, Any] = {
            "max_tokens": sampling.max_tokens - len(had),
            "min_tokens": max(0, sampling.min_tokens - len(had)),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or 0,
            "stop_token_ids": list(sampling.stop_token_ids),
            "ignore_eos": True,  # the server has no tokenizer: what ends an answer is in stop_token_ids
            "logprobs": 0,  # of the token that was drawn, and of no others
            "detokenize": False,
        }
        if sampling.seed is not None:
            params["seed"] = _seed(sampling.seed, self.prompt_index, self.sample_index, self.continuations)
        return {"token_ids": [*self.prompt, *had], "sampling_params": params}

    def read(self, reply: Any, url: str) -> Answer:
        """The answer in a reply, what an earlier request had brought in front. Raises BadReply where it is none."""
        where = f"{url}{ROUTE}"
        choice = _field(reply, "choices", list, where)
        if len(choice) != 1:
            raise BadReply(f"{where} answered {len(choice)} choices where 1 was asked for")
        tokens = _field(choice[0], "token_ids", list, where)
        reason = _field(choice[0], "finish_reason", str, where)
        if reason not in ("stop", "length", "abort"):
            raise BadReply(f"{where} answered finish_reason = {reason!r}; stop, length and abort are known")
        if not all(type(token) is int and token >= 0 for token in tokens):
            raise BadReply(f"{where} answered token_ids that are not token ids: {str(tokens)[:200]}")
        log_probs = _log_probs(choice[0], tokens, where)
        versions = _versions(choice[0], len(tokens), where)
        answer = Answer(
            self.prompt_index, self.sample_index, tuple(tokens), log_probs, reason, versions, url
        )  # fmt: skip
        return answer if self.so_far is None else _joined(self.so_far, answer)


def _joined(first: Answer, rest: Answer) -> Answer:
    offset = len(first.token_ids)
    later = tuple(VersionSpan(s.version, s.start + offset, s.stop + offset) for s in rest.weight_versions)
    spans = list(first.weight_versions)
    for span in later:
        if spans and spans[-1].version == span.version and spans[-1].stop == span.start:
            span = VersionSpan(span.version, spans.pop().start, span.stop)
        spans.append(span)
    return Answer(
        rest.prompt_index,
        rest.sample_index,
        first.token_ids + rest.token_ids,
        first.log_probs + rest.log_probs,
        rest.finish_reason,
        tuple(spans),
        rest.url,
    )


def _seed(seed: int, *place: int) -> int:
    """A seed of its own for each place: equal ones would draw equal answers. 63 bits, as vLLM takes them."""
    digest = hashlib.sha256(repr((seed, *place)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _field(record: Any, name: str, kind: type, where: str) -> Any:
    value = record.get(name) if isinstance(record, dict) else None
    if not isinstance(value, kind):
        raise BadReply(f"{where} answered without a {kind.__name__} {name!r}: {str(record)[:200]}")
    return value


def _log_probs(choice: Any, tokens: list[int], where: str) -> tuple[float, ...]:
    if not tokens:
        return ()
    entries = _field(_field(choice, "logprobs", dict, where), "content", list, where)
    if [entry.get("token_id") if isinstance(entry, dict) else None for entry in entries] != tokens:
        raise BadReply(f"{where} answered log-probs of other tokens than its answer: {str(entries)[:200]}")
    values = [entry.get("logprob") for entry in entries]
    if not all(type(value) in (int, float) and -_LARGE < value < _LARGE for value in values):
        raise BadReply(f"{where} answered log-probs that are not finite numbers: {str(values)[:200]}")
    return tuple(map(float, values))


def _versions(choice: Any, length: int, where: str) -> tuple[VersionSpan, ...]:
    if length == 0:
        return ()
    try:
        rows = [(str(span["version"]), int(span["start"]), int(span["end"])) for span in choice["weight_versions"]]
    except (KeyError, TypeError, ValueError, OverflowError):
        raise BadReply(f"{where} did not say which weights made the answer (weight_versions); vLLM 0.32 does") from None
    spans = tuple(VersionSpan(*row) for row in rows)
    if (
        not spans
        or [span.start for span in spans] != [0, *(span.stop for span in spans[:-1])]
        or any(span.stop < span.start for span in spans)
        or spans[-1].stop != length
    ):
        raise BadReply(f"{where} answered weight_versions that do not cover its {length} tokens: {spans}")
    return spans
