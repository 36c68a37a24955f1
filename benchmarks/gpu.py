"""The same on a GPU: training steps and evaluation in images a second, and how long the paper's run would take."""

import gc
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

import torch
from torch import nn

from benchmarks import published
from benchmarks.cases import Step, drawn_scenes, prediction
from benchmarks.measure import Row, Run, Sizes
from datasets.loading import training_batches
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
    compile_modes: tuple[str, ...] = ("default", "reduce-overhead")  # the second replays CUDA graphs
    batches: tuple[int, ...] = (2, 8, 16)
    warmup: int = 5  # compilation, cuDNN's search
    repeats: int = 20
    workers: int = 8
    images: int = 64  # of the run with data loading


def synchronize(device: str) -> None:
    """Wait until the device has done what it was told."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(run: Run, setup: Setup) -> tuple[float, ...]:
    """Of every call after the warm-up."""
    times = []
    for _ in range(setup.warmup + setup.repeats):
        synchronize(setup.device)
        start = perf_counter()
        run()
        synchronize(setup.device)
        times.append(perf_counter() - start)
    return tuple(times[setup.warmup :])


def step_cost(
    other: bool, sizes: Sizes, setup: Setup, compile_mode: str | None = None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Seconds of every training step and the most bytes it took; () on a CPU, or both where memory ran out."""
    cuda = setup.device == "cuda"
    if cuda:
        torch.compiler.reset()  # with the next line, lets go of the last step's networks and CUDA graphs
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        step = Step(METHOD, other, sizes, setup.device, setup.bf16 and not other, compile_mode)
        return seconds(step, setup), (torch.cuda.max_memory_allocated(),) if cuda else ()
    except torch.OutOfMemoryError:
        return (), ()


def loaded_rate(sizes: Sizes, setup: Setup, compile_mode: str | None) -> float:
    """Images a second of training with reading, augmentation and transfer; the epoch in which it warms up left out."""
    with tempfile.TemporaryDirectory() as folder:
        scenes = drawn_scenes(Path(folder), replace(sizes, pixels=sizes.height), setup.images)
        scenes.augment = Augmentation()
        step = Step(METHOD, False, sizes, setup.device, setup.bf16, compile_mode)
        for epoch in range(2):
            batches = training_batches(
                scenes,
                batch_size=sizes.batch,
                seed=0,
                epoch=epoch,
                num_workers=setup.workers,
                pin_memory=setup.device == "cuda",
            )
            start, counted = 0.0, 0
            for batch in batches:
                if start:
                    counted += len(batch.images)
                step.images, step.labels = to_device(batch, torch.device(setup.device))
                step()
                synchronize(setup.device)
                start = start or perf_counter()  # after the first batch: starting workers is no rate
            rate = counted / (perf_counter() - start)
    return rate


def gpu(sizes: Sizes, setup: Setup | None = None) -> Iterator[Row]:
    """Training steps in bf16 and compiled against the published way in fp32; the student's evaluation; the run."""
    if setup is None and not torch.cuda.is_available():
        yield Row("training and evaluation on a GPU", "published way", note="no GPU here")
        return
    setup = setup or Setup()
    shape = f"{sizes.height}×{2 * sizes.height}"
    for batch in setup.batches:
        sized = replace(sizes, batch=batch)
        theirs, their_memory = step_cost(True, sized, setup)
        note = "" if theirs else "out of memory"
        for mode in setup.compile_modes or (None,):
            about = f"batch {batch}, {shape}" + (f", compiled ({mode})" if mode else "")
            name = f"{METHOD} on {setup.device}: training step, {about}"
            ours, memory = step_cost(False, sized, setup, mode)
            yield Row(name, "published way, fp32", "time", ours, theirs, 6, batch, note)
            yield Row(name, "published way, fp32", "memory", memory, their_memory)
            if not ours:
                continue
            rate = loaded_rate(sized, setup, mode)
            yield Row(
                f"{METHOD} on {setup.device}: data loading included, {about}",
                "",
                ours=(batch / rate,),
                items=batch,
                note=f"1000 epochs of Cityscapes: {CITYSCAPES_RUN / rate / 3600:.0f} h",
            )
    student = create_model("segformer_b0").eval()
    models: list[nn.Module] = [student, published.HuggingFaceSegFormer(student, "sdpa")]
    if setup.compile_modes:
        models[0].compile(dynamic=False, mode=setup.compile_modes[-1])
    for batch in (1, 16):
        images = torch.rand(batch, 3, sizes.height, 2 * sizes.height, device=setup.device)
        ours, theirs = (seconds(prediction(model.to(setup.device), images), setup) for model in models)
        name = f"SegFormer-B0 on {setup.device}: evaluation, fp32, batch {batch}, {shape}"
        yield Row(name, "Hugging Face, SDPA", "time", ours, theirs, items=batch)
