"""Segment any photographs: files, folders, patterns; by our weights, a Hugging Face folder or an ONNX file.

    python eval/predict.py street.jpg --weights outputs/TransKDBase_cityscapes/student.safetensors --output-dir out
    python eval/predict.py photos/ 'drive/*.png' --weights student.onnx --output-dir out --kinds color label_ids

Each kind of picture has its folder: out/color/street.png, out/overlay/street.png. Pictures have the photograph's size,
and its name; below a folder or a pattern they keep their subfolders.
    color          the classes by the data set's palette
    overlay        the same, blended with the photograph
    label_ids      one channel, the label ids that benchmark servers take
    side_by_side   photograph, overlay and classes in a row, with a legend of the classes that were found
"""

import glob
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Annotated, Literal, TypeVar

if __package__ in (None, ""):  # run from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image, ImageOps
from torch import Tensor

from cli import UserError, find_device, run
from datasets import DATASETS, find_layout
from datasets.classes import Classes
from datasets.transforms import resize_image, to_float
from eval import rendering
from eval.inference import progress_line, save_png, upsample
from eval.options import claim_folder
from models import load_model
from models.export import OnnxNetwork

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
T = TypeVar("T")
R = TypeVar("R")


@dataclass
class Options:
    """Segment photographs of any size and write the result as pictures."""

    inputs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Photographs, folders of them, or patterns such as 'drive/**/*.jpg'."""
    weights: Path
    """A checkpoint (ours or a released one), a Hugging Face folder, or an ONNX file that models.export wrote."""
    output_dir: Path
    """Where the pictures go."""
    kinds: tuple[Literal["color", "overlay", "label_ids", "side_by_side"], ...] = ("color", "overlay")
    """Which pictures to write."""
    alpha: float = 0.5
    """Share of the colours in an overlay."""
    dataset: Literal[DATASETS] = "cityscapes"  # type: ignore[valid-type]
    """The data set whose classes the network knows: names, colours and label ids."""
    height: int = 512
    """Photographs are resized so that their shorter side has this many pixels before the network sees them."""
    batch_size: int = 1
    """Photographs of one size at once; the result does not depend on it."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto takes a GPU if there is one. ONNX files run on the CPU."""


Network = Callable[[Tensor], Tensor]  # images (B, 3, H, W), RGB in [0, 1] -> logits (B, C, h, w) or classes (B, h, w)


def main(options: Options) -> None:
    """Predict."""
    if options.batch_size < 1 or options.height < 32:
        raise UserError("--batch-size must be at least 1, --height at least 32")
    if not options.inputs:
        raise UserError("name what to predict: photographs, folders or patterns")
    if not 0 <= options.alpha <= 1:
        raise UserError(f"--alpha {options.alpha} is no share of colour; give 0 to 1")
    classes = find_layout(options.dataset).classes
    photographs = find_photographs(options.inputs)
    targets = find_targets(photographs, options)
    network = open_network(options.weights, classes, options.device)
    claim_folder(options.output_dir)
    failed: list[Path] = []

    def read(source: Path) -> tuple[Path, Image.Image, Tensor] | None:
        try:
            with Image.open(source) as file:
                image = ImageOps.exif_transpose(file).convert("RGB")
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            print(f"warning: {source} can't be read ({error})", file=sys.stderr)
            failed.append(source)
            return None
        pixels = np.array(resize_image(image, options.height))
        return source, image, torch.from_numpy(pixels).permute(2, 0, 1)

    def write(source: Path, photograph: Image.Image, labels: np.ndarray) -> None:
        for kind, path in targets[source].items():
            save_png(picture(kind, photograph, labels, classes, options.alpha), path)

    with (
        ThreadPoolExecutor() as threads,
        progress_line("predicting", len(photographs)) as advance,
        torch.inference_mode(),
    ):
        written: deque[Future[None]] = deque()
        read_ahead = ahead(threads, read, photographs, 2 * options.batch_size + 4)
        for batch in batches(read_ahead, options.batch_size):
            pixels = torch.stack([x for _, _, x in batch])
            for (source, photograph, _), prediction in zip(batch, network(to_float(pixels)), strict=True):
                labels = labels_at(prediction, (photograph.height, photograph.width), classes)
                written.append(threads.submit(write, source, photograph, labels))
            while len(written) > 2 * options.batch_size + 8:  # a slow disk must not fill the memory
                written.popleft().result()
            advance(len(batch))
        for future in written:
            future.result()
    if failed:
        raise UserError(
            f"{len(failed)} of {len(photographs)} photographs can't be read: {failed[0]}" + " …" * (len(failed) > 1)
        )
    print(f"{len(photographs)} photographs: {', '.join(options.kinds)} in {options.output_dir}")


