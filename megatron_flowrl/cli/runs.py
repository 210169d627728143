"""`report` and `status`: what there is to know of runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_flowrl.cli.parsers import plain_parser

_REPORT = """One HTML file, with everything in it, about one run or several beside one another.

  megatron-flowrl report runs/flowrl runs/grpo --output report.html
"""
_STATUS = """How far a run is: a line, and exit status 0 where it is finished, 75 where the same command would go on.

  megatron-flowrl status runs/one
"""
_UNFINISHED = 75  # EX_TEMPFAIL of sysexits.h


def report(arguments: Sequence[str]) -> None:
    """Runs as one HTML file."""
    parser = plain_parser("report", _REPORT)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument("--output", metavar="FILE", help="default: report.html in the first run's folder")
    given = parser.parse_args(arguments)
    from megatron_flowrl.observe.report import write_report

    runs = [Path(run) for run in given.runs]
    output = Path(given.output) if given.output else runs[0] / "report.html"
    write_report(runs, output)
    print(output)


def status(arguments: Sequence[str]) -> None:
    """How far a run is; exits with status 75 where it is not finished."""
    parser = plain_parser("status", _STATUS)
    parser.add_argument("run", metavar="RUN", help="folder of a run")
    parser.add_argument("--saved", action="store_true", help="print the newest checkpoint's step alone")
    given = parser.parse_args(arguments)
    from megatron_flowrl.observe.status import status_of

    status = status_of(Path(given.run))
    print(status.saved if given.saved else status.line())
    if not status.finished:
        sys.exit(_UNFINISHED)
