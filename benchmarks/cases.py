"""What is compared. Every case yields rows; both sides compute the same numbers (tests/test_benchmarks.py)."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from functools import partial
from importlib.util import find_spec
from io import StringIO
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from benchmarks import published
from benchmarks.measure import Row, Run, Sizes, apart, in_turn
from cli import find_device
from datasets import SceneDataset, open_split
from datasets.classes import CITYSCAPES
from datasets.synthetic import write_dataset
from eval.metrics import ConfusionMatrix
from eval.rendering import colorize
from models import create_model
from models.distillation import CrossSelectiveFusion, Distiller
from models.info import METHODS
from models.pyramid import settle

NUM_OUTPUTS = CITYSCAPES.num_outputs
NOT_INSTALLED = "not installed"


class Step:
    """A method's training step on random images, ours or the published way; a call makes one and returns its losses."""

    def __init__(
        self,
        method: str,
        other: bool,
        sizes: Sizes,
        device: str = "cpu",
        bf16: bool = False,
        compile_mode: str | None = None,
    ) -> None:
        torch.manual_seed(0)
        student, teacher = create_model("segformer_b0"), create_model("segformer_b2")
        channels = student.channels, teacher.channels
        fusion, alignment = CrossSelectiveFusion(*channels), METHODS[method](*channels)
        if other:
            student, teacher = (
                published.HuggingFaceSegFormer(network, "eager") for network in (student, teacher)
            )
        distiller = Distiller(
            student, CITYSCAPES.weights, teacher=teacher, fusion=fusion, alignment=alignment
        )
        self.distiller, self.other, self.bf16 = (
            distiller.to(device if other else find_device(device)),
            other,
            bf16,
        )
        if other:
            teacher.requires_grad_(True)
        else:
            settle(teacher, bf16=bf16)
        if compile_mode:
            distiller.compile(dynamic=False, mode=compile_mode)
        self.optimizer = AdamW(distiller.parameters(), lr=6e-5, fused=not other)
        h, w = sizes.height, 2 * sizes.height
        self.images = torch.rand(sizes.batch, 3, h, w).to(device)
        self.labels = torch.randint(
            0, NUM_OUTPUTS, (sizes.batch, h // 4, w // 4), dtype=torch.uint8
        ).to(device)

    def __call__(self) -> dict[str, Tensor]:
        if self.other:
            return published.published_step(
                self.distiller, self.optimizer, self.images, self.labels
            )
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.images.device.type, torch.bfloat16, enabled=self.bf16):
            losses = self.distiller(self.images, self.labels)
        torch.stack(list(losses.values())).sum().backward()
        self.optimizer.step()
        return losses


def training(sizes: Sizes) -> Iterator[Row]:
    """A training step of each method, in time and memory."""
    for method in METHODS:
        name = f"{method}: training step, batch {sizes.batch}, {sizes.height}×{2 * sizes.height}"
        if not find_spec("transformers"):
            yield Row(name, "published way", note=NOT_INSTALLED)
            continue
        ours, theirs = (partial(Step, method, other) for other in (False, True))
        times, peaks = apart(ours, theirs, sizes, sizes.repeats)
        yield Row(name, "published way", "time", *times, 4)
        yield Row(name, "published way", "memory", *peaks, 0.4)


