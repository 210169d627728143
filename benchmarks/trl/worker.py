"""TRL's side of step.py, run by the python that has TRL: seconds and mean length of each step."""

import json
import sys
import time
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class Times(TrainerCallback):
    """When each update ended; those of a step come after its generation."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_begin(self, *_: object, **__: object) -> None:
        self.ends.append(time.perf_counter())

    def on_step_end(self, *_: object, **__: object) -> None:
        self.ends.append(time.perf_counter())


def main() -> None:
    data, result = Path(sys.argv[1]), Path(sys.argv[2])
    prompts, answers, updates, limit, steps, processes = map(int, sys.argv[3:])
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    lengths: list[float] = []

    def reward(completion_ids: list[list[int]], **_: object) -> list[float]:
        lengths.append(sum(map(len, completion_ids)) / len(completion_ids))  # this rank's, once a step
        return [float(len(set(ids)) % 2) for ids in completion_ids]

    times = Times()
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(data / "model", dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(data / "model", padding_side="left"),
        reward_funcs=reward,
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in rows]),
        callbacks=[times],
        args=GRPOConfig(
            output_dir=str(data / "trl"),
            use_cpu=True,
            bf16=False,
            beta=0.0,
            temperature=1.0,
            learning_rate=1e-9,
            lr_scheduler_type="constant",
            num_generations=answers,
            max_completion_length=limit,
            per_device_train_batch_size=prompts * answers // updates // processes,
            gradient_accumulation_steps=1,
            steps_per_generation=updates,
            max_steps=steps * updates,
            gradient_checkpointing=False,
            ddp_find_unused_parameters=False,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            seed=0,
        ),
    )
    trainer.train()
    ends = times.ends[::updates]
    if trainer.accelerator.is_main_process:
        measured = {
            "seconds": [after - before for before, after in pairwise(ends)],
            "lengths": lengths,
            "versions": {name: version(name) for name in ("trl", "transformers", "torch")},
        }
        result.write_text(json.dumps(measured))


if __name__ == "__main__":
    main()
