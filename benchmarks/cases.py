"""What is compared: a training step, the student's evaluation, a sample, the metric, a picture."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

import cli
from benchmarks import published
from benchmarks.measure import Action, Row, apart, in_turn
from datasets import CITYSCAPES, SceneDataset, open_split, use_cache
from demo.scenes import write_dataset
from eval.metrics import confusion_matrix
from eval.rendering import colorize
from models import create_model
from models.distillation.methods import METHODS, PUBLISHED

ORIGINAL = "the original's way"


@dataclass(frozen=True)
class Setup:
    """Where, at which sizes and how often.

    Attributes:
        height: of the network's input; it and photographs are twice as wide as high.
        pixels: the height of photographs and label maps.
        steps: of training: method, batch size, and the mode in which ours is compiled.
        evaluations: batch size, and the mode in which both sides are compiled.
        rounds, calls: how often each side has its turn, and how many calls it makes then.
    """

    device: str = "cpu"
    height: int = 512
    pixels: int = 1024
    steps: tuple[tuple[str, int, str | None], ...] = tuple((name, 2, None) for name in PUBLISHED)
    evaluations: tuple[tuple[int, str | None], ...] = ((1, None),)
    rounds: int = 3
    calls: int = 1


CPU = Setup()
QUICK: dict[str, Any] = {"height": 64, "pixels": 128, "rounds": 1}
GRAPHS = "reduce-overhead"  # CUDA graphs
GPU = Setup(
    device="cuda",
    steps=(
        ("TransKDBase", 8, GRAPHS),
        ("TransKDBase", 8, "default"),
        ("TransKDBase", 8, None),
        ("TransKD_GL", 8, GRAPHS),
        ("TransKD_EA", 8, GRAPHS),
        ("TransKDBase", 2, GRAPHS),
        ("TransKDBase", 16, GRAPHS),
    ),
    evaluations=((16, None), (16, GRAPHS), (1, GRAPHS)),
    calls=10,
)


class Step:
    """A method's training step on random images, ours or the original's way.

    Ours runs in bf16 on a GPU, compiled in `mode` if there is one. A call makes a step and returns
    its losses.
    """

    def __init__(
        self, method: str, original: bool, setup: Setup, batch: int = 2, mode: str | None = None
    ) -> None:
        on_gpu = setup.device != "cpu"
        torch.manual_seed(0)
        student, teacher = create_model("segformer_b0"), create_model("segformer_b2").eval()
        weights = CITYSCAPES.weights
        distiller = METHODS[PUBLISHED[method]].build(student, teacher.channels, weights)
        self.original = original
        self.precision = torch.bfloat16 if on_gpu and not original else None
        self.has_graphs = mode == GRAPHS
        if original:
            published.slowed(student)
            published.slowed(teacher)
        else:
            cli.find_device(setup.device)  # which also makes the process keep its memory
            teacher.requires_grad_(False)
            teacher.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if on_gpu:
            torch.backends.cudnn.benchmark = True
            if not original:  # as in train/setup.py
                torch.set_float32_matmul_precision("high")
        self.distiller, self.teacher = distiller.to(setup.device).train(), teacher.to(setup.device)
        if mode is not None:
            for module in (distiller, teacher):
                module.compile(dynamic=False, mode=mode)
        self.optimizer = AdamW(distiller.parameters(), lr=6e-5, fused=not original)
        h, w = setup.height, 2 * setup.height
        self.images = torch.rand(batch, 3, h, w).to(setup.device)
        labels = torch.randint(0, CITYSCAPES.num_outputs, (batch, h // 4, w // 4))
        self.labels = labels.to(torch.uint8).to(setup.device)

    def __call__(self) -> dict[str, Tensor]:
        if self.original:
            networks = self.distiller, self.teacher, self.optimizer
            return published.published_step(*networks, self.images, self.labels)
        self.optimizer.zero_grad(set_to_none=True)
        if self.has_graphs:
            torch.compiler.cudagraph_mark_step_begin()  # as in train/engine.py
        enabled = self.precision is not None
        with torch.autocast(self.images.device.type, self.precision, enabled=enabled):
            with torch.no_grad():
                teacher_output = self.teacher(self.images, logits=False)
            losses = self.distiller(self.images, self.labels, teacher_output)
        torch.stack(list(losses.values())).sum().backward()
        self.optimizer.step()
        return losses


def training(setup: Setup) -> Iterator[Row]:
    """Training steps, in time and memory."""
    for method, batch, mode in setup.steps:
        name = f"{method}: training step, batch {batch}, {setup.height}×{2 * setup.height}"
        if mode is not None:
            name += f", compiled ({mode})"
        ours = partial(Step, method, False, setup, batch, mode)
        theirs = partial(Step, method, True, setup, batch)
        times, peaks = apart(ours, theirs, setup.device, setup.rounds, setup.calls)
        note = f"{batch / median(times[0]):.3g} images/s" if times[0] else "out of memory"
        if not times[1]:
            note += f"; {ORIGINAL}: out of memory"
        yield Row(name, ORIGINAL, "time", *times, 4 if batch == 2 else 6, note)
        yield Row(name, ORIGINAL, "memory", *peaks, 0.4)


def prediction(peer: bool, setup: Setup, batch: int, mode: str | None) -> Action:
    """A call returns the logits, of ours or of Hugging Face's network."""
    student = create_model("segformer_b0").eval()
    model = published.huggingface_segformer(student) if peer else student
    model.to(setup.device)
    if mode is not None:
        model.compile(dynamic=False, mode=mode)
    images = torch.rand(batch, 3, setup.height, 2 * setup.height).to(setup.device)

    @torch.inference_mode()
    def run() -> Tensor:
        return model(images).logits

    return run


