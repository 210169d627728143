"""The errors that are the user's to mend."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Something the user gave cannot be used: a setting, a file, the environment.

    Each problem is one sentence that names the thing, its value and the cure. The command line prints them
    without a traceback and exits with status 2.
    """

    def __init__(self, *problems: str) -> None:
        super().__init__(*problems)
        self.problems = problems

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return self.problems[0]
        return "\n".join([f"{len(self.problems)} problems:", *(f"- {problem}" for problem in self.problems)])


class SharedUserError(UserError):
    """A problem that every rank has met or been told of: one of them says it."""


@contextmanager
def collected(problems: list[str]) -> Iterator[None]:
    """Add what the block finds wrong, so that all problems can be told at once."""
    try:
        yield
    except UserError as error:
        problems.extend(error.problems)
