"""The same on a GPU: training steps and evaluation in images a second, and how long the paper's run would take."""

import gc
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import torch
from torch import nn

from benchmarks import published
from benchmarks.cases import NOT_INSTALLED, Step, drawn_scenes, prediction
from benchmarks.measure import Row, Run, Sizes
from datasets.loading import Batches, training_batches
from datasets.transforms import Augmentation
from models import create_model
from train.engine import to_device

METHOD = "TransKDBase"
CITYSCAPES_RUN = 2975 * 1000  # training images, epochs


@dataclass(frozen=True)
class Setup:
    """How ours runs; the tests have no GPU and take the CPU."""

    device: str = "cuda"
    bf16: bool = True
    compile_modes: tuple[str, ...] = (
        "default",
        "reduce-overhead",
    )  # the second replays CUDA graphs
    batches: tuple[int, ...] = (2, 8, 16)
    warmup: int = 5  # compilation, cuDNN's search
    repeats: int = 20
    workers: int = 8
    images: int = 64  # that are drawn for the run with data loading, and read again and again
    loaded_steps: int = 60


class Cost(NamedTuple):
    """Of a training step; empty where memory ran out."""

    seconds: tuple[float, ...] = ()  # of every step after the warm-up
    memory: tuple[int, ...] = ()  # the most bytes the process took from the GPU; () on a CPU
    rate: float | None = None  # images a second with reading, augmentation and transfer


def synchronize(device: str) -> None:
    """Wait until the device has done what it was told."""
    if device == "cuda":
        torch.cuda.synchronize()


@contextmanager
def as_trained(tf32: bool) -> Iterator[None]:
    """torch set up as training sets it up; without `tf32`, matrix products in full float32, which is torch's default.

    Convolutions may take TF32 in either case: that is torch's default too.
    """
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.benchmark = before[1]


def seconds(run: Run, setup: Setup) -> tuple[float, ...]:
    """From every call's end to the next one's on the device, which is not waited for between them: training doesn't."""
    for _ in range(setup.warmup):
        run()
    if setup.device != "cuda":
        times = [perf_counter()]
        for _ in range(setup.repeats):
            run()
            times.append(perf_counter())
        return tuple(end - start for start, end in pairwise(times))
    torch.cuda.synchronize()
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(setup.repeats + 1)]
    ends[0].record()
    for end in ends[1:]:
        run()
        end.record()
    torch.cuda.synchronize()
    return tuple(start.elapsed_time(end) / 1000 for start, end in pairwise(ends))


def forget(device: str) -> None:
    """Let go of the last networks and their CUDA graphs."""
    if device == "cuda":
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()


def peak_memory(run: Run) -> int:
    """The most bytes that calls after the warm-up take from the GPU.

    Not what is allocated: the memory of a CUDA graph counts as free between its replays, and nobody else can have it.
    """
    torch.cuda.empty_cache()  # what compilation and cuDNN's search took
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        run()
    return torch.cuda.max_memory_reserved()


def step_cost(
    other: bool,
    sizes: Sizes,
    setup: Setup,
    compile_mode: str | None = None,
    *,
    tf32: bool = True,
    loaded: bool = False,
) -> Cost:
    """What a training step costs; where `loaded`, with reading its images as well."""
    forget(setup.device)
    try:
        with as_trained(tf32):
            step = Step(METHOD, other, sizes, setup.device, setup.bf16 and not other, compile_mode)
            times = seconds(step, setup)
            memory = (peak_memory(step),) if setup.device == "cuda" else ()
            return Cost(times, memory, loaded_rate(step, sizes, setup) if loaded else None)
    except torch.OutOfMemoryError:
        return Cost()