def evaluation(setup: Setup) -> Iterator[Row]:
    """The student's forward pass."""
    if not find_spec("transformers"):
        yield Row("SegFormer-B0: evaluation", "Hugging Face, SDPA", note="not installed")
        return
    for batch, mode in setup.evaluations:
        name = f"SegFormer-B0: evaluation, batch {batch}, {setup.height}×{2 * setup.height}"
        if mode is not None:
            name += f", both compiled ({mode})"
        ours, theirs = (partial(prediction, peer, setup, batch, mode) for peer in (False, True))
        times, _ = apart(ours, theirs, setup.device, 3 * setup.rounds, setup.calls)
        note = f"{batch / median(times[0]):.3g} images/s"
        yield Row(name, "Hugging Face, SDPA", "time", *times, 2.5, note)


def drawn_scenes(folder: Path, setup: Setup, count: int = 3) -> SceneDataset:
    """A validation split of synthetic photographs with labels, read through a new cache."""
    size = {"height": setup.pixels, "width": 2 * setup.pixels}
    data = write_dataset(folder / "data", train=0, val=count, **size)
    scenes = open_split("cityscapes", data, "val", height=setup.height)
    use_cache(scenes, folder / "cache")
    return scenes


def sample(setup: Setup) -> Iterator[Row]:
    """Image and label, ready for a batch."""
    with tempfile.TemporaryDirectory() as folder:
        scenes = drawn_scenes(Path(folder), setup)

        def ours() -> None:
            for index in range(len(scenes)):
                scenes[index]

        def theirs() -> None:
            for sample in scenes.samples:
                assert sample.label is not None
                published.read_sample(sample.image, sample.label, setup.height, CITYSCAPES.ignore)

        times = in_turn(ours, theirs, 3 * setup.rounds)
    name = f"{len(scenes)} samples of {setup.pixels}×{2 * setup.pixels} from a warm cache"
    yield Row(name, "decoding the PNG", "time", *times, 50)


def label_maps(pixels: int) -> tuple[Tensor, Tensor]:
    """Prediction int64 and truth uint8 (1, H, W) in large patches of one class; a tenth differs."""
    generator = torch.Generator().manual_seed(0)
    outputs = CITYSCAPES.num_outputs
    coarse = torch.randint(0, outputs, (1, 1, 16, 32), generator=generator).float()
    truth = nn.functional.interpolate(coarse, (pixels, 2 * pixels))[:, 0].to(torch.uint8)
    noise = torch.randint(0, 10 * outputs, truth.shape, generator=generator)
    return torch.where(noise < outputs, noise, truth), truth


def count(setup: Setup, original: bool) -> Action:
    """A call counts one image."""
    predicted, truth = label_maps(setup.pixels)
    if original:
        whole = truth.long()  # so does the published loader
        return partial(published.one_hot_counts, predicted, whole, CITYSCAPES.num_outputs)
    return partial(confusion_matrix, predicted, truth, CITYSCAPES.num_outputs)


def confusion(setup: Setup) -> Iterator[Row]:
    """Counts for the metric."""
    name = f"confusion matrix, {setup.pixels}×{2 * setup.pixels}"
    ours, theirs = (partial(count, setup, original) for original in (False, True))
    times, peaks = apart(ours, theirs, "cpu", 5 * setup.rounds)
    yield Row(name, "one-hot maps", "time", *times, 20)
    yield Row(name, "one-hot maps", "memory", *peaks, 0.1)


def colour(setup: Setup) -> Iterator[Row]:
    """Label map to picture."""
    labels = label_maps(setup.pixels)[1][0].numpy()
    palette = CITYSCAPES.palette.tolist()
    theirs = partial(published.colour_by_loop, labels, palette)
    times = in_turn(partial(colorize, labels, CITYSCAPES), theirs, 5 * setup.rounds)
    name = f"colour, {setup.pixels}×{2 * setup.pixels}"
    yield Row(name, "a loop over classes", "time", *times, 10)


CASES = {case.__name__: case for case in (training, evaluation, sample, confusion, colour)}