def open_network(weights: Path, classes: Classes, device_name: str) -> Network:
    """The network behind a path, whatever its kind, in eval mode.

    Raises:
        UserError: it is none, or it has other classes.
    """
    network: Network
    if weights.suffix == ".onnx":
        onnx = OnnxNetwork(weights)
        network, outputs = onnx, len(onnx.class_names)
    else:
        device = find_device(device_name)
        model = load_model(weights).to(device)
        network, outputs = (lambda images: model(images.to(device)).logits), model.num_classes
    if outputs not in (classes.num_classes, classes.num_outputs):
        raise UserError(
            f"{weights} predicts {outputs} classes, {classes.name} has {classes.num_classes}; name its --dataset"
        )
    return network


def find_photographs(inputs: Iterable[str]) -> dict[Path, Path]:
    """Every photograph that the inputs mean, and its path below the folder or pattern that it was found by.

    Raises:
        UserError: an input means none.
    """
    found: dict[Path, Path] = {}
    for name in inputs:
        path = Path(name)
        if path.is_file():
            new = {path: Path(path.name)}
        elif path.is_dir():
            new = {file: file.relative_to(path) for file in sorted(path.rglob("*")) if is_photograph(file)}
        else:
            parts = path.parts
            fixed = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
            base = Path(*parts[:fixed])
            matches = map(Path, sorted(glob.glob(name, recursive=True)))  # noqa: PTH207 (an absolute pattern is fine)
            new = {file: file.relative_to(base) for file in matches if is_photograph(file)}
        if not new:
            raise UserError(f"{name} is no photograph and no folder or pattern of some ({', '.join(SUFFIXES)})")
        found = new | found
    return found


def is_photograph(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.is_file()


def find_targets(photographs: dict[Path, Path], options: Options) -> dict[Path, dict[str, Path]]:
    """For each photograph the file of every kind; UserError if two share one, or one is a photograph."""
    targets: dict[Path, dict[str, Path]] = {
        source: {kind: options.output_dir / kind / name.with_suffix(".png") for kind in options.kinds}
        for source, name in photographs.items()
    }
    owners: dict[Path, Path] = {}
    inputs = {source.resolve() for source in photographs}
    for source, files in targets.items():
        for path in files.values():
            if path in owners:
                raise UserError(f"{owners[path]} and {source} would both become {path}; predict them one by one")
            if path.resolve() in inputs:
                raise UserError(f"{path} is an input; choose another --output-dir")
            owners[path] = source
    return targets


def ahead(threads: ThreadPoolExecutor, work: Callable[[T], R], items: Iterable[T], limit: int) -> Iterator[R]:
    """`map`, in order, with at most `limit` results waiting."""
    waiting: deque[Future[R]] = deque()
    for item in items:
        waiting.append(threads.submit(work, item))
        if len(waiting) > limit:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


Read = tuple[Path, Image.Image, Tensor]


def batches(photographs: Iterable[Read | None], size: int) -> Iterator[list[Read]]:
    """Neighbours of one size, at most `size` of them; those that could not be read are left out."""
    readable = (photograph for photograph in photographs if photograph is not None)
    for _, group in groupby(readable, key=lambda photograph: photograph[2].shape):
        batch: list[Read] = []
        for photograph in group:
            batch.append(photograph)
            if len(batch) == size:
                yield batch
                batch = []
        if batch:
            yield batch


def labels_at(prediction: Tensor, size: tuple[int, int], classes: Classes) -> np.ndarray:
    """Classes (H, W) from logits (C, h, w), among the real classes, or from a map of classes (h, w)."""
    if prediction.dim() == 3:
        labels = upsample(prediction[: classes.num_classes], size).argmax(0)
    else:
        labels = F.interpolate(prediction[None, None].float(), size, mode="nearest-exact")[0, 0]
    return labels.to(torch.uint8).cpu().numpy()


def picture(kind: str, photograph: Image.Image, labels: np.ndarray, classes: Classes, alpha: float) -> Image.Image:
    """One kind of picture."""
    if kind == "label_ids":
        return rendering.to_label_ids(labels, classes)
    colors = rendering.colorize(labels, classes)
    if kind == "color":
        return colors
    blend = rendering.overlay(photograph, colors, alpha)
    if kind == "overlay":
        return blend
    row = rendering.side_by_side([("photograph", photograph), ("overlay", blend), ("classes", colors)])
    return rendering.stack([row, rendering.legend(classes, width=row.width, present=np.unique(labels).tolist())])


if __name__ == "__main__":
    run(main, Options)
