"""The project on a GPU: is it right, how fast is it, does it learn. One command: `make gpu`.

    make gpu                                          right and fast: about a quarter of an hour
    python -m benchmarks.gpu --learn data/camvid      a teacher and four students on CamVid
    python -m benchmarks.gpu --quick --device cpu     the same steps, small: whether it works

On a machine that reaches no package index, `make gpu` takes packages that are missing as wheels
from a folder `wheels/`. One table is printed last.
"""

import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cli  # isort: skip  # before torch

from rich.console import Console

import train.table
from benchmarks.gpu_cases import SMALL, Setup, evaluation, profile, training
from benchmarks.measure import Row, machine, table
from eval.commands import ColorOptions, IoUOptions, render, score
from files import OUTPUTS, ROOT, read_json, write_json


@dataclass
class Options:
    """Test and measure the project on a GPU."""

    device: str = "cuda"
    """Where it runs."""
    quick: bool = False
    """Small sizes and few repetitions."""
    tests: bool = True
    """First run the tests that need a GPU."""
    learn: Path | None = None
    """Instead, train on CamVid in this folder, and evaluate by both protocols."""
    grid: Path = Path("camvid_gpu")
    """What --learn trains: a grid of train/grids/, or a file."""
    minutes: float = 10.0
    """What is not measured after this, without the tests, is left out."""
    output_dir: Path = OUTPUTS / "gpu"
    """Where the runs of --learn and their pictures go."""
    json: Path | None = None
    """Also write every figure here."""


def learn(options: Options, data: Path) -> list[dict[str, Any]]:
    """Train the grid's rows; then mIoU at the labels' own size too, and pictures."""
    train.table.main(
        train.table.Options(grid=options.grid, datadir=data, output_dir=options.output_dir)
    )
    rows = []
    for file in sorted(options.output_dir.glob("*/eval.json")):
        paper = read_json(file) or {}
        common = {"weights": Path(paper["weights"]), "subset": paper["subset"]}
        common["device"] = options.device
        full = IoUOptions(data, **common, protocol="full", json=file.with_name("full.json"))
        miou = score("cityscapes", full).as_json()["mean_iou"]
        pictures = file.with_name("colour")
        render("cityscapes", ColorOptions(data, **common, overlay=0.5, output_dir=pictures))
        rows.append({"run": file.parent.name, "paper": paper["mean_iou"], "full": miou})
    for run in rows:
        print("{run:20} quarter-size maps {paper:.2%}, full {full:.2%}".format(**run))
    return rows


def measure(setup: Setup, deadline: float, options: Options, content: dict[str, Any]) -> None:
    """Every row and the profile; at the deadline the rest of a case is left out.

    `content` is added to, and written after every row: what fails later loses nothing.
    """
    rows: list[Row] = []
    content["left_out"] = []
    for case in (training, evaluation):
        for row in case(setup):
            if options.quick:
                row = replace(row, target=None)  # targets are those of the full size
            rows.append(row)
            content["rows"] = [row.as_json() for row in rows]
            save(content, options)
            print(f"{row.name}: {row.note}", file=sys.stderr)
            if time.monotonic() > deadline:
                content["left_out"].append(case.__name__)
                break
    content["profile"] = profile(setup)
    print(content["profile"])
    Console(width=None if sys.stdout.isatty() else 200).print(table(rows, content["machine"]))
    if content["left_out"]:
        print(f"out of time: the rest of {', '.join(content['left_out'])}")


def save(content: dict[str, Any], options: Options) -> None:
    if options.json is not None:
        write_json(content, options.json)


def main(options: Options) -> None:
    started = time.monotonic()
    cli.find_device(options.device)
    content: dict[str, Any] = {"machine": machine()}
    if options.learn is not None:
        content["learned"] = learn(options, options.learn)
    else:
        if options.tests:
            command = [sys.executable, "-m", "pytest", "-m", "gpu", "-n", "4", "tests/test_gpu.py"]
            environment = os.environ | {"TRANSKD_TEST_DEVICE": options.device}
            tests = subprocess.run([*command, "-q"], cwd=ROOT, env=environment)
            content["tests"] = tests.returncode
        setup = replace(SMALL if options.quick else Setup(), device=options.device)
        measure(setup, time.monotonic() + 60 * options.minutes, options, content)
    save(content, options)
    print(f"took {(time.monotonic() - started) / 60:.1f} minutes")
    if content.get("tests"):
        sys.exit("tests failed on this device; see above")


if __name__ == "__main__":
    cli.run(main, Options)
