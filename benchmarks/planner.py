"""Published times beside what the planner's model says of them.

    python benchmarks/planner.py > planner.json    the table goes to stderr

Figures, inputs and sources are those of megatron_flowrl/planning/published.py; constants are hardware.yaml's.
"""

import json
import sys
import time

from _report import circumstances

from megatron_flowrl.planning.hardware import as_settings, read_hardware
from megatron_flowrl.planning.published import FIGURES


def main() -> None:
    begin = time.perf_counter()
    rows = [
        {
            "figure": one.name,
            "inputs": one.inputs,
            "source": one.source,
            "unit": one.unit,
            "published": one.published,
            "model": one.predict(),
            "error": one.error,
            "fitted": one.fitted,
        }
        for one in FIGURES
    ]
    head = circumstances(("torch", "transformers"))
    report = {**head, "seconds": time.perf_counter() - begin, "hardware": as_settings(read_hardware()), "figures": rows}
    print(json.dumps(report, indent=1))
    print(
        "| figure | inputs | published | model | error | fitted to it |\n| --- | --- | --- | --- | --- | --- |",
        file=sys.stderr,
    )
    for row in rows:
        print(
            f"| {row['figure']} | {row['inputs']} | {row['published']:,} {row['unit']} | {row['model']:,.1f} "
            f"| {row['error']:+.1%} | {row['fitted'] or 'nothing'} |",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main()
