"""Run a model over a split, to score it or to render it; files are read and written meanwhile."""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from torch import Tensor, nn

from datasets import SceneDataset
from datasets.classes import Encoding
from datasets.loading import Batch, evaluation_batches
from datasets.transforms import to_float
from errors import UserError
from eval import rendering
from eval.metrics import ConfusionMatrix
from files import atomic_write, make_folder

T = TypeVar("T")
R = TypeVar("R")
Protocol = Literal["paper", "full"]


@dataclass
class Evaluation:
    """Counts of a split, of each of its images by name, and of each of its conditions if it has any.

    `protocol` says how maps were compared (see `evaluate`), `images` how many there were.
    """

    protocol: Protocol
    images: int
    counts: ConfusionMatrix
    per_image: dict[str, ConfusionMatrix] = field(default_factory=dict)
    conditions: "dict[str, Evaluation]" = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The scores: IoUs in 0..1, None for a class that does not occur."""
        result: dict[str, Any] = {
            "protocol": self.protocol,
            "images": self.images,
        } | self.counts.scores()
        if self.conditions:
            result["conditions"] = {name: part.as_json() for name, part in self.conditions.items()}
        return result

    def details(self) -> dict[str, Any]:
        """What `--json` has beyond the scores.

        `confusion`: pixels, a row for each true class, a column for each predicted one, "ignore" last.
        `per_image`: by name the mean IoU over the classes that occur in the image, None where no pixel counts.
        """
        return {
            "confusion": self.counts.counts[: self.counts.classes.num_classes].tolist(),
            "per_image": {
                name: matrix.scores()["mean_iou"] for name, matrix in self.per_image.items()
            },
        }


def evaluate(
    model: nn.Module,
    dataset: SceneDataset,
    *,
    protocol: Protocol = "paper",
    batch_size: int = 1,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> Evaluation:
    """Score `model` on every image of `dataset`, overall and per condition.

    `paper`: argmax of the quarter-size logits, ignore output included, against the quarter-size
    label. `full`: the logits of the real classes are upsampled (bilinear) to the label file's own
    size before the argmax, as cityscapesScripts scores a submission.
    Among several processes (torch.distributed) each takes its share of the images and all get the result.
    The model is back in its mode (train or eval) afterwards.
    Raises UserError if an image has no label, or the network gives NaN or infinity.
    """
    missing = next((sample.image for sample in dataset.samples if sample.label is None), None)
    if missing is not None:
        raise UserError(f"{missing} has no label to score against; choose a labelled --subset")
    classes = dataset.classes
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    matrices = [ConfusionMatrix(classes, device) for _ in dataset.samples]
    spoilt = torch.zeros(
        (), dtype=torch.int64, device=device
    )  # batches; NaN would count as the first class
    batches = evaluation_batches(
        dataset,
        batch_size=batch_size,
        num_workers=num_workers,
        pin_memory=torch.device(device).type == "cuda",
        rank=rank,
        world_size=world_size,
    )
    with (
        evaluating(model),
        ThreadPoolExecutor() as readers,
        progress_line("evaluating", len(dataset), progress) as advance,
    ):
        for batch in batches:
            indices = batch.indices.tolist()
            if protocol == "full":  # decoded while the model computes
                full_labels = [readers.submit(dataset.full_label, index) for index in indices]
            logits = forward(model, batch, device)
            spoilt += ~logits.isfinite().all()
            labels = batch.labels.to(device, non_blocking=True)
            for row, index in enumerate(indices):
                prediction, label = logits[row], labels[row]
                if protocol == "full":
                    label = torch.as_tensor(full_labels[row].result()).to(device, non_blocking=True)
                    prediction = upsample(prediction[: classes.num_classes], label.shape)
                matrices[index].update(prediction[None], label[None])
            advance(len(indices))
    counts = torch.stack([matrix.counts for matrix in matrices])
    if world_size > 1:
        dist.all_reduce(counts)
        dist.all_reduce(spoilt)
    if spoilt:
        raise UserError(
            "the network's outputs are NaN or infinite: its training failed; take earlier weights"
        )
    counts = counts.cpu()  # once, instead of for every image
    if not counts[:, : classes.num_classes].any():
        raise UserError(
            "every label pixel of this split is ignored, as in test splits; choose a labelled --subset"
        )

    def summed(indices: list[int]) -> Evaluation:
        rows = {index: ConfusionMatrix(classes, counts=counts[index]) for index in indices}
        per_image = {dataset.samples[index].name: matrix for index, matrix in rows.items()}
        return Evaluation(
            protocol,
            len(indices),
            ConfusionMatrix(classes, counts=counts[indices].sum(0)),
            per_image,
        )

    total = summed(list(range(len(dataset))))
    names = [sample.condition for sample in dataset.samples]
    for condition in dict.fromkeys(name for name in names if name is not None):
        total.conditions[condition] = summed(
            [index for index, name in enumerate(names) if name == condition]
        )
    return total


def render(
    model: nn.Module,
    dataset: SceneDataset,
    output_dir: Path,
    *,
    size: Literal["logits", "full"] = "logits",
    overlay: float | None = None,
    ids: Encoding | None = None,
    flat: bool = False,
    batch_size: int = 1,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> list[Path]:
    """Write a PNG per image under `output_dir`, at the path the image has in its data set, or `flat` by its name.

    Colours by the palette at the logits' size, or upsampled before the argmax to the photograph's
    (`size="full"`, and always for `overlay`, the share of colour in the blend, and `ids`).
    `ids`: one channel of train ids or label ids instead of colours, chosen among the real classes alone: benchmark
    servers know no ignore.
    Returns the files written. Raises UserError if a file would land outside `output_dir` or on an
    image of the data set.
    """
    classes = dataset.classes
    targets = output_paths(dataset, output_dir, flat)
    full = size == "full" or overlay is not None or ids is not None

    def write(found: tuple[int, np.ndarray, Image.Image | None]) -> None:
        index, labels, photograph = found
        if ids == "train_ids":
            picture = Image.fromarray(labels)
        else:
            picture = (rendering.to_label_ids if ids else rendering.colorize)(labels, classes)
        if overlay is not None and photograph is not None:
            picture = rendering.overlay(photograph, picture, overlay)
        save_png(picture, targets[index])

    batches = evaluation_batches(
        dataset,
        batch_size=batch_size,
        num_workers=num_workers,
        pin_memory=torch.device(device).type == "cuda",
    )

    def predicted(
        threads: ThreadPoolExecutor,
    ) -> Iterator[tuple[int, np.ndarray, Image.Image | None]]:
        for batch in batches:
            indices = batch.indices.tolist()
            if full:
                photographs = [threads.submit(dataset.photograph, index) for index in indices]
            logits = forward(model, batch, device)
            if ids is not None:
                logits = logits[:, : classes.num_classes]
            for row, index in enumerate(indices):
                prediction, photograph = logits[row], None
                if full:
                    photograph = photographs[row].result()
                    prediction = upsample(prediction, (photograph.height, photograph.width))
                yield index, prediction.max(dim=0).indices.to(torch.uint8).cpu().numpy(), photograph

    with (
        evaluating(model),
        ThreadPoolExecutor() as threads,
        progress_line("rendering", len(dataset), progress) as advance,
    ):
        for _ in ahead(threads, write, predicted(threads), 2 * batch_size + 8):
            advance(1)
    return targets


def ahead(
    threads: ThreadPoolExecutor, work: Callable[[T], R], items: Iterable[T], limit: int
) -> Iterator[R]:
    """`map`, in order, with at most `limit` results waiting: a slow disk must not fill the memory."""
    waiting: deque[Future[R]] = deque()
    for item in items:
        waiting.append(threads.submit(work, item))
        if len(waiting) > limit:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def forward(model: nn.Module, batch: Batch, device: torch.device | str) -> Tensor:
    """Logits (B, C, h, w) of a batch of uint8 images, which become floats on the device."""
    with torch.inference_mode():
        return model(to_float(batch.images.to(device, non_blocking=True))).logits


def upsample(logits: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Logits (C, h, w), bilinear without aligned corners, to (C, *size)."""
    rows = logits[None].contiguous(memory_format=torch.channels_last)  # faster, also for the argmax
    return F.interpolate(rows, tuple(size), mode="bilinear", align_corners=False)[0]


