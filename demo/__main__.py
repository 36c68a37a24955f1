"""The whole project in a few minutes, on synthetic scenes: `make demo`.

Draws a small road-scene data set, trains a teacher on all of it, then a student alone and a
TransKD-Base student on the same few scenes, schedule and seed, evaluates and renders the three,
and ends by naming a page that shows it all. Run again after an interruption, it continues where it
stopped.
"""

import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cli  # isort: skip  # before torch

from demo.scenes import WEATHERS, write_dataset
from errors import UserError
from eval.commands import ColorOptions, IoUOptions, render, score
from eval.report import write_report
from files import OUTPUTS, ROOT, read_json

INTRODUCTION = """\
A teacher (SegFormer-B2, 27.4 M parameters) learned from {many} synthetic scenes. Two copies of one
student (SegFormer-B0, 3.7 M parameters) learned from {few} of them, with the same seed, the same
schedule and the same number of steps: one alone, one with TransKD-Base, that is, also from the
teacher's feature maps and patch embeddings. Everything started from random weights.

The teacher sees more than the students because that is what makes distillation pay: it hands on
what it learned from scenes that they never see. In the paper that knowledge comes from ImageNet. A
teacher that has seen only what the student sees has little to add.

On the {val} validation scenes the distilled student reaches {distilled:.1f} % mIoU, the student
alone {alone:.1f} %, the teacher {teacher:.1f} % (classes that occur, quarter-size maps, last
weights). In weather that no training has seen, it differs from the student alone by {gains} points.
Everything here was made by "make demo"."""
BATCH_SIZE = 8
LEARNING_RATE = 6e-4  # ten times the paper's: the schedule is a hundred times shorter
PICTURES = 6  # validation scenes on the page


@dataclass(kw_only=True)
class Options:
    """Try the whole project on synthetic scenes: data, teacher, students, evaluation, report."""

    output_dir: Path = OUTPUTS / "demo"
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


def main(options: Options) -> None:
    started = time.monotonic()
    out = options.output_dir.expanduser().absolute()
    size = {"height": options.height, "width": 2 * options.height}
    data, weathers = out / "data" / "cityscapes", out / "data" / "ACDC"
    few_of_each = max(1, options.val // 5)
    write_dataset(data, train=options.scenes, val=options.val, **size)
    write_dataset(weathers, dataset="ACDC", train=0, val=few_of_each, **size)

    runs = {
        "teacher": out / "teacher",
        "student alone": out / "student",
        "TransKD-Base": out / "TransKDBase",
    }
    weights = {name: run / "student.safetensors" for name, run in runs.items()}
    weights["teacher"] = runs["teacher"] / "teacher.safetensors"
    few = ["--subset-every", options.subset_every]
    with_teacher = [*few, "--teacher-weights", weights["teacher"]]
    train(options, "teacher", runs["teacher"], options.teacher_epochs, ["--from-scratch"])
    train(options, "student", runs["student alone"], options.student_epochs, few)
    train(options, "TransKDBase", runs["TransKD-Base"], options.student_epochs, with_teacher)

    scores = {name: evaluate(weights[name], data, weathers) for name in runs}
    miou = {name: 100 * evaluation["mean_iou"] for name, evaluation in scores.items()}
    distilled, alone = (scores[name]["conditions"] for name in ("TransKD-Base", "student alone"))
    gains = {
        name: 100 * (distilled[name]["mean_iou"] - alone[name]["mean_iou"]) for name in WEATHERS[1:]
    }
    page = write_report(
        out / "report.html",
        title="TransKD: what a student learns from a teacher",
        introduction=INTRODUCTION.format(
            many=options.scenes,
            few=len(range(0, options.scenes, options.subset_every)),
            val=options.val,
            teacher=miou["teacher"],
            alone=miou["student alone"],
            distilled=miou["TransKD-Base"],
            gains=", ".join(f"{gain:+.1f} ({name})" for name, gain in gains.items()),
        ),
        runs=runs,
        evaluations=scores,
        spaced=PICTURES,
    )
    for name, value in miou.items():
        print(f"{name:14} {value:5.1f} % mIoU")
    print(f"took {(time.monotonic() - started) / 60:.1f} minutes; open {page}")


def train(options: Options, script: str, run: Path, epochs: int, flags: list[Any]) -> None:
    """Run one of the training scripts; a training that was interrupted continues.

    An interrupt reaches it once, and it saves first. Raises UserError if it failed, with what it
    said above.
    """
    data = run.parent / "data" / "cityscapes"
    where = ["--datadir", data, "--output-dir", run, "--resume", "auto", "--num-workers", 0]
    size = ["--height", options.height, "--batch-size", BATCH_SIZE, "--seed", options.seed]
    schedule = ["--num-epochs", epochs, "--lr-decay-epochs", epochs + 1, "--lr", LEARNING_RATE]
    shown = ["--validate-every", max(1, epochs // 10), "--steps-loss", 10]
    words = [f"train/{script}.py", *where, *size, *schedule, *shown, *flags]
    command = [sys.executable, *map(str, words)]
    print("\n$ python " + " ".join(command[1:]), flush=True)
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        process.wait()
        raise
    if code:
        raise UserError(
            f"the command above ended with exit code {code}; run `make demo` again to continue, or "
            "choose another --output-dir"
        )


def evaluate(weights: Path, data: Path, weathers: Path) -> dict[str, Any]:
    """Render the validation scenes and score them, and those in weathers that no training saw."""
    run = weights.parent
    file = run / "eval.json"
    score("cityscapes", IoUOptions(data, weights=weights, num_workers=0, json=file))
    by_weather = score("ACDC", IoUOptions(weathers, weights=weights, num_workers=0)).as_json()
    render("cityscapes", ColorOptions(data, weights=weights, size="full", output_dir=run / "color"))
    everything = {"all four": {"mean_iou": by_weather["mean_iou"]}}
    return (read_json(file) or {}) | {"conditions": everything | by_weather["conditions"]}


if __name__ == "__main__":
    cli.run(main, Options)
