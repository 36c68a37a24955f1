"""Prediction, from Python:

from eval.predictor import Predictor

labels, colours = Predictor("student.safetensors")("street.jpg")
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import cli
from datasets import LAYOUTS
from datasets.images import read_photograph, upright
from datasets.transforms import require_height, resize_image, to_float
from errors import UserError
from eval.rendering import colorize, draw, save_png
from models import load_model, read_checkpoint
from models.onnx_file import OnnxModel
from progress import track

log = logging.getLogger(__name__)

Photo = Path | str | Image.Image | np.ndarray


class Predictor:
    """A network in eval mode, as a function from a photograph to its classes.

    Args:
        weights: a file or folder of any recognised kind, an ONNX file of ours, or a name of the
            Hugging Face hub.
        dataset: whose classes the network knows; its outputs are brought into their order.
        height: pixels of the shorter side that it sees; None for what it was trained with.

    Attributes:
        facts: what the weights say of their training: method, dataset, height, step, mean_iou.
        full_size: upsample the logits to the photograph's size, before the argmax.
        ignore: whether "ignore" is an answer.

    Raises UserError if the weights can't be read or have other classes, or the height is too small.
    """

    full_size = True
    ignore = False

    def __init__(
        self,
        weights: Path | str,
        *,
        dataset: str = "cityscapes",
        height: int | None = None,
        device: str = "auto",
    ) -> None:
        self.classes = LAYOUTS[dataset].classes
        is_onnx = Path(weights).suffix == ".onnx"
        # onnxruntime computes on the CPU here, and its outputs stay there.
        self.device = cli.find_device("cpu" if is_onnx else device)
        network: Any
        if is_onnx:
            network = OnnxModel(Path(weights)).eval()
            self.facts = network.facts
        else:
            checkpoint = read_checkpoint(weights)
            network = load_model(checkpoint).to(self.device)
            self.facts = checkpoint.facts
        network.reorder(self.classes.order(weights, network.num_classes, network.class_names))
        self.network: nn.Module = network
        self.height = self.facts.get("height", 512) if height is None else height
        require_height(self.height)

    def __call__(self, photo: Photo) -> tuple[np.ndarray, Image.Image]:
        """A path, a picture or an array (H, W, 3) uint8 -> train ids (H, W) uint8, and colours."""
        if isinstance(photo, Path | str):
            picture = read_photograph(Path(photo))
        elif isinstance(photo, np.ndarray):
            picture = Image.fromarray(photo)
        else:
            picture = upright(photo, Path("the picture")).convert("RGB")
        (labels,) = self.labels([picture])
        return labels, colorize(labels, self.classes)

    def labels(self, pictures: list[Image.Image]) -> list[np.ndarray]:
        """Train ids (H, W) uint8 of RGB pictures that have one size once they are resized."""
        pixels = torch.stack([to_pixels(picture, self.height) for picture in pictures])
        predictions = forward(self.network, pixels, self.device)
        outputs = self.classes.num_outputs if self.ignore else self.classes.num_classes
        label_maps = []
        for prediction, picture in zip(predictions, pictures, strict=True):
            if self.full_size:
                prediction = at_size(prediction, (picture.height, picture.width), outputs)
            if prediction.is_floating_point():
                prediction = prediction.max(dim=0).indices  # on a CPU 3 times faster than argmax
            label_maps.append(prediction.to(torch.uint8).cpu().numpy())
        return label_maps

    def predict(
        self, pictures: Iterable[tuple[Any, Image.Image]], batch_size: int
    ) -> Iterator[tuple[Any, Image.Image, np.ndarray]]:
        """Keys, pictures and their labels, in order; neighbours of one size go in one batch."""
        for batch in one_size_batches(pictures, batch_size, lambda item: item[1].size):
            labels = self.labels([picture for _, picture in batch])
            for (key, picture), label_map in zip(batch, labels, strict=True):
                yield key, picture, label_map


def to_pixels(image: Image.Image, height: int) -> Tensor:
    """(3, H, W) uint8, resized as in training."""
    return torch.from_numpy(np.array(resize_image(image, height))).permute(2, 0, 1)


def forward(model: nn.Module, images: Tensor, device: torch.device | str) -> Tensor:
    """uint8 images (B, 3, H, W), which become floats on the device -> logits (B, C, h, w)."""
    with torch.inference_mode():
        return model(to_float(images.to(device))).logits


def upsample(logits: Tensor, size: tuple[int, ...]) -> Tensor:
    """(B, C, h, w) -> (B, C, *size), bilinear without aligned corners."""
    if logits.dim() == 3:
        raise UserError("averages need logits; export the network again, without --argmax")
    logits = logits.contiguous(memory_format=torch.channels_last)  # faster, also for the argmax
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)


def at_size(prediction: Tensor, size: tuple[int, ...], classes: int) -> Tensor:
    """Logits (C, h, w) -> those of the first `classes` at another size; classes (h, w) likewise.

    ONNX files that were exported with the argmax inside give the latter.
    """
    if prediction.dim() == 3:
        return upsample(prediction[None, :classes], size)[0]
    # Classes, of an ONNX file with the argmax inside.
    resized = F.interpolate(prediction[None, None].float(), size, mode="nearest-exact")
    return resized[0, 0].to(prediction.dtype)


def one_size_batches(
    items: Iterable[Any], batch_size: int, size: Callable[[Any], Any]
) -> Iterator[list[Any]]:
    """Neighbours of one size, `batch_size` of them at most."""
    for _, group in groupby(items, key=size):
        while batch := list(islice(group, batch_size)):
            yield batch


def write_pictures(
    predictor: Predictor, targets: Mapping[Path, Mapping[str, Path]], alpha: float, batch_size: int
) -> list[Path]:
    """Read photographs ahead, predict them, and write pictures of them behind.

    `targets` are, for each photograph, the files of the kinds of picture (see `rendering.draw`).
    Returns those that can't be read, after a warning. Raises UserError if one can't be written.
    """
    failed = []

    def photographs(threads: ThreadPoolExecutor) -> Iterator[tuple[Path, Image.Image]]:
        for source, reading in ahead(threads, read_photograph, targets, 2 * batch_size + 4):
            try:
                photograph = reading.result()
            except UserError as error:
                log.warning("%s", error)
                failed.append(source)
            else:
                yield source, photograph

    def write(predicted: tuple[Path, Image.Image, np.ndarray]) -> None:
        source, photograph, labels = predicted
        for kind, path in targets[source].items():
            save_png(draw(kind, labels, predictor.classes, photograph, alpha), path)

    with ThreadPoolExecutor() as threads:
        predicted = predictor.predict(photographs(threads), batch_size)
        written = ahead(threads, write, predicted, 2 * batch_size + 8)
        for _, writing in track(written, "predicting", len(targets)):
            writing.result()
    return failed


def ahead(
    threads: ThreadPoolExecutor, work: Callable[[Any], Any], items: Iterable[Any], limit: int
) -> Iterator[tuple[Any, Any]]:
    """Each item with the Future of its work, in order, `limit` of them ahead.

    Without a limit, what waits for a slow disk would fill the memory.
    """
    waiting: deque[tuple[Any, Any]] = deque()
    for item in items:
        waiting.append((item, threads.submit(work, item)))
        if len(waiting) > limit:
            yield waiting.popleft()
    yield from waiting
