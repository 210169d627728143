"""Tokenizers: text to ids and back, of Hugging Face folders and of SentencePiece files."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece
from transformers import PreTrainedTokenizerFast

from megatron_flowrl.config import UserError
from megatron_flowrl.data.tokenizer import load_tokenizer
from tests.tiny_tasks import EOS, WORDS, save_tokenizer

TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}{% if add_generation_prompt %}w9{% endif %}"


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model of a few words."""
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "text.txt").write_text("two plus two is four\nfour plus four is eight\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "words"), vocab_size=40, minloglevel=2,
        hard_vocab_limit=False,
    )  # fmt: skip
    return folder / "words.model"


def test_a_hugging_face_folder(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.size == len(WORDS)
    assert tokenizer.encode("w5 w7", True) == [5, 7]
    assert tokenizer.decode([5, 7, EOS]) == "w5 w7"
    with pytest.raises(UserError, match="no chat template; give prompts of text"):
        tokenizer.chat([{"role": "user", "content": "w5"}])


def test_a_chat_template_ends_where_the_answer_begins(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path)
    messages = [{"role": "w2", "content": "w3 w4"}, {"role": "w5", "content": "w6"}]
    assert load_tokenizer(tmp_path).chat(messages) == [2, 3, 4, 5, 6, 9]


def test_a_sentencepiece_file(pieces: Path) -> None:
    tokenizer = load_tokenizer(pieces)
    ids = tokenizer.encode("two plus four", True)
    assert ids[0] == 1 and ids[1:] == tokenizer.encode("two plus four", False)  # 1: <s>
    assert max(ids) < tokenizer.size
    assert tokenizer.decode([*ids, 2]) == "two plus four"  # 2: </s>
    with pytest.raises(UserError, match="has no chat template; give prompts of text"):
        tokenizer.chat([{"role": "user", "content": "two"}])


def test_a_damaged_sentencepiece_file(tmp_path: Path) -> None:
    (tmp_path / "words.model").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match=r"is no SentencePiece model .*set data\.tokenizer"):
        load_tokenizer(tmp_path / "words.model")
