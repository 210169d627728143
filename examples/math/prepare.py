"""Training data of the paper's runs in mathematics: DAPO's problems, once each, and held-out ones in the same words.

  python -m examples.math.prepare data/math --train dapo-math-17k.parquet --held-out aime24.jsonl aime25.jsonl
  python -m examples.math.prepare data/math --train BytedTsinghua-SIA/DAPO-Math-17k     # from the Hugging Face hub

Rows of --train are {"prompt": text or messages, "reward_model": {"ground_truth": ...}} (or "answer", "ground_truth").
DAPO-Math-17k has each of its problems about a hundred times; a problem that comes with two answers is left out. Rows of
--held-out are {"problem" or "question": text, "answer": ...}, and are put between the words that all prompts of --train
begin and end with, which are printed; where there are none, nothing is written. --bare says that there are to be none.
A problem that is held out is not trained on.

FOLDER/train.jsonl and FOLDER/held_out.jsonl have {"prompt": messages, "ground_truth": text}.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.public_rows import formed, run, told, write_jsonl
from megatron_flowrl.config import UserError
from megatron_flowrl.data.rows import BadRow, Row, short
from megatron_flowrl.evaluation.published import mathematics

REPEATED, TWO_ANSWERS, HELD_OUT = "it was there before", "it comes with two answers", "it is held out"
_PROBLEM_COLUMNS = ("problem", "question")


def prepare(
    folder: Path,
    train: Sequence[str],
    held_out: Sequence[str],
    split: str,
    *,
    leave_out_bad_rows: bool = False,
    bare: bool = False,
) -> None:
    """Write both files. Raises UserError."""
    left_out: Counter[str] = Counter()
    rows = formed(train, split, training_row, left_out, leave_out_bad_rows=leave_out_bad_rows)
    answers = once_each(rows, left_out)
    before, after = ("", "") if bare else common_words([*answers])
    if held_out and not bare:
        if not before and not after:
            raise UserError(_no_common_words([*answers]))
        print(f"held-out problems are put between {before!r} and {after!r}")
    kept_back = {}
    for source in held_out:
        for row in formed([source], "test", held_out_row, Counter()):
            kept_back[before + str(row["problem"]) + after] = str(row["answer"])
    for prompt in kept_back:
        if answers.pop(prompt, None) is not None:
            left_out[HELD_OUT] += 1
    if not answers:
        raise UserError(f"{', '.join(train)}: no problem is left to train on ({told(left_out)})")
    write_jsonl(folder / "train.jsonl", map(_row, answers.items()))
    print(f"{folder / 'train.jsonl'}: {len(answers)} problems; {told(left_out)}")
    if held_out:
        write_jsonl(folder / "held_out.jsonl", map(_row, kept_back.items()))
        print(f"{folder / 'held_out.jsonl'}: {len(kept_back)} problems")


def training_row(row: Row) -> dict[str, str]:
    """{"prompt", "answer"}. Raises BadRow."""
    prompt = row.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], Mapping):
        prompt = prompt[0].get("content")
    if not isinstance(prompt, str) or not prompt.strip():
        raise BadRow(f"prompt = {short(row.get('prompt'))} is neither text nor one message of a user")
    return {"prompt": prompt, "answer": _answer(row)}


def held_out_row(row: Row) -> dict[str, str]:
    """{"problem", "answer"}. Raises BadRow."""
    for column in _PROBLEM_COLUMNS:
        problem = row.get(column)
        if isinstance(problem, str) and problem.strip():
            return {"problem": problem.strip(), "answer": _answer(row)}
    raise BadRow(f"there is no problem: {' or '.join(_PROBLEM_COLUMNS)} has to be text")


def once_each(rows: Sequence[Mapping[str, Any]], left_out: Counter[str]) -> dict[str, str]:
    """Prompt -> answer, in the order in which they came first."""
    answers: dict[str, str] = {}
    doubtful: set[str] = set()
    for row in rows:
        prompt, answer = row["prompt"], row["answer"]
        if answers.setdefault(prompt, answer) != answer:
            doubtful.add(prompt)
        left_out[REPEATED] += 1
    left_out[REPEATED] -= len(answers)
    for prompt in doubtful:
        del answers[prompt]
        left_out[TWO_ANSWERS] += 1
    return answers


def common_words(prompts: Sequence[str]) -> tuple[str, str]:
    """What all prompts begin and end with, to whole lines: a set's instructions."""
    before = _common_start(prompts)
    after = _common_start([prompt[len(before) :][::-1] for prompt in prompts])[::-1]
    return before[: before.rfind("\n") + 1], after[after.find("\n") :] if "\n" in after else ""


def _no_common_words(prompts: Sequence[str]) -> str:
    """Why, and the cure: names the first prompt that does not begin, or end, with the line that most of them have."""
    beginnings, ends = ([prompt.split("\n")[place] for prompt in prompts] for place in (0, -1))
    others = []
    for lines in (beginnings, ends):
        line, count = Counter(lines).most_common(1)[0]
        if 2 * count > len(prompts):
            others += [prompt for prompt, own in zip(prompts, lines, strict=True) if own != line]
    unlike = f" such as {short(others[0])}" if others else ""
    return (
        "--held-out: the prompts of --train have no common first or last lines, between which held-out problems could "
        f"be put; take out the rows that are unlike the others{unlike}, or say --bare where prompts are problems alone"
    )


def _common_start(texts: Sequence[str]) -> str:
    first, last = min(texts), max(texts)  # in this order, what these two share all share
    pairs = enumerate(zip(first, last, strict=False))
    return first[: next((place for place, (one, other) in pairs if one != other), min(len(first), len(last)))]


def _answer(row: Row) -> str:
    answer = mathematics(row)["answer"]
    if isinstance(answer, bool) or not isinstance(answer, str | int | float) or not str(answer).strip():
        raise BadRow(f"the answer {short(answer)} is neither text nor a number")
    return str(answer).strip()


def _row(pair: tuple[str, str]) -> dict[str, Any]:
    prompt, answer = pair
    return {"prompt": [{"role": "user", "content": prompt}], "ground_truth": answer}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", nargs="+", required=True, metavar="FILE|NAME")
    parser.add_argument("--held-out", nargs="+", default=[], action="extend", metavar="FILE|NAME")
    parser.add_argument("--split", default="train", help="of a data set of the hub (default: train; held out: test)")
    parser.add_argument("--bare", action="store_true", help="prompts have no instructions around the problem")
    parser.add_argument("--leave-out-bad-rows", action="store_true", help="count them, and go on")
    given = parser.parse_args(arguments)
    run(
        lambda: prepare(
            given.folder,
            given.train,
            given.held_out,
            given.split,
            leave_out_bad_rows=given.leave_out_bad_rows,
            bare=given.bare,
        )
    )


if __name__ == "__main__":
    main()
