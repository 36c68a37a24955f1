"""The project on a GPU: is it right, how fast is it, does it learn. One command: `make gpu`.

    make gpu                                          right and fast: within seven minutes
    python -m benchmarks.gpu --learn data/camvid      a teacher and four students on CamVid
    python -m benchmarks.gpu --quick --device cpu     the same steps, small: whether it works

On a machine that reaches no package index, `make gpu` takes packages that are missing as wheels
from a folder `wheels/`. One table is printed last.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import cli  # isort: skip  # before torch

import torch
from rich.console import Console

import train.table
from benchmarks import published
from benchmarks.cases import FULL, ORIGINAL, QUICK, Sizes, Step, drawn_scenes, prediction
from benchmarks.measure import Row, machine, peak_memory, seconds, table
from datasets import Augmentation, training_batches
from eval.commands import ColorOptions, IoUOptions, render, score
from files import OUTPUTS, ROOT, read_json, write_json
from models import create_model
from models.distillation.methods import PUBLISHED
from models.info import executed_macs
from train.engine import to_device

CITYSCAPES_IMAGES = 2975


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
    minutes: float = 7.0
    """What is not measured after this is left out."""
    output_dir: Path = OUTPUTS / "gpu"
    """Where the runs of --learn and their pictures go."""
    json: Path | None = None
    """Also write every figure here."""


@dataclass(frozen=True)
class Setup:
    """What is measured, and how often. On a CPU a compiled step and TF32 have nothing to show."""

    device: str = "cuda"
    sizes: Sizes = FULL
    batches: tuple[int, ...] = (8, 2, 16)
    matmuls: tuple[str, ...] = ("fp32", "TF32")  # the precision of the original's products
    modes: tuple[str | None, ...] = ("default", "reduce-overhead")  # the second is CUDA graphs
    warmup: int = 4
    repeats: int = 20
    workers: int = 8
    passes: int = 15  # over the scenes that are loaded, four batches of them

    @property
    def on_cpu(self) -> bool:
        return self.device == "cpu"


SMALL = Setup(
    "cpu", QUICK, (2,), matmuls=("fp32",), modes=(None,), warmup=1, repeats=1, workers=0, passes=1
)


def new_step(method: str, original: bool, setup: Setup, mode: str | None, matmul: str) -> Step:
    """A training step with torch set up as training does; ours in bf16 where that is fast."""
    torch.compiler.reset()
    if not setup.on_cpu:
        torch.cuda.empty_cache()
    torch.set_float32_matmul_precision("highest" if matmul == "fp32" else "high")
    torch.backends.cudnn.allow_tf32 = True  # torch's default
    torch.backends.cudnn.benchmark = True
    precision = None if original or setup.on_cpu else torch.bfloat16
    return Step(method, original, setup.sizes, setup.device, precision, mode)


def training(setup: Setup) -> Iterator[Row]:
    """Steps in bf16, compiled in every mode, against the original's way in fp32 and in TF32.

    TransKD-Base at all batch sizes; GL and EA at the first one.
    """
    for batch in setup.batches:
        setup = replace(setup, sizes=replace(setup.sizes, batch=batch))
        methods = list(PUBLISHED) if batch == setup.batches[0] else ["TransKDBase"]
        for method in methods:
            yield from training_steps(method, setup)


def training_steps(method: str, setup: Setup) -> Iterator[Row]:
    """The rows of one method at one batch size."""
    batch, height = setup.sizes.batch, setup.sizes.height
    times, peaks = {}, {}
    for matmul in setup.matmuls:
        step = new_step(method, True, setup, None, matmul)
        times[matmul] = seconds(step, setup.device, setup.warmup, setup.repeats)
        peaks[matmul] = peak_memory(step, setup.device)
        del step  # and its memory, before the next one is made
    for mode in setup.modes:
        step = new_step(method, False, setup, mode, "TF32")
        ours = seconds(step, setup.device, setup.warmup, setup.repeats)
        peak = peak_memory(step, setup.device)
        name = f"{method}: step, batch {batch}, {height}×{2 * height}, {mode or 'eager'}"
        note = f"{batch / median(ours):.1f} images/s"
        if not setup.on_cpu:
            note += f"; {share_of_peak(step, median(ours)):.0%} of a large product's bf16 rate"
        for matmul in setup.matmuls:
            target = None if matmul == "TF32" else 4 if batch == 2 else 6
            yield Row(name, f"{ORIGINAL}, {matmul}", "time", ours, times[matmul], target, note)
        if peak:
            yield Row(name, f"{ORIGINAL}, fp32", "memory", peak, peaks["fp32"], 0.35)
        if method == "TransKDBase":
            yield loop(step, setup, name)
        del step


def share_of_peak(step: Step, duration: float) -> float:
    """What the step's multiply-accumulates take of the rate of one large bf16 product."""
    with torch.device("meta"):
        student, teacher = create_model("segformer_b0"), create_model("segformer_b2")
        images = torch.empty(step.images.shape)
        macs = 3 * executed_macs(student, images) + executed_macs(teacher, images, logits=False)
    a = torch.randn(8192, 8192, device=step.images.device, dtype=torch.bfloat16)
    product = median(seconds(lambda: a @ a, "cuda", 3, 10))
    return macs / duration / (8192**3 / product)