def prediction(model: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    """A call returns the logits."""

    @torch.inference_mode()
    def run() -> Tensor:
        output = model(images)
        return output if isinstance(output, Tensor) else output.logits

    return run


def evaluation(sizes: Sizes) -> Iterator[Row]:
    """The student's forward pass, one image."""
    name = f"SegFormer-B0: evaluation, {sizes.height}×{2 * sizes.height}"
    ours = create_model("segformer_b0").eval()
    images = torch.rand(1, 3, sizes.height, 2 * sizes.height)
    peers: dict[str, tuple[str, Callable[[], nn.Module]]] = {
        "transformers": (
            "Hugging Face, SDPA",
            partial(published.HuggingFaceSegFormer, ours, "sdpa"),
        ),
        "segmentation_models_pytorch": (
            "segmentation_models.pytorch",
            partial(published.smp_segformer, NUM_OUTPUTS),
        ),
    }
    for package, (peer, build) in peers.items():
        if not find_spec(package):
            yield Row(name, peer, note=NOT_INSTALLED)
            continue
        theirs = build().eval()
        times = in_turn(prediction(ours, images), prediction(theirs, images), 3 * sizes.repeats)
        yield Row(name, peer, "time", *times, 2.5)


def drawn_scenes(folder: Path, sizes: Sizes, count: int = 3) -> SceneDataset:
    """A validation split of drawn photographs with labels, read through a new cache."""
    with redirect_stderr(StringIO()):
        write_dataset(
            folder / "data", train=0, val=count, height=sizes.pixels, width=2 * sizes.pixels
        )
        return open_split(
            "cityscapes", folder / "data", "val", height=sizes.height, cache_dir=folder / "cache"
        )


def sample(sizes: Sizes) -> Iterator[Row]:
    """Image and label, ready for a batch."""
    with tempfile.TemporaryDirectory() as folder:
        scenes = drawn_scenes(Path(folder), sizes)
        paths = [(sample.image, sample.label) for sample in scenes.samples]

        def ours() -> None:
            for index in range(len(scenes)):
                scenes[index]

        def theirs() -> None:
            for image, label in paths:
                assert label is not None
                published.read_sample(image, label, sizes.height, CITYSCAPES.ignore)

        name = f"sample of {sizes.pixels}×{2 * sizes.pixels} from a warm cache"
        times = in_turn(ours, theirs, 3 * sizes.repeats)
        yield Row(name, "decoding the PNG", "time", *times, 50, items=len(scenes))


def label_maps(pixels: int) -> tuple[Tensor, Tensor]:
    """Prediction int64 and truth uint8 (1, H, W) in large patches of one class, as scenes have; a tenth differs."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, NUM_OUTPUTS, (1, 1, 16, 32), generator=generator).float()
    truth = nn.functional.interpolate(coarse, (pixels, 2 * pixels))[:, 0].to(torch.uint8)
    noise = torch.randint(0, 10 * NUM_OUTPUTS, truth.shape, generator=generator)
    return torch.where(noise < NUM_OUTPUTS, noise, truth), truth


def count_ours(sizes: Sizes) -> Run:
    """A call counts one image."""
    predicted, truth = label_maps(sizes.pixels)
    matrix = ConfusionMatrix(CITYSCAPES)
    return lambda: matrix.update(predicted, truth)


def count_theirs(sizes: Sizes) -> Run:
    """A call counts one image."""
    predicted, truth = label_maps(sizes.pixels)
    truth = truth.long()  # so does the published loader
    return lambda: published.one_hot_counts(predicted, truth, NUM_OUTPUTS)


def confusion(sizes: Sizes) -> Iterator[Row]:
    """Counts for the metric."""
    name, other = f"confusion matrix, {sizes.pixels}×{2 * sizes.pixels}", "one-hot maps"
    times, peaks = apart(count_ours, count_theirs, sizes, 5 * sizes.repeats)
    yield Row(name, other, "time", *times, 20)
    yield Row(name, other, "memory", *peaks, 0.1)


def colour(sizes: Sizes) -> Iterator[Row]:
    """Label map to picture."""
    labels = label_maps(sizes.pixels)[1][0].numpy()
    palette = CITYSCAPES.palette.tolist()
    times = in_turn(
        lambda: colorize(labels, CITYSCAPES),
        lambda: published.colour_by_loop(labels, palette),
        5 * sizes.repeats,
    )
    yield Row(f"colour, {sizes.pixels}×{2 * sizes.pixels}", "loop over classes", "time", *times, 10)


CASES: dict[str, Callable[[Sizes], Iterator[Row]]] = {
    "training": training,
    "evaluation": evaluation,
    "sample": sample,
    "confusion": confusion,
    "colour": colour,
}
