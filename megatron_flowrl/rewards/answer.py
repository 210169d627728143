"""Where in a response the final answer stands."""

from __future__ import annotations

MARK = "Answer:"
_OPEN, _CLOSE = "<answer>", "</answer>"


def marked_answer(response: str) -> str | None:
    """The text after the last `Answer:`, or None where there is none."""
    _, mark, after = response.rpartition(MARK)
    return after.partition(_CLOSE)[0].strip() if mark else None


def tagged_answer(response: str) -> str | None:
    """What stands in the last `<answer>` that is closed by `</answer>`, or None where none is."""
    before, closed, _ = response.rpartition(_CLOSE)
    _, opened, inside = before.rpartition(_OPEN)
    return inside.strip() if closed and opened else None


def first_line(text: str) -> str:
    """The first line that is not blank."""
    return text.strip().partition("\n")[0].strip()


def last_line(text: str) -> str:
    """The last line that is not blank."""
    return text.strip().rpartition("\n")[2].strip()


def final_answer(response: str) -> str:
    """The line after the last `Answer:`, else what the last <answer> has, else the last line."""
    marked = marked_answer(response)
    if marked is not None:
        return first_line(marked)
    tagged = tagged_answer(response)
    return last_line(response) if tagged is None else tagged


def boxed_answer(response: str) -> str | None:
    """What stands between the braces of the last `\\boxed{..}`; None where there is none that is closed."""
    opening = "\\boxed{"
    start = response.rfind(opening)
    if start < 0:
        return None
    depth = 1
    for place in range(start + len(opening), len(response)):
        depth += (response[place] == "{") - (response[place] == "}")
        if depth == 0:
            return response[start + len(opening) : place]
    return None
