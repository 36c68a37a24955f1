"""Time and memory of this project against the published way and other libraries, on this machine.

    python -m benchmarks                    everything, at Cityscapes' size; some minutes
    python -m benchmarks --quick            tiny sizes: whether it works, not how fast it is
    python -m benchmarks --only colour      one case

Both sides take turns (ours, theirs, ours, …) and their medians are compared; where memory counts, each side has a
process of its own, whose resident memory is watched. The ratios mean something only on a machine that does nothing
else.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

import cli
from benchmarks.cases import CASES
from benchmarks.gpu import gpu
from benchmarks.measure import FULL, QUICK, Row, Sizes, machine
from eval.options import claim_file
from files import atomic_write

ALL = CASES | {"gpu": gpu}


@dataclass
class Options:
    """Compare this project with the published way and other libraries."""

    quick: bool = False
    """Tiny sizes."""
    json: Path | None = None
    """Also write every repetition's figure here."""
    only: Literal["training", "evaluation", "sample", "confusion", "colour", "gpu"] | None = None
    """Run this case alone."""


def amount(value: float | None, what: str) -> str:
    """Seconds or bytes for people."""
    if value is None:
        return "–"
    if what == "memory":
        return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.3g} ms"


def cells(row: Row) -> tuple[str, ...]:
    """The table's line: ratio and target first, then what was measured."""
    ratio, target = "–", ""
    if row.ratio is not None:
        ratio = f"{row.ratio:.3g}× faster" if row.what == "time" else f"{row.ratio:.2g}× the memory"
    if row.target is not None:
        mark = {True: " ✓", False: " ✗", None: ""}[row.reached]
        target = f"{'≥' if row.what == 'time' else '≤'} {row.target:g}×{mark}"
    ours, theirs = (median(values) if values else None for values in (row.ours, row.theirs))
    note = row.note
    if row.what == "time" and ours and row.items > 1:
        ours, theirs = ours / row.items, theirs and theirs / row.items
        note = "; ".join(filter(None, (f"{1 / ours:.3g} images/s", note)))
    return (
        row.name,
        ratio,
        target,
        amount(ours, row.what),
        amount(theirs, row.what),
        row.other,
        note,
    )


def table(rows: Sequence[Row], facts: dict[str, Any]) -> Table:
    """All rows, and the machine beneath."""
    result = Table(caption=described(facts), caption_justify="left")
    for column in ("", "ratio", "target", "ours", "other", "the other", ""):
        result.add_column(
            column, justify="right" if column in ("ratio", "ours", "other") else "left"
        )
    for row in rows:
        result.add_row(*cells(row))
    return result


def described(facts: dict[str, Any]) -> str:
    """The machine in a line."""
    return (
        f"{facts['cpu']}, {facts['threads']} of {facts['cores']} cores (load {facts['load']} before), "
        f"{facts['gemm_gflops']} GFLOP/s in fp32 matrix products, {facts['copy_gb_per_second']} GB/s copying; "
        f"torch {facts['torch']}; {facts['gpu'] or 'no GPU'}"
    )


def main(options: Options) -> None:
    if options.json is not None:
        claim_file(options.json)
    sizes = QUICK if options.quick else FULL
    facts = machine()
    rows: list[Row] = []
    try:
        for name, case in ALL.items():
            if options.only in (None, name):
                print(f"{name} …", file=sys.stderr)
                for row in case(sizes):
                    rows.append(
                        replace(row, target=None) if options.quick else row
                    )  # targets are for full size
    finally:  # a case that fails, or is interrupted, takes no other's figures with it
        show(rows, facts, sizes, options.json)


def show(rows: Sequence[Row], facts: dict[str, Any], sizes: Sizes, file: Path | None) -> None:
    """Print the table, and write the file if there is to be one."""
    width = None if sys.stdout.isatty() else 180
    Console(width=width).print(table(rows, facts))
    if file is not None:
        content = {"machine": facts, "sizes": vars(sizes), "rows": [row.as_json() for row in rows]}
        with atomic_write(file) as aside:
            aside.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    cli.run(main, Options)