def loop(step: Step, setup: Setup, name: str) -> Row:
    """The whole loop from a warm cache: how long the device waits for its images."""
    batch_size = setup.sizes.batch
    device = torch.device(setup.device)
    with tempfile.TemporaryDirectory() as folder:
        sizes = replace(setup.sizes, pixels=setup.sizes.height)
        scenes = drawn_scenes(Path(folder), sizes, 4 * batch_size)
        scenes.augment = Augmentation()
        batches = training_batches(
            scenes,
            batch_size=batch_size,
            seed=0,
            epoch=1,
            num_workers=setup.workers,
            pin_memory=not setup.on_cpu,
        )
        # One long epoch, for every epoch starts its workers anew. What they read while they were
        # waited for is used up before the clock starts.
        loading = iter(replace(batches, keys=batches.keys * setup.passes))
        for batch in islice(loading, 2 * setup.workers + 1):
            step.images, step.labels = to_device(batch, device)
            step()
        synchronize(setup)
        waited = 0.0
        rounds = 0
        started = clock = time.perf_counter()
        for batch in loading:
            waited += time.perf_counter() - clock
            step.images, step.labels = to_device(batch, device)
            step()
            rounds += 1
            clock = time.perf_counter()
        synchronize(setup)
        spent = time.perf_counter() - started
    rate = rounds * batch_size / spent
    hours = 1000 * CITYSCAPES_IMAGES / rate / 3600
    note = f"{rate:.1f} images/s, {waited / spent:.0%} of the time spent waiting for images; "
    note += f"1000 epochs of Cityscapes take {hours:.1f} h"
    return Row(f"{name}, with loading", "", ours=[batch_size / rate], note=note)


def synchronize(setup: Setup) -> None:
    if not setup.on_cpu:
        torch.cuda.synchronize()


def evaluation(setup: Setup) -> Iterator[Row]:
    """The student's forward pass in fp32, both sides as they are and then both compiled."""
    if not find_spec("transformers"):  # it is not among the wheels
        yield Row("SegFormer-B0: evaluation", "Hugging Face, SDPA", note="not installed")
        return
    student = create_model("segformer_b0").eval()
    models = [student, published.huggingface_segformer(student)]
    height = setup.sizes.height
    for mode in dict.fromkeys([None, setup.modes[-1]]):
        torch.compiler.reset()
        for model in models:
            model.to(setup.device)
            if mode is not None:
                model.compile(dynamic=False, mode=mode)
        for batch in (1, max(setup.batches)):
            images = torch.rand(batch, 3, height, 2 * height, device=setup.device)
            ours, theirs = (
                seconds(prediction(model, images), setup.device, setup.warmup, setup.repeats)
                for model in models
            )
            name = f"SegFormer-B0: evaluation, batch {batch}, {mode or 'eager'}"
            note = f"{batch / median(ours):.0f} images/s"
            target = 2.5 if batch > 1 else None
            yield Row(name, "Hugging Face, SDPA", "time", ours, theirs, target, note)


def profile(setup: Setup) -> str:
    """The ten kernels that a compiled step spends most time in."""
    setup = replace(setup, sizes=replace(setup.sizes, batch=setup.batches[0]))
    step = new_step("TransKDBase", False, setup, setup.modes[0], "TF32")
    for _ in range(setup.warmup):
        step()
    with torch.profiler.profile() as profiler:
        step()
    key = "self_cpu_time_total" if setup.on_cpu else "self_device_time_total"
    return profiler.key_averages().table(sort_by=key, row_limit=10, max_name_column_width=60)


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


def measure(setup: Setup, deadline: float) -> dict[str, Any]:
    """Every row and the profile; at the deadline the rest of a case is left out."""
    rows: list[Row] = []
    left_out = []
    for case in (training, evaluation):
        for row in case(setup):
            rows.append(row)
            print(f"{row.name}: {row.note}", file=sys.stderr)
            if time.monotonic() > deadline:
                left_out.append(case.__name__)
                break
    if setup.sizes == QUICK:
        rows = [replace(row, target=None) for row in rows]  # targets are those of the full size
    kernels = profile(setup)
    print(kernels)
    Console(width=None if sys.stdout.isatty() else 200).print(table(rows, machine()))
    if left_out:
        print(f"out of time: the rest of {', '.join(left_out)}")
    return {"rows": [row.as_json() for row in rows], "left_out": left_out, "profile": kernels}


def main(options: Options) -> None:
    started = time.monotonic()
    cli.find_device(options.device)
    content: dict[str, Any] = {"machine": machine()}
    if options.learn is not None:
        content["learned"] = learn(options, options.learn)
    else:
        if options.tests:
            command = [sys.executable, "-m", "pytest", "-m", "gpu", "-n", "0", "tests/test_gpu.py"]
            environment = os.environ | {"TRANSKD_TEST_DEVICE": options.device}
            tests = subprocess.run([*command, "-q"], cwd=ROOT, env=environment)
            content["tests"] = tests.returncode
        setup = replace(SMALL if options.quick else Setup(), device=options.device)
        content |= measure(setup, started + 60 * options.minutes)
    if options.json is not None:
        write_json(content, options.json)
    print(f"took {(time.monotonic() - started) / 60:.1f} minutes")
    if content.get("tests"):
        sys.exit("tests failed on this device; see above")


if __name__ == "__main__":
    cli.run(main, Options)
