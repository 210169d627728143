"""Where answers come from: vLLM servers of ours, or any server that speaks OpenAI's chat completions."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_flowrl.config import Config, UserError
from megatron_flowrl.data.tokenizer import Tokenizer
from megatron_flowrl.observe.log import logger
from megatron_flowrl.rollout.errors import BadReply, Refused, ReplyError
from megatron_flowrl.rollout.fleet import make_fleet
from megatron_flowrl.rollout.generation import Job, Sampling
from megatron_flowrl.rollout.http import HttpLoop
from megatron_flowrl.rollout.serve import make_servers

_PAUSE_SECONDS = 0.5
_HOPELESS = ("HTTP status 401", "HTTP status 403", "HTTP status 404")  # of all prompts alike
_BUSY = "HTTP status 429"  # of the refusals the one that is worth another attempt


@dataclass(frozen=True)
class Wanted:
    """An answer that is wanted: to which problem (its place), and which of its n."""

    problem: int
    sample: int


@dataclass(frozen=True)
class Written:
    """An answer: its text, its length in tokens, and why it ended (`stop` or `length`).

    `trouble`: why there is none, where a server refused to give one.
    """

    problem: int
    sample: int
    text: str
    tokens: int
    finish_reason: str
    trouble: str | None = None


class Source(Protocol):
    """A context manager; `answers` gives each answer that is wanted, once, as they come. Raises UserError."""

    def answers(self, prompts: Sequence[str], wanted: Sequence[Wanted], sampling: Sampling) -> Iterator[Written]:
        """`sampling` is without stop tokens: those are the source's to know."""
        ...


class OwnServers:
    """vLLM servers for a Hugging Face folder, started here, or running at generation.urls."""

    def __init__(
        self, config: Config, model: Path, logs: Path, tokenizer: Tokenizer, stop_token_ids: tuple[int, ...], chat: bool
    ) -> None:
        self._tokenizer, self._stop, self._chat = tokenizer, stop_token_ids, chat
        targets = config.generation.urls or make_servers(config, model, logs)
        self._http = HttpLoop()
        self._fleet = make_fleet(config, self._http, targets)

    def answers(self, prompts: Sequence[str], wanted: Sequence[Wanted], sampling: Sampling) -> Iterator[Written]:
        """As `Source` says."""
        tokens = [tuple(self._encoded(prompt)) for prompt in prompts]
        drawn = Sampling(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            stop_token_ids=self._stop,
            seed=sampling.seed,
        )
        jobs = [Job(one.problem, one.sample, tokens[one.problem], drawn) for one in wanted]
        with self._fleet.generate(jobs) as generation:
            for answer in generation:
                text = self._tokenizer.decode(answer.token_ids)
                reason = "length" if answer.finish_reason == "length" else "stop"
                yield Written(answer.prompt_index, answer.sample_index, text, len(answer.token_ids), reason)

    def _encoded(self, prompt: str) -> list[int]:
        if self._chat:
            return self._tokenizer.chat([{"role": "user", "content": prompt}])
        return self._tokenizer.encode(prompt, True)

    def __enter__(self) -> OwnServers:
        logger.info("starting %d vLLM server%s", len(self._fleet.replicas), "s" * (len(self._fleet.replicas) > 1))
        try:
            self._fleet.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._fleet.close()
        self._http.close()


class ChatServer:
    """A server with OpenAI's POST /v1/chat/completions, at `url` (with or without the /v1)."""

    def __init__(self, config: Config, url: str, model: str, key: str | None) -> None:
        self._url = url.rstrip("/").removesuffix("/v1") + "/v1/chat/completions"
        self._model, self._settings = model, config.generation
        self._most = config.rollout.max_num_seqs
        self._http = HttpLoop({"Authorization": f"Bearer {key}"} if key else None)

    def answers(self, prompts: Sequence[str], wanted: Sequence[Wanted], sampling: Sampling) -> Iterator[Written]:
        """As `Source` says."""
        come: queue.SimpleQueue[Written | BaseException] = queue.SimpleQueue()
        work = self._http.start(self._all(prompts, wanted, sampling, come.put))
        try:
            for _ in wanted:
                arrived = come.get()
                if isinstance(arrived, BaseException):
                    raise arrived
                yield arrived
        finally:
            work.cancel()

    async def _all(
        self,
        prompts: Sequence[str],
        wanted: Sequence[Wanted],
        sampling: Sampling,
        put: Callable[[Written | BaseException], None],
    ) -> None:
        room = asyncio.Semaphore(self._most)

        async def one(asked: Wanted) -> None:
            async with room:
                try:
                    put(await self._answer(prompts[asked.problem], asked, sampling))
                except Exception as error:
                    put(error)

        await asyncio.gather(*map(one, wanted))

    async def _answer(self, prompt: str, asked: Wanted, sampling: Sampling) -> Written:
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
        }
        for attempt in range(self._settings.max_retries + 1):
            try:
                reply = await self._http.post(self._url, body, timeout=self._settings.request_timeout_seconds)
                return _read_chat(reply, asked, self._url)
            except ReplyError as error:
                if isinstance(error, Refused) and any(status in str(error) for status in _HOPELESS):
                    raise UserError(
                        f"{error}; is --served-model = {self._model!r} its name, and the key right?"
                    ) from error
                if isinstance(error, Refused) and _BUSY not in str(error):
                    return Written(asked.problem, asked.sample, "", 0, "stop", f"refused: {error}")
                if attempt == self._settings.max_retries:
                    raise UserError(
                        f"{error}, in {attempt + 1} attempts (generation.max_retries = {self._settings.max_retries}); "
                        "what was answered is kept: the same command goes on"
                    ) from error
            await asyncio.sleep(_PAUSE_SECONDS * 2**attempt)
        raise AssertionError

    def __enter__(self) -> ChatServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()


def _read_chat(reply: Any, asked: Wanted, url: str) -> Written:
    try:
        choice = reply["choices"][0]
        text, reason = choice["message"]["content"] or "", choice["finish_reason"]
        tokens = (reply.get("usage") or {}).get("completion_tokens")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise BadReply(f"{url} answered no chat completion: {str(reply)[:200]}") from None
    if not isinstance(text, str):
        raise BadReply(f"{url} answered content that is no text: {str(reply)[:200]}")
    length = tokens if isinstance(tokens, int) else 0
    return Written(asked.problem, asked.sample, text, length, "length" if reason == "length" else "stop")


__all__ = ["ChatServer", "OwnServers", "Source", "Wanted", "Written"]
