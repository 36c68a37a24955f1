"""What is measured on a GPU: training steps, the whole loop, the student's evaluation, kernels."""

import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import published
from benchmarks.cases import ORIGINAL, QUICK, Sizes, Step, drawn_scenes, prediction
from benchmarks.measure import Row, peak_memory, seconds
from datasets import Augmentation, training_batches
from models import create_model
from models.distillation.methods import PUBLISHED
from models.info import executed_macs
from train.engine import to_device

CITYSCAPES_IMAGES = 2975


@dataclass(frozen=True)
class Setup(Sizes):
    """What is measured, and how often. On a CPU a compiled step and TF32 have nothing to show."""

    repeats: int = 20
    device: str = "cuda"
    batches: tuple[int, ...] = (8, 2, 16)
    matmuls: tuple[str, ...] = ("fp32", "TF32")  # the precision of the original's products
    modes: tuple[str | None, ...] = ("default", "reduce-overhead")  # the second is CUDA graphs
    warmup: int = 4
    workers: int = 8
    passes: int = 15  # over the scenes that are loaded, four batches of them

    @property
    def on_cpu(self) -> bool:
        return self.device == "cpu"


SMALL = Setup(
    **vars(QUICK),
    device="cpu",
    batches=(2,),
    matmuls=("fp32",),
    modes=(None,),
    warmup=1,
    workers=0,
    passes=1,
)


def new_step(method: str, original: bool, setup: Setup, mode: str | None, matmul: str) -> Step:
    """A training step with torch set up as training does; ours in bf16 where that is fast."""
    forget_compiled(setup)
    torch.set_float32_matmul_precision("highest" if matmul == "fp32" else "high")
    torch.backends.cudnn.allow_tf32 = True  # torch's default
    torch.backends.cudnn.benchmark = True
    precision = None if original or setup.on_cpu else torch.bfloat16
    return Step(method, original, setup, setup.device, precision, mode)


def forget_compiled(setup: Setup) -> None:
    """Free what was compiled and measured before, whose memory would count for what is next."""
    torch.compiler.reset()
    gc.collect()  # compiled modules refer to themselves
    if not setup.on_cpu:
        torch.cuda.empty_cache()


def training(setup: Setup) -> Iterator[Row]:
    """Steps in bf16, compiled in every mode, against the original's way in fp32 and in TF32.

    TransKD-Base at all batch sizes; then GL and EA at the first one, in the first mode.
    """
    for batch in setup.batches:
        yield from training_steps("TransKDBase", replace(setup, batch=batch))
    others = replace(setup, batch=setup.batches[0], modes=setup.modes[:1])
    for method in list(PUBLISHED)[1:]:
        yield from training_steps(method, others)


def training_steps(method: str, setup: Setup) -> Iterator[Row]:
    """The rows of one method at one batch size."""
    batch, height = setup.batch, setup.height
    times, peaks = {}, {}
    for matmul in setup.matmuls:
        step = new_step(method, True, setup, None, matmul)
        times[matmul] = if_it_fits(seconds, step, setup.device, setup.warmup, setup.repeats)
        peaks[matmul] = if_it_fits(peak_memory, step, setup.device)
        del step  # and its memory, before the next one is made
    for mode in setup.modes:
        step = new_step(method, False, setup, mode, "TF32")
        ours = if_it_fits(seconds, step, setup.device, setup.warmup, setup.repeats)
        peak = if_it_fits(peak_memory, step, setup.device)
        name = f"{method}: step, batch {batch}, {height}×{2 * height}, {mode or 'eager'}"
        note = f"{batch / median(ours):.1f} images/s" if ours else "out of memory"
        if ours and not setup.on_cpu:
            note += f"; {share_of_peak(step, median(ours)):.0%} of a large product's bf16 rate"
        for matmul in setup.matmuls:
            target = None if matmul == "TF32" else 4 if batch == 2 else 6
            yield Row(name, f"{ORIGINAL}, {matmul}", "time", ours, times[matmul], target, note)
        if peak:
            yield Row(name, f"{ORIGINAL}, fp32", "memory", peak, peaks["fp32"], 0.35)
        if ours and method == "TransKDBase":
            yield loop(step, setup, name)
        del step


def if_it_fits(measured: Callable[..., list[float]], *arguments: Any) -> list[float]:
    """What a measurement gives; nothing where the GPU has too little memory for it."""
    try:
        return measured(*arguments)
    except torch.OutOfMemoryError:
        return []


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
    batch_size = setup.batch
    device = torch.device(setup.device)
    with tempfile.TemporaryDirectory() as folder:
        small = replace(setup, pixels=setup.height)
        scenes = drawn_scenes(Path(folder), small, 4 * batch_size)
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
    """The student's forward pass, both sides as they are and then both compiled; TF32 in both."""
    if not find_spec("transformers"):  # it is not among the wheels
        yield Row("SegFormer-B0: evaluation", "Hugging Face, SDPA", note="not installed")
        return
    student = create_model("segformer_b0").eval()
    models = [student, published.huggingface_segformer(student)]
    height = setup.height
    for mode in dict.fromkeys([None, setup.modes[-1]]):
        forget_compiled(setup)
        for model in models:
            model.to(setup.device)
            if mode is not None:
                model.compile(dynamic=False, mode=mode)
        for batch in (1, max(setup.batches)):
            images = torch.rand(batch, 3, height, 2 * height, device=setup.device)
            times: tuple[list[float], list[float]] = ([], [])
            for _ in range(3):  # in turn, for the host may be busy for a while
                for model, taken in zip(models, times, strict=True):
                    call = prediction(model, images)
                    taken += seconds(call, setup.device, setup.warmup, setup.repeats)
            ours, theirs = times
            name = f"SegFormer-B0: evaluation, batch {batch}, {mode or 'eager'}"
            note = f"{batch / median(ours):.0f} images/s"
            target = 2.5 if batch > 1 else None
            yield Row(name, "Hugging Face, SDPA", "time", ours, theirs, target, note)


def profile(setup: Setup) -> str:
    """The ten kernels that a compiled step spends most time in."""
    setup = replace(setup, batch=setup.batches[0])
    step = new_step("TransKDBase", False, setup, setup.modes[0], "TF32")
    for _ in range(setup.warmup):
        step()
    with torch.profiler.profile() as profiler:
        step()
    key = "self_cpu_time_total" if setup.on_cpu else "self_device_time_total"
    return profiler.key_averages().table(sort_by=key, row_limit=10, max_name_column_width=60)