def output_paths(dataset: SceneDataset, output_dir: Path, flat: bool = False) -> list[Path]:
    """One .png in `output_dir` per sample, mirroring the data set's paths or `flat`; UserError if not."""
    root = output_dir.resolve()
    paths = [Path(sample.name).with_suffix(".png") for sample in dataset.samples]
    targets = [root / (path.name if flat else path) for path in paths]
    images = {sample.image.resolve() for sample in dataset.samples}
    for target in targets:
        if not target.resolve().is_relative_to(root):
            raise UserError(f"{target} leaves --output-dir {output_dir}; choose another folder")
        if target.resolve() in images:
            raise UserError(f"{target} is an input image; choose another --output-dir")
    if len(set(targets)) < len(targets):
        twice, _ = Counter(target.name for target in targets).most_common(1)[0]
        raise UserError(
            f"two images would both become {twice}; rename one of them, or leave --flat out"
        )
    return targets


def save_png(picture: Image.Image, path: Path) -> None:
    """Save in one step, so that an interrupted run leaves no half file. UserError if it cannot."""
    make_folder(path.parent)
    with atomic_write(path) as aside:
        picture.save(aside, format="PNG")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, the model's own mode afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


class RateColumn(ProgressColumn):
    """Images a second over the last ones."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f} images/s", style="progress.data.speed")


@contextmanager
def progress_line(
    title: str, total: int | None, show: bool = True
) -> Iterator[Callable[[int], None]]:
    """A line on stderr with rate and, if `total` is known, time left; call what it yields with the images just done."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        RateColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    line = Progress(*columns, console=Console(stderr=True), disable=not show, redirect_stdout=False)
    with line:
        task = line.add_task(title, total=total)
        yield lambda images: line.advance(task, images)
