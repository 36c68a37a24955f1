"""The whole project in a few minutes, on drawn scenes: `make demo`.

Draws a small road-scene data set, trains a teacher on all of it, then a student alone and a TransKD-Base student on
the same few scenes, schedule and seed, evaluates and renders the three through the project's own scripts, and ends
by naming a page that shows it all. Run again after an interruption, it goes on where it stopped.
"""

import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import cli
from datasets import open_split
from errors import UserError
from eval.rendering import colorize, legend, side_by_side
from eval.report import Run, write_report
from files import read_json
from train.run_folder import holds_run

ROOT = Path(__file__).resolve().parent

INTRODUCTION = """
A **teacher** (SegFormer-B2, 27.4 M parameters) learned from **{many} drawn scenes**. Two copies of one **student**
(SegFormer-B0, 3.7 M parameters) learned from **{few} of them**, with the same seed, the same schedule and the same
number of steps: one alone, one with **TransKD-Base**, that is also from the teacher's feature maps and patch
embeddings. Everything started from random weights.

The teacher sees more than the students because that is what makes distillation pay: it hands on what it learned from
scenes they never see. In the paper that knowledge comes from ImageNet. A teacher that has seen only what
the student sees has little to add.

On the {val} validation scenes the distilled student reaches **{distilled:.1f} % mIoU**, the student alone
**{alone:.1f} %**, the teacher **{teacher:.1f} %** (classes that occur, quarter-size maps, last weights).

Everything here was made by `make demo`.
"""


@dataclass(kw_only=True)
class Options:
    """Try the whole project on drawn scenes: data, teacher, students, evaluation, pictures, report."""

    output_dir: Path = ROOT / "outputs" / "demo"
    """Where everything goes."""
    seed: int = 0
    """Seed of the trainings; the scenes stay the same."""
    scenes: int = 640
    """Training scenes that are drawn, all of them for the teacher."""
    subset_every: int = 20
    """The students learn from every N-th scene."""
    val: int = 60
    """Validation scenes."""
    height: int = 96
    """Height of the scenes; they are twice as wide."""
    teacher_epochs: int = 5
    """Passes of the teacher over its scenes."""
    student_epochs: int = 100
    """Passes of the students over theirs."""
    batch_size: int = 8
    """Images a step."""
    lr: float = 6e-4
    """Learning rate; ten times the paper's, since the schedule is a hundred times shorter."""
    pictures: int = 6
    """Validation scenes shown on the page."""


def main(options: Options) -> None:
    started = time.monotonic()
    options = replace(
        options, output_dir=options.output_dir.absolute()
    )  # the commands run in another folder
    out, data = options.output_dir, options.output_dir / "data"
    for name in ("cityscapes", "ACDC"):
        small = name == "ACDC"  # four weathers, to look at and to evaluate on
        python(
            *("-m", "datasets.synthetic", "--output", data / name, "--dataset", name),
            *("--train", 2 if small else options.scenes, "--val", 12 if small else options.val),
            *("--height", options.height, "--width", 2 * options.height),
        )

    runs = {
        "teacher": out / "teacher",
        "student alone": out / "student",
        "TransKD-Base": out / "TransKDBase",
    }
    few = ("--subset-every", options.subset_every)
    train("teacher.py", runs["teacher"], options, options.teacher_epochs, "--from-scratch")
    train("student.py", runs["student alone"], options, options.student_epochs, *few)
    teacher = ("--teacher-weights", runs["teacher"] / "teacher.safetensors")
    train("TransKDBase.py", runs["TransKD-Base"], options, options.student_epochs, *few, *teacher)

    for name, run in runs.items():
        print(f"\n{name}", flush=True)
        weights = run / ("teacher.safetensors" if name == "teacher" else "student.safetensors")
        common = ("--weights", weights, "--height", options.height, "--num-workers", 0)
        python(
            "eval/eval_cityscapes_iou.py",
            "--datadir",
            data / "cityscapes",
            *common,
            "--json",
            run / "eval.json",
        )
        python(
            "eval/eval_ACDC_iou.py",
            "--datadir",
            data / "ACDC",
            *common,
            "--json",
            run / "weathers.json",
        )
        colour = (
            "--datadir",
            data / "cityscapes",
            *common,
            "--size",
            "full",
            "--output-dir",
            run / "color",
        )
        python("eval/eval_cityscapes_color.py", *colour)

    scores = {name: read_json(run / "eval.json") or {} for name, run in runs.items()}
    miou = {name: 100 * score["mean_iou"] for name, score in scores.items()}
    introduction = INTRODUCTION.format(
        many=options.scenes,
        few=len(range(0, options.scenes, options.subset_every)),
        val=options.val,
        teacher=miou["teacher"],
        alone=miou["student alone"],
        distilled=miou["TransKD-Base"],
    )
    page = write_report(
        out / "report.html",
        title="TransKD: what a student learns from a teacher",
        introduction=introduction,
        runs=[Run(name, run) for name, run in runs.items()],
        evaluations={name: score | weathers(runs[name]) for name, score in scores.items()},
        pictures=comparisons(options, runs),
    )
    for name, value in miou.items():
        print(f"{name:14} {value:5.1f} % mIoU")
    print(f"took {(time.monotonic() - started) / 60:.1f} minutes; open {page}")


def train(script: str, run: Path, options: Options, epochs: int, *flags: object) -> None:
    """Train, or go on with a training that was interrupted."""
    resume = ("--resume",) if holds_run(run) else ()
    python(
        *(
            f"train/{script}",
            "--datadir",
            options.output_dir / "data" / "cityscapes",
            "--output-dir",
            run,
        ),
        *(
            "--height",
            options.height,
            "--num-workers",
            0,
            "--batch-size",
            options.batch_size,
            "--seed",
            options.seed,
        ),
        *("--num-epochs", epochs, "--lr", options.lr, "--lr-decay-epochs", epochs + 1),
        *("--validate-every", max(1, epochs // 10), "--steps-loss", 10, *flags, *resume),
    )


def weathers(run: Path) -> dict[str, Any]:
    """A run's scores on fog, night, rain and snow, which no training has seen."""
    scores = read_json(run / "weathers.json") or {}
    return {"conditions": {"all four": {"mean_iou": scores["mean_iou"]}} | scores["conditions"]}


def comparisons(options: Options, runs: dict[str, Path]) -> list[tuple[str, Image.Image]]:
    """Image, truth and the three predictions side by side, for some validation scenes."""
    dataset = open_split(
        "cityscapes", options.output_dir / "data" / "cityscapes", "val", cache=False
    )
    rows = []
    for index in np.linspace(0, len(dataset) - 1, options.pictures).astype(int).tolist():
        name = dataset.samples[index].name
        panels = [
            ("image", dataset.photograph(index)),
            ("truth", colorize(dataset.full_label(index), dataset.classes)),
        ]
        panels += [(run, Image.open(folder / "color" / name)) for run, folder in runs.items()]
        rows.append((name, side_by_side(panels, height=3 * options.height // 2)))
    return [*rows, ("Colours of the classes", legend(dataset.classes, width=10 * options.height))]


def python(*arguments: object) -> None:
    """Run one of the project's commands; if it fails, stop with what it said."""
    command = [sys.executable, *map(str, arguments)]
    print("\n$ python " + " ".join(command[1:]), flush=True)
    if code := subprocess.run(command, cwd=ROOT).returncode:
        raise UserError(
            f"the command above ended with exit code {code}; run `make demo` again to go on, "
            "or choose another --output-dir"
        )


if __name__ == "__main__":
    cli.run(main, Options)
