"""Time and memory of this project against the original's way and other libraries.

    python -m benchmarks                    everything on the CPU, at Cityscapes' size; some minutes
    python -m benchmarks --quick            tiny sizes: whether it works, not how fast it is
    python -m benchmarks --only colour      one case
    python -m benchmarks --device cuda      training and evaluation on a GPU, compiled too
    python -m benchmarks --profile          the operations that take a training step's time

Both sides take turns (ours, theirs, ours, …) and their medians are compared; where memory counts,
each side has a process of its own, whose memory is watched. The ratios mean something only on a
machine that does nothing else.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import cli  # isort: skip  # before torch

import torch
from rich.console import Console

from benchmarks.cases import CASES, CPU, GPU, QUICK, Setup, Step
from benchmarks.measure import Row, machine, table
from files import write_json


@dataclass
class Options:
    """Compare this project with the original's way and other libraries."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where networks run; on a GPU nothing else is measured."""
    quick: bool = False
    """Tiny sizes."""
    json: Path | None = None
    """Also write every repetition's figure here, after each comparison."""
    only: Literal[tuple(CASES)] | None = None  # type: ignore[valid-type]
    """Run this case alone."""
    profile: bool = False
    """Instead, show where the time of our first training step goes."""


def profile(setup: Setup) -> str:
    """The operations and kernels that take most of a step's time."""
    method, batch, mode = setup.steps[0]
    step = Step(method, False, setup, batch, mode)
    for _ in range(4):
        step()
    if setup.device != "cpu":
        torch.cuda.synchronize()  # the warm-up's kernels are over
    with torch.profiler.profile() as profiler:
        step()
    key = "self_cpu_time_total" if setup.device == "cpu" else "self_device_time_total"
    return profiler.key_averages().table(sort_by=key, row_limit=20, max_name_column_width=60)


def main(options: Options) -> None:
    setup = CPU
    if options.device == "cuda":
        cli.find_device("cuda")
        setup = GPU
    if options.quick:
        setup = replace(setup, **QUICK)
    if options.profile:
        print(profile(setup))
        return
    names = list(CASES) if options.device == "cpu" else ["training", "evaluation"]
    content = {"machine": machine()}
    rows: list[Row] = []
    for name in [options.only] if options.only else names:
        for row in CASES[name](setup):
            # Targets are those of the full size.
            rows.append(replace(row, target=None) if options.quick else row)
            print(f"{row.name}: {row.ratio or 0:.3g}× {row.note}", file=sys.stderr)
            if options.json is not None:
                write_json(content | {"rows": [row.as_json() for row in rows]}, options.json)
    Console(width=None if sys.stdout.isatty() else 180).print(table(rows, content["machine"]))


if __name__ == "__main__":
    cli.run(main, Options)
