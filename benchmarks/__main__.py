"""Time and memory of this project against the original's way and other libraries, on a CPU.

    python -m benchmarks                    everything, at Cityscapes' size; some minutes
    python -m benchmarks --quick            tiny sizes: whether it works, not how fast it is
    python -m benchmarks --only colour      one case

Both sides take turns (ours, theirs, ours, …) and their medians are compared; where memory counts,
each side has a process of its own, whose resident memory is watched. The ratios mean something only
on a machine that does nothing else. On a GPU: python -m benchmarks.gpu.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import cli  # isort: skip  # before torch

from rich.console import Console

from benchmarks.cases import CASES, FULL, QUICK
from benchmarks.measure import Row, machine, table
from files import write_json


@dataclass
class Options:
    """Compare this project with the original's way and other libraries."""

    quick: bool = False
    """Tiny sizes."""
    json: Path | None = None
    """Also write every repetition's figure here."""
    only: Literal[tuple(CASES)] | None = None  # type: ignore[valid-type]
    """Run this case alone."""


def main(options: Options) -> None:
    caption = machine()
    rows: list[Row] = []
    for name, case in CASES.items():
        if options.only in (None, name):
            print(f"{name} …", file=sys.stderr)
            rows += case(QUICK if options.quick else FULL)
    if options.quick:
        rows = [replace(row, target=None) for row in rows]  # targets are those of the full size
    Console(width=None if sys.stdout.isatty() else 180).print(table(rows, caption))
    if options.json is not None:
        write_json({"machine": caption, "rows": [row.as_json() for row in rows]}, options.json)


if __name__ == "__main__":
    cli.run(main, Options)
