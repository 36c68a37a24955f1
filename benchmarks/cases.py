"""What is compared: a training step, the student's evaluation, a sample, the metric, a picture."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

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
class Sizes:
    """Height of the network's input, height of photographs and label maps (twice as wide), batch,
    and how often a training step is repeated."""

    height: int = 512
    pixels: int = 1024
    batch: int = 2
    repeats: int = 3


FULL = Sizes()
QUICK = Sizes(height=64, pixels=128, repeats=1)


class Step:
    """A method's training step on random images, ours or the original's way.

    A call makes one and returns its losses.
    """

    def __init__(
        self,
        method: str,
        original: bool,
        sizes: Sizes,
        device: str = "cpu",
        precision: torch.dtype | None = None,
        compile_mode: str | None = None,
    ) -> None:
        torch.manual_seed(0)
        student, teacher = create_model("segformer_b0"), create_model("segformer_b2").eval()
        weights = CITYSCAPES.weights
        distiller = METHODS[PUBLISHED[method]].build(student, teacher.channels, weights)
        self.original = original
        self.precision = precision
        self.has_graphs = compile_mode not in (None, "default")
        if original:
            published.slowed(student)
            published.slowed(teacher)
        else:
            cli.find_device(device)  # which also makes the process keep its memory
            teacher.requires_grad_(False)
            teacher.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.distiller, self.teacher = distiller.to(device).train(), teacher.to(device)
        if compile_mode is not None:
            for module in (distiller, teacher):
                module.compile(dynamic=False, mode=compile_mode)
        self.optimizer = AdamW(distiller.parameters(), lr=6e-5, fused=not original)
        h, w = sizes.height, 2 * sizes.height
        self.images = torch.rand(sizes.batch, 3, h, w).to(device)
        labels = torch.randint(0, CITYSCAPES.num_outputs, (sizes.batch, h // 4, w // 4))
        self.labels = labels.to(torch.uint8).to(device)

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


def training(sizes: Sizes) -> Iterator[Row]:
    """A training step of each method, in time and memory."""
    for method in PUBLISHED:
        name = f"{method}: training step, batch {sizes.batch}, {sizes.height}×{2 * sizes.height}"
        ours, theirs = (partial(Step, method, original, sizes) for original in (False, True))
        times, peaks = apart(ours, theirs, sizes.repeats)
        yield Row(name, ORIGINAL, "time", *times, 4)
        yield Row(name, ORIGINAL, "memory", *peaks, 0.4)


def prediction(model: nn.Module, images: Tensor) -> Action:
    """A call returns the logits."""

    @torch.inference_mode()
    def run() -> Tensor:
        return model(images).logits

    return run


def evaluation(sizes: Sizes) -> Iterator[Row]:
    """The student's forward pass, one image."""
    name = f"SegFormer-B0: evaluation, {sizes.height}×{2 * sizes.height}"
    ours = create_model("segformer_b0").eval()
    images = torch.rand(1, 3, sizes.height, 2 * sizes.height)
    theirs = published.huggingface_segformer(ours)
    actions = prediction(ours, images), prediction(theirs, images)
    times = in_turn(*actions, 3 * sizes.repeats)
    yield Row(name, "Hugging Face, SDPA", "time", *times, 2.5)


def drawn_scenes(folder: Path, sizes: Sizes, count: int = 3) -> SceneDataset:
    """A validation split of synthetic photographs with labels, read through a new cache."""
    size = {"height": sizes.pixels, "width": 2 * sizes.pixels}
    data = write_dataset(folder / "data", train=0, val=count, **size)
    scenes = open_split("cityscapes", data, "val", height=sizes.height)
    use_cache(scenes, folder / "cache")
    return scenes


def sample(sizes: Sizes) -> Iterator[Row]:
    """Image and label, ready for a batch."""
    with tempfile.TemporaryDirectory() as folder:
        scenes = drawn_scenes(Path(folder), sizes)

        def ours() -> None:
            for index in range(len(scenes)):
                scenes[index]

        def theirs() -> None:
            for sample in scenes.samples:
                assert sample.label is not None
                published.read_sample(sample.image, sample.label, sizes.height, CITYSCAPES.ignore)

        times = in_turn(ours, theirs, 3 * sizes.repeats)
    name = f"{len(scenes)} samples of {sizes.pixels}×{2 * sizes.pixels} from a warm cache"
    yield Row(name, "decoding the PNG", "time", *times, 50)


def label_maps(pixels: int) -> tuple[Tensor, Tensor]:
    """Prediction int64 and truth uint8 (1, H, W) in large patches of one class; a tenth differs."""
    generator = torch.Generator().manual_seed(0)
    outputs = CITYSCAPES.num_outputs
    coarse = torch.randint(0, outputs, (1, 1, 16, 32), generator=generator).float()
    truth = nn.functional.interpolate(coarse, (pixels, 2 * pixels))[:, 0].to(torch.uint8)
    noise = torch.randint(0, 10 * outputs, truth.shape, generator=generator)
    return torch.where(noise < outputs, noise, truth), truth


def count(sizes: Sizes, original: bool) -> Action:
    """A call counts one image."""
    predicted, truth = label_maps(sizes.pixels)
    if original:
        whole = truth.long()  # so does the published loader
        return partial(published.one_hot_counts, predicted, whole, CITYSCAPES.num_outputs)
    return partial(confusion_matrix, predicted, truth, CITYSCAPES.num_outputs)


def confusion(sizes: Sizes) -> Iterator[Row]:
    """Counts for the metric."""
    name = f"confusion matrix, {sizes.pixels}×{2 * sizes.pixels}"
    ours, theirs = (partial(count, sizes, original) for original in (False, True))
    times, peaks = apart(ours, theirs, 5 * sizes.repeats)
    yield Row(name, "one-hot maps", "time", *times, 20)
    yield Row(name, "one-hot maps", "memory", *peaks, 0.1)


def colour(sizes: Sizes) -> Iterator[Row]:
    """Label map to picture."""
    labels = label_maps(sizes.pixels)[1][0].numpy()
    palette = CITYSCAPES.palette.tolist()
    theirs = partial(published.colour_by_loop, labels, palette)
    times = in_turn(partial(colorize, labels, CITYSCAPES), theirs, 5 * sizes.repeats)
    name = f"colour, {sizes.pixels}×{2 * sizes.pixels}"
    yield Row(name, "a loop over classes", "time", *times, 10)


CASES = {case.__name__: case for case in (training, evaluation, sample, confusion, colour)}
