"""Lines of prompts and responses: what is read, and what is said of lines that will not do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from megatron_flowrl.config import UserError
from megatron_flowrl.data.batch import TokenSequence
from megatron_flowrl.data.jsonl import Encode, read_sequences
from megatron_flowrl.data.tokenizer import load_tokenizer

WORDS = ["<s>", "<unk>", "two", "plus", "is", "four"]
GOOD = '{"prompt": [1, 2], "response": [3]}'


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of six words, which begins a text with <s> where special tokens are asked for."""
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>").save_pretrained(folder)
    return folder


def no_tokenizer() -> Encode:
    raise AssertionError("there is no text, and no tokenizer is needed")


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., list[TokenSequence]]:
    """Reads content as a file of a model with ids below 50 and sequences of up to 10 tokens."""

    def reading(content: str | bytes, encode: Callable[[], Encode] = no_tokenizer) -> list[TokenSequence]:
        path = tmp_path / "in.jsonl"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_sequences(path, vocab_size=50, max_length=10, encode=encode)

    return reading


@pytest.fixture
def refusal(read: Callable[..., Any], tmp_path: Path) -> Callable[..., tuple[str, ...]]:
    """The problems of a file, told after its name: ':LINE: what' of a line, ' what' of the file."""

    def problems(content: str | bytes, encode: Callable[[], Encode] = no_tokenizer) -> tuple[str, ...]:
        with pytest.raises(UserError) as caught:
            read(content, encode)
        name = str(tmp_path / "in.jsonl")
        assert all(name in problem for problem in caught.value.problems[:10])
        return tuple(problem.removeprefix("input file").replace(name, "", 1) for problem in caught.value.problems)

    return problems


def test_token_ids(read: Callable[..., list[TokenSequence]]) -> None:
    lines = [
        GOOD,
        '{"response": [], "prompt": [0]}',
        '{"prompt": [49], "response": [0, 49], "id": "what else there is", "score": null}',
        '{"prompt": [1, 2, 3, 4, 5, 6, 7, 8, 9], "response": [10]}',
    ]
    assert read("\n".join(lines)) == [
        TokenSequence((1, 2), (3,)),
        TokenSequence((0,), ()),
        TokenSequence((49,), (0, 49)),
        TokenSequence((1, 2, 3, 4, 5, 6, 7, 8, 9), (10,)),
    ]


@pytest.mark.parametrize("content", [f"{GOOD}\n{GOOD}\n\n \n", f"\ufeff{GOOD}\r\n{GOOD}\r\n", f"{GOOD}\n {GOOD} "])
def test_line_ends_and_blank_lines_at_the_end_do_not_matter(
    content: str, read: Callable[..., list[TokenSequence]]
) -> None:
    assert read(content) == [TokenSequence((1, 2), (3,))] * 2


@pytest.mark.parametrize(
    ("line", "thing"),
    [
        ('{"prompt": [1]', "not JSON (Expecting ',' delimiter"),
        ("prompt", "not JSON"),
        ("[1, 2]", "a JSON list, not an object with a key for each column"),
        ("3", "a JSON int, not an object"),
        ("null", "not an object with a key for each column"),
        ('{"prompt": [1]}', "the key response is missing; there are prompt"),
        ('{"question": [1], "response": [2]}', "the key prompt is missing; there are question, response"),
        ("{}", "the key prompt and response is missing; there are none"),
        ('{"prompt": [], "response": [1]}', "prompt is empty"),
        ('{"prompt": {"a": 1}, "response": [1]}', "prompt is a dict; give a list of token ids, or text"),
        ('{"prompt": [1], "response": 2}', "response is a int; give a list of token ids, or text"),
        ('{"prompt": null, "response": [1]}', "prompt is a NoneType; give a list"),
        ('{"prompt": [1, -1], "response": [1]}', "prompt[1] = -1 is outside the vocabulary of 50 tokens"),
        ('{"prompt": [1], "response": [3, 50]}', "response[1] = 50 is outside the vocabulary of 50 tokens"),
        ('{"prompt": [1.0], "response": [1]}', "prompt[0] = 1.0 is not a token id"),
        ('{"prompt": [true], "response": [1]}', "prompt[0] = True is not a token id"),
        ('{"prompt": [[1]], "response": [1]}', "prompt[0] = [1] is not a token id"),
        ('{"prompt": ["two"], "response": [1]}', "prompt[0] = 'two' is not a token id"),
        ('{"prompt": [NaN], "response": [1]}', "prompt[0] = nan is not a token id"),
        (
            '{"prompt": [1, 2, 3, 4, 5, 6], "response": [1, 2, 3, 4, 5]}',
            "prompt + response has 11 tokens; the model takes 10",
        ),
    ],
)
def test_a_bad_line_is_told_by_file_line_and_thing(line: str, thing: str, refusal: Callable[..., Any]) -> None:
    (problem,) = refusal(f"{GOOD}\n{line}\n{GOOD}\n")
    assert problem.startswith(":2: ")
    assert thing in problem


def test_a_blank_line_inside_would_shift_the_lines_of_the_output(refusal: Callable[..., Any]) -> None:
    (problem,) = refusal(f"{GOOD}\n\n{GOOD}\n")
    assert problem.startswith(":2: an empty line")


