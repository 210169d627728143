"""Prompts and responses of rows: in every form, too long, and wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from transformers import PreTrainedTokenizerFast

from megatron_flowrl.config import PromptsConfig, UserError
from megatron_flowrl.data.batch import TokenSequence
from megatron_flowrl.data.prompts import Limits, PromptSet, ResponseSet, load_prompts, load_responses
from megatron_flowrl.data.tokenizer import load_tokenizer
from tests.data.test_tokenizer import TEMPLATE
from tests.tiny_tasks import EOS, WORDS, save_tokenizer, write_rows


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of words, with a chat template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(tokenizer: Path, tmp_path: Path) -> Any:
    """Reads rows as a model of `vocab_size` ids and sequences of 20 tokens does."""

    def reading(
        rows: Any, check: Any = None, vocab_size: int = len(WORDS), room: int = 8, **settings: Any
    ) -> PromptSet:
        path = rows if isinstance(rows, Path) else write_rows(tmp_path / "rows.jsonl", rows)
        return load_prompts(
            PromptsConfig(**{"max_tokens": 10, **settings}),
            setting="prompts.path",
            path=str(path),
            split="train",
            limit=None,
            tokenizer=lambda: load_tokenizer(tokenizer),
            limits=Limits(vocab_size, 20),
            max_answer_tokens=room,
            answer_setting="generation.max_tokens",
            check=check or (lambda truth, row: None),
        )

    return reading


@pytest.fixture
def responses(tokenizer: Path, tmp_path: Path) -> Any:
    def reading(rows: Any, stop: tuple[int, ...] = (EOS,), **settings: Any) -> ResponseSet:
        return load_responses(
            PromptsConfig(**{"max_tokens": 10, **settings}),
            setting="sft.path",
            path=str(write_rows(tmp_path / "rows.jsonl", rows)),
            split="train",
            response_column="response",
            tokenizer=lambda: load_tokenizer(tokenizer),
            limits=Limits(len(WORDS), 12),
            stop_token_ids=stop,
        )

    return reading


def refusal(reading: Any, rows: Any, **given: Any) -> str:
    with pytest.raises(UserError) as caught:
        reading(rows, **given)
    return caught.value.problems[0]


@pytest.mark.parametrize(
    ("prompt", "settings", "tokens", "text"),
    [
        ("w2 w3", {}, (2, 3), "w2 w3"),
        ([2, 3], {}, (2, 3), "w2 w3"),
        ("w2 w3", {"template": "w4 {prompt} w5"}, (4, 2, 3, 5), "w4 w2 w3 w5"),
        ("w2", {"chat": True, "template": "w4 {prompt}"}, (0, 4, 2, 9), "w4 w2"),
        ([{"role": "w6", "content": "w2"}], {}, (6, 2, 9), "w2"),
        ([{"role": "w6", "content": "w2"}], {"template": "w4 {prompt}"}, (6, 2, 9), "w2"),
    ],
)
def test_a_prompt_in_every_form(prompt: Any, settings: dict[str, Any], tokens: Any, text: str, prompts: Any) -> None:
    (found,) = prompts([{"prompt": prompt, "answer": 4, "other": 1}], **settings).prompts
    assert (found.tokens, found.text, found.ground_truth) == (tokens, text, 4) and found.row["other"] == 1


def test_the_published_columns(prompts: Any, tmp_path: Path) -> None:
    row = {
        "data_source": "math",
        "prompt": [{"content": "w2 w3", "role": "w6"}],
        "ability": "math",
        "reward_model": {"ground_truth": "34", "style": "rule"},
        "extra_info": {"index": 0, "split": "train"},
    }
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "rows.parquet")
    (found,) = prompts(tmp_path / "rows.parquet").prompts
    assert found.tokens == (6, 2, 3, 9) and found.ground_truth == "34" and found.row == row


def test_other_columns(prompts: Any) -> None:
    row = {"question": {"text": "w2"}, "solution": "3"}
    (found,) = prompts([row], prompt_column="question.text", ground_truth_column="solution").prompts
    assert found.tokens == (2,) and found.ground_truth == "3"
    assert "the key solution is missing; there are prompt" in refusal(
        prompts, [{"prompt": "w2"}], ground_truth_column="solution"
    )
    assert ":1: the key prompt is missing; there are question" in refusal(prompts, [{"question": "w2"}])


def test_long_prompts_are_left_out_and_counted(prompts: Any) -> None:
    found = prompts([{"prompt": [2] * length} for length in (10, 11, 3, 12)])
    assert [len(prompt.tokens) for prompt in found.prompts] == [10, 3] and found.dropped == 2
    assert "all rows are longer than prompts.max_tokens = 10" in refusal(prompts, [{"prompt": [2] * 11}])


def test_an_answer_has_to_fit(prompts: Any) -> None:
    problem = refusal(prompts, [{"prompt": [2] * 9}], room=12)
    assert ":1: a prompt of 9 tokens and an answer of 12 are more than the model takes, 20; lower gener" in problem


def test_ground_truths_are_checked(prompts: Any) -> None:
    def check(truth: Any, row: Mapping[str, Any]) -> str | None:
        return None if truth == 1 else f"{truth} is not 1, of {sorted(row)}"

    assert ":2: None is not 1, of ['prompt']" in refusal(
        prompts, [{"prompt": "w2", "answer": 1}, {"prompt": "w2"}], check=check
    )


@pytest.mark.parametrize(
    ("prompt", "what"),
    [
        ("", "prompt is empty"),
        (5, "prompt is a int"),
        ([2, 999], "prompt[1] = 999 is outside the vocabulary"),
        ([{"role": "user"}], "prompt[0] = {'role': 'user'} is no message"),
    ],
)
def test_what_is_no_prompt(prompt: Any, what: str, prompts: Any) -> None:
    assert what in refusal(prompts, [{"prompt": prompt}])


def test_a_tokenizer_of_another_model_is_told_once(prompts: Any) -> None:
    with pytest.raises(UserError) as caught:
        prompts([{"prompt": "w2"}] * 5, vocab_size=100)
    (problem,) = caught.value.problems
    assert "gives token ids up to 298, and the model's vocabulary has 100" in problem and "data.tokenizer" in problem


def test_messages_without_a_template_are_told_once(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": [{"role": "w6", "content": "w2"}]}] * 5)
    with pytest.raises(UserError) as caught:
        load_prompts(
            PromptsConfig(),
            setting="prompts.path",
            path=str(rows),
            split="train",
            limit=None,
            tokenizer=lambda: load_tokenizer(tmp_path),
            limits=Limits(len(WORDS), 20),
            max_answer_tokens=8,
            answer_setting="generation.max_tokens",
            check=lambda truth, row: None,
        )
    (problem,) = caught.value.problems
    assert "has no chat template; give prompts of text" in problem


def test_the_fingerprint_is_of_all_that_a_grader_is_given(prompts: Any) -> None:
    def of(**row: Any) -> str:
        return str(prompts([{"prompt": "w2", "answer": 1} | row]).fingerprint)

    assert of() == of() and len({of(), of(other=3), of(answer=2), of(prompt="w3")}) == 4


def test_responses_end_with_eos_once(responses: Any) -> None:
    rows = [{"prompt": "w2", "response": some} for some in ("w3", [3, EOS], "")]
    assert responses(rows).sequences == (
        TokenSequence((2,), (3, EOS)), TokenSequence((2,), (3, EOS)), TokenSequence((2,), (EOS,)),
    )  # fmt: skip
    assert "has no EOS" in refusal(responses, rows, stop=())


def test_long_responses_are_left_out(responses: Any) -> None:
    found = responses([{"prompt": "w2", "response": [3] * length} for length in (10, 11)])
    assert found.dropped == 1 and len(found.sequences[0]) == 12
    assert json.loads(json.dumps(found.source)).endswith("rows.jsonl")
