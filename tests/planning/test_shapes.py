"""The table of published shapes, and parameters counted from an architecture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_flowrl.config import UserError
from megatron_flowrl.planning.parameters import total_elements
from megatron_flowrl.planning.shapes import find_shapes, hugging_face_config, published_models
from tests.tiny_models import MODELS, save_model

# As the models' own pages and index files have them.
PUBLISHED = {
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-3B": 3_085_938_688,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-14B": 14_770_033_664,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen2.5-72B": 72_706_203_648,
    "DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
    "DeepSeek-R1-Distill-Qwen-7B": 7_615_616_512,
    "DeepSeek-R1-Distill-Qwen-32B": 32_763_876_352,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-32B": 32_762_123_264,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
    "Mistral-7B-v0.1": 7_241_732_096,
}


@pytest.mark.parametrize("name", published_models())
def test_counts_are_those_of_transformers(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hugging_face_config(name))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert total_elements(find_shapes(f"somebody/{name}").architecture) == count == PUBLISHED.get(name, count)


def test_a_folder_comes_before_the_table(tmp_path: Path) -> None:
    folder = save_model("qwen3", tmp_path / "Qwen2.5-7B")
    found = find_shapes(str(folder))
    assert found.note is None and found.architecture.hidden_size == MODELS["qwen3"].hidden_size


def test_a_model_of_the_table_is_said_to_be_one() -> None:
    note = find_shapes("Qwen/Qwen2.5-7B").note
    assert note is not None and "published shape of Qwen2.5-7B" in note


def test_an_unknown_model_is_refused_with_the_known() -> None:
    with pytest.raises(UserError, match=r"model.path = 'nobody/Nothing-1B'.*Qwen2.5-7B.*Llama-3.1-70B"):
        find_shapes("nobody/Nothing-1B")