def test_every_bad_line_is_told(refusal: Callable[..., Any]) -> None:
    problems = refusal(f'x\n{GOOD}\n{{"prompt": [], "response": []}}\n{GOOD}\ny\n')
    assert [problem[:3] for problem in problems] == [":1:", ":3:", ":5:"]


def test_of_many_bad_lines_the_first_ten_are_told(refusal: Callable[..., Any]) -> None:
    problems = refusal("x\n" * 14)
    assert [problem.split(":")[1] for problem in problems[:10]] == [str(line) for line in range(1, 11)]
    assert problems[10:] == ("and 4 more bad rows",)
    assert len(refusal("x\n" * 10)) == 10


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_a_file_without_lines(content: str, refusal: Callable[..., Any]) -> None:
    assert "has no lines" in refusal(content)[0]


def test_a_missing_file_a_folder_and_a_file_that_is_no_text(tmp_path: Path, refusal: Callable[..., Any]) -> None:
    for path, thing in ((tmp_path / "nowhere", "does not exist"), (tmp_path, "cannot be read: Is a directory")):
        with pytest.raises(UserError) as caught:
            read_sequences(path, vocab_size=50, max_length=10, encode=no_tokenizer)
        assert str(path) in str(caught.value) and thing in str(caught.value)
    assert "is not UTF-8 text" in refusal(b"\xff\xfe{}")[0]


def test_a_line_that_is_no_text_is_told_by_its_number(refusal: Callable[..., Any]) -> None:
    (problem,) = refusal(GOOD.encode() + b'\n{"prompt": "\xe9", "response": ""}\n')
    assert problem.startswith(":2: ")


def test_lists_in_lists_without_end(refusal: Callable[..., Any]) -> None:
    (problem,) = refusal(GOOD + "\n" + "[" * 100_000)
    assert problem.startswith(":2: ")


def test_a_message_stays_readable(refusal: Callable[..., Any]) -> None:
    (problem,) = refusal(json.dumps({"prompt": ["long" * 5000], "response": [1]}))
    assert len(problem) < 1000


def test_text(tokenizer_folder: Path, read: Callable[..., list[TokenSequence]]) -> None:
    """A prompt gets the special tokens, a response none; either may be ids while the other is text."""
    lines = [
        '{"prompt": "two plus two", "response": "is four"}',
        '{"prompt": "", "response": "five"}',
        '{"prompt": [2, 3, 2], "response": "is four"}',
        '{"prompt": "two", "response": [4]}',
        '{"prompt": "two", "response": ""}',
    ]
    assert read("\n".join(lines), lambda: load_tokenizer(tokenizer_folder).encode) == [
        TokenSequence((0, 2, 3, 2), (4, 5)),
        TokenSequence((0,), (1,)),
        TokenSequence((2, 3, 2), (4, 5)),
        TokenSequence((0, 2), (4,)),
        TokenSequence((0, 2), ()),
    ]


def test_the_tokenizer_is_loaded_once_and_only_for_text(
    tokenizer_folder: Path, read: Callable[..., list[TokenSequence]]
) -> None:
    loads = []

    def encode() -> Encode:
        loads.append(1)
        return load_tokenizer(tokenizer_folder).encode

    read(f"{GOOD}\n{GOOD}", encode)
    assert not loads
    read('{"prompt": "two", "response": "four"}\n{"prompt": "two", "response": "is"}\n', encode)
    assert loads == [1]


def test_text_is_checked_as_ids_are(tokenizer_folder: Path, refusal: Callable[..., Any]) -> None:
    line = json.dumps({"prompt": " ".join(["two"] * 9), "response": "four"})
    (problem,) = refusal(f"{GOOD}\n{line}", lambda: load_tokenizer(tokenizer_folder).encode)
    assert problem.startswith(":2: prompt + response has 11 tokens")
    # A tokenizer that knows more words than the model has embeddings.
    (problem,) = refusal('{"prompt": "two", "response": "x"}', lambda: lambda text, special: [70])
    assert problem.startswith(":1: prompt[0] = 70 is outside the vocabulary of 50 tokens")


def test_an_empty_prompt_of_text_without_special_tokens(refusal: Callable[..., Any]) -> None:
    (problem,) = refusal('{"prompt": "", "response": "x"}', lambda: lambda text, special: [1] * len(text))
    assert problem.startswith(":1: prompt is empty")


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_without_a_tokenizer(there: bool, tmp_path: Path) -> None:
    folder = tmp_path if there else tmp_path / "nowhere"
    with pytest.raises(UserError) as caught:
        load_tokenizer(folder)
    message = str(caught.value)
    assert str(folder) in message and "no tokenizer" in message and "data.tokenizer" in message


def test_text_without_a_tokenizer_is_refused(tmp_path: Path, read: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match="no tokenizer that can be loaded"):
        read('{"prompt": "two", "response": "four"}', lambda: load_tokenizer(tmp_path).encode)


def test_a_text_that_is_no_unicode(tokenizer_folder: Path, refusal: Callable[..., Any]) -> None:
    (problem,) = refusal('{"prompt": "\\ud800", "response": ""}', lambda: load_tokenizer(tokenizer_folder).encode)
    assert problem.startswith(":1: ")