def loaded_rate(step: Step, sizes: Sizes, setup: Setup) -> float:
    """Images a second of training from the cache, when the batches that workers have read ahead are used up."""
    with tempfile.TemporaryDirectory() as folder:
        start, ahead = 0.0, 2 * setup.workers
        for number, batch in enumerate(
            repeated(Path(folder), sizes, setup, 1 + ahead + setup.loaded_steps)
        ):
            step.images, step.labels = to_device(batch, torch.device(setup.device))
            step()
            if number == ahead:
                synchronize(setup.device)
                start = perf_counter()
        synchronize(setup.device)
        return setup.loaded_steps * sizes.batch / (perf_counter() - start)


def repeated(folder: Path, sizes: Sizes, setup: Setup, count: int) -> Batches:
    """`count` full batches, of the images of one epoch over and over."""
    scenes = drawn_scenes(folder, replace(sizes, pixels=sizes.height), setup.images)
    scenes.augment = Augmentation()
    batches = training_batches(
        scenes,
        batch_size=sizes.batch,
        seed=0,
        epoch=0,
        num_workers=setup.workers,
        pin_memory=setup.device == "cuda",
    )
    full = [keys for keys in batches.keys if len(keys) == sizes.batch]
    return replace(batches, keys=(full * count)[:count])


def training(sizes: Sizes, setup: Setup) -> Iterator[Row]:
    """Steps in bf16, compiled in every mode, against the published way in fp32 and, which is stricter, in TF32."""
    for batch in setup.batches:
        sized = replace(sizes, batch=batch)
        theirs = {
            name: step_cost(True, sized, setup, tf32=name == "TF32") for name in ("fp32", "TF32")
        }
        for mode in setup.compile_modes or (None,):
            about = f"batch {batch}, {sizes.height}×{2 * sizes.height}" + (
                f", compiled ({mode})" if mode else ""
            )
            name = f"{METHOD} on {setup.device}: training step, {about}"
            ours = step_cost(False, sized, setup, mode, loaded=True)
            for kind, cost in theirs.items():
                other, target = f"published way, {kind}", 6 if kind == "fp32" else None
                note = "" if cost.seconds else "out of memory"
                yield Row(name, other, "time", ours.seconds, cost.seconds, target, batch, note)
                yield Row(name, other, "memory", ours.memory, cost.memory)
            if ours.rate is not None:
                yield Row(
                    f"{METHOD} on {setup.device}: data loading included, {about}",
                    "",
                    ours=(batch / ours.rate,),
                    items=batch,
                    note=f"1000 epochs of Cityscapes, without validation: {CITYSCAPES_RUN / ours.rate / 3600:.0f} h",
                )


def evaluation(sizes: Sizes, setup: Setup) -> Iterator[Row]:
    """The student's forward pass, both sides as they are and then both compiled."""
    student = create_model("segformer_b0").eval()
    models: list[nn.Module] = [student, published.HuggingFaceSegFormer(student, "sdpa")]
    for mode in (None, *setup.compile_modes[-1:]):
        forget(setup.device)
        for model in models:
            model.to(setup.device)
            if mode:
                model.compile(dynamic=False, mode=mode)
        for batch in (1, 16):
            images = torch.rand(batch, 3, sizes.height, 2 * sizes.height, device=setup.device)
            ours, theirs = (seconds(prediction(model, images), setup) for model in models)
            about = f"batch {batch}, {sizes.height}×{2 * sizes.height}" + (
                f", compiled ({mode})" if mode else ""
            )
            name = f"SegFormer-B0 on {setup.device}: evaluation, fp32, {about}"
            other = "Hugging Face, SDPA" + (", compiled alike" if mode else "")
            yield Row(name, other, "time", ours, theirs, items=batch)


def gpu(sizes: Sizes, setup: Setup | None = None) -> Iterator[Row]:
    """Training steps, the run that they make, and the student's evaluation."""
    name, other = "training and evaluation on a GPU", "published way"
    if setup is None and not torch.cuda.is_available():
        yield Row(name, other, note="no GPU here")
    elif not find_spec("transformers"):
        yield Row(name, other, note=NOT_INSTALLED)
    else:
        yield from training(sizes, setup or Setup())
        yield from evaluation(sizes, setup or Setup())
