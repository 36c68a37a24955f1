"""Segment any photographs and videos: files, folders, patterns; by our weights, a Hugging Face folder or an ONNX file.

    python eval/predict.py street.jpg --weights outputs/TransKDBase_cityscapes/student.safetensors --output-dir out
    python eval/predict.py photos/ 'drive/*.png' --weights student.onnx --output-dir out --kinds color label_ids
    python eval/predict.py drive.mp4 --weights student.safetensors --output-dir out --kinds side_by_side

Each kind of picture has its folder: out/color/street.png, out/overlay/street.png. Pictures have the photograph's size,
and its name; below a folder or a pattern they keep their subfolders.
    color          the classes by the data set's palette
    overlay        the same, blended with the photograph
    label_ids      one channel, the label ids that Cityscapes' server takes
    side_by_side   photograph, overlay and classes in a row, with a legend of the classes that were found

A video becomes an MP4 file of its size and frame rate, without sound: out/overlay/drive.mp4. Of its label ids each
frame becomes a file: out/label_ids/drive.mp4/000000.png. This needs PyAV: pip install -r requirements-video.txt.
"""

import glob
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

if __package__ in (None, ""):  # run from any folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image
from torch import Tensor

from cli import find_device, run
from datasets import DATASETS, find_layout
from datasets.classes import Classes
from datasets.samples import files_below
from datasets.scenes import read_image
from datasets.transforms import resize_image, to_float
from errors import UserError
from eval import rendering, video
from eval.inference import ahead, progress_line, save_png, upsample
from eval.options import claim_folder, warn_of_height
from models import load_model
from models.export import OnnxNetwork

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
Kind = Literal["color", "overlay", "label_ids", "side_by_side"]
T = TypeVar("T")
R = TypeVar("R")


@dataclass
class Options:
    """Segment photographs and videos of any size and write the result as pictures and videos."""

    inputs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Photographs, videos, folders of them, or patterns such as 'drive/**/*.jpg'."""
    weights: Path
    """A checkpoint (ours or a released one), a Hugging Face folder, or an ONNX file that models.export wrote."""
    output_dir: Path
    """Where the pictures go."""
    kinds: tuple[Kind, ...] = ("color", "overlay")
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


Network = Callable[
    [Tensor], Tensor
]  # images (B, 3, H, W), uint8 RGB -> logits (B, C, h, w) or classes (B, h, w)
Read = tuple[
    Any, Image.Image, Tensor
]  # a photograph's path or a frame's number, the picture, what the network sees
Predicted = tuple[Any, Image.Image, np.ndarray]  # the same with classes (H, W)


def main(options: Options) -> None:
    """Predict."""
    if options.batch_size < 1 or options.height < 32:
        raise UserError("--batch-size must be at least 1, --height at least 32")
    if not options.inputs or not all(options.inputs):
        raise UserError("name what to predict: photographs, videos, folders or patterns")
    if not options.kinds:
        raise UserError("--kinds names no kind of picture; name one, or leave it out")
    if not 0 <= options.alpha <= 1:
        raise UserError(f"--alpha {options.alpha} is no share of colour; give 0 to 1")
    if options.alpha != Options.alpha and not {"overlay", "side_by_side"} & {*options.kinds}:
        raise UserError(
            f"--alpha {options.alpha} is for overlays; add such a kind, or leave it out"
        )
    classes = find_layout(options.dataset).classes
    inputs = find_inputs(options.inputs, options.output_dir)
    photographs = [source for source in inputs if not is_video(source)]
    videos = [source for source in inputs if is_video(source)]
    if videos:
        video.import_av()
    targets = find_targets(inputs, options)
    network = open_network(options.weights, classes, options.device)
    warn_of_height(options.weights, options.height)
    claim_folder(options.output_dir)
    failed: list[Path] = []

    def warn(source: Path, problem: str) -> None:
        print(f"warning: {problem}", file=sys.stderr)
        failed.append(source)

    def read(source: Path) -> Read | tuple[Path, UserError]:
        try:
            image = read_image(source, upright=True)
        except UserError as error:
            return source, error
        return source, image, to_pixels(image, options.height)

    def readable(pictures: Iterable[Read | tuple[Path, UserError]]) -> Iterator[Read]:
        for found in pictures:
            if len(found) == 2:
                warn(found[0], str(found[1]))  # here, not in a thread: in the inputs' order
            else:
                yield found

    def write(predicted: Predicted) -> None:
        source, photograph, labels = predicted
        for kind, path in targets[source].items():
            save_png(picture(kind, photograph, labels, classes, options.alpha), path)

    if photographs:
        with (
            ThreadPoolExecutor() as threads,
            progress_line("predicting", len(photographs)) as advance,
            torch.inference_mode(),
        ):
            read_ahead = ahead(threads, read, photographs, 2 * options.batch_size + 4)
            predicted = predict(network, readable(read_ahead), options.batch_size, classes)
            for _ in ahead(threads, write, predicted, 2 * options.batch_size + 8):
                advance(1)
    for source in videos:
        try:
            predict_video(source, targets[source], network, classes, options)
        except video.UnreadableError as error:
            warn(source, f"{source} cannot be read as a video: {error}")
    if failed:
        raise UserError(
            f"{len(failed)} of {len(inputs)} inputs can't be read: {failed[0]}"
            + " …" * (len(failed) > 1)
        )
    counts = {"photographs": len(photographs), "videos": len(videos)}
    done = ", ".join(
        f"{count} {name.removesuffix('s') if count == 1 else name}"
        for name, count in counts.items()
        if count
    )
    print(f"{done}: {', '.join(options.kinds)} in {options.output_dir}")


def predict_video(
    source: Path, targets: dict[str, Path], network: Network, classes: Classes, options: Options
) -> None:
    """Write a video for each kind, and label ids as a PNG for each frame.

    Raises:
        video.UnreadableError: it can't be read; no video has been written.
        UserError: the result can't be written.
    """
    opened = video.Video(source)

    def prepare(frame: tuple[int, Image.Image]) -> Read:
        return *frame, to_pixels(frame[1], options.height)

    def paint(predicted: Predicted) -> dict[str, Image.Image]:
        _, frame, labels = predicted
        # a legend of the classes in this frame would change the picture's size from frame to frame
        present = range(classes.num_classes)
        return {
            kind: picture(kind, frame, labels, classes, options.alpha, present) for kind in targets
        }

    with (
        ThreadPoolExecutor() as threads,
        progress_line(source.name, opened.about) as advance,
        torch.inference_mode(),
        ExitStack() as stack,
    ):
        files = {
            kind: stack.enter_context(video.writing_video(path, opened.rate))
            for kind, path in targets.items()
            if kind != "label_ids"
        }
        read_ahead = ahead(threads, prepare, enumerate(opened.frames()), options.batch_size + 4)
        predicted = predict(network, read_ahead, options.batch_size, classes)
        index = -1
        for index, pictures in enumerate(ahead(threads, paint, predicted, 4)):
            for kind, frame in pictures.items():
                if kind in files:
                    files[kind].add(frame)
                else:
                    save_png(frame, targets[kind] / f"{index:06}.png")
            advance(1)
        if index < 0:
            raise video.UnreadableError("no frame in it")
        for old in targets["label_ids"].glob("[0-9]*.png") if "label_ids" in targets else ():
            if old.stem.isdecimal() and int(old.stem) > index:
                old.unlink()  # of a longer video that was there before
    if opened.count is not None and index + 1 < opened.count:
        print(
            f"warning: {source} ends after {index + 1} of its {opened.count} frames",
            file=sys.stderr,
        )


def predict(
    network: Network, pictures: Iterable[Read], batch_size: int, classes: Classes
) -> Iterator[Predicted]:
    """Each picture, in order, with its classes at its own size."""
    for batch in batches(pictures, batch_size):
        pixels = torch.stack([x for _, _, x in batch])
        for (source, image, _), prediction in zip(batch, network(pixels), strict=True):
            yield source, image, labels_at(prediction, (image.height, image.width), classes)


def to_pixels(image: Image.Image, height: int) -> Tensor:
    """(3, H, W) uint8, resized as in training."""
    return torch.from_numpy(np.array(resize_image(image, height))).permute(2, 0, 1)


def open_network(weights: Path, classes: Classes, device_name: str) -> Network:
    """The network behind a path, whatever its kind, in eval mode.

    Raises:
        UserError: it is none, or it has other classes.
    """
    if weights.suffix.lower() == ".onnx":
        if device_name not in ("auto", "cpu"):
            raise UserError(
                f"--device {device_name}: ONNX files run on the CPU; leave it out, or name other weights"
            )
        onnx = OnnxNetwork(weights)
        classes.require(weights, len(onnx.class_names), onnx.class_names)
        return lambda pixels: onnx(to_float(pixels))
    device = find_device(device_name)
    model = load_model(weights).to(device)
    classes.require(weights, model.num_classes, model.class_names)
    return lambda pixels: (
        model(to_float(pixels.to(device))).logits
    )  # bytes travel, floats are made there


def find_inputs(inputs: Iterable[str], output_dir: Path) -> dict[Path, Path]:
    """Every photograph and video that the inputs mean, and its path below the folder or pattern it was found by.

    Pictures in `output_dir` that an earlier call made are not taken for photographs of a folder around it.

    Raises:
        UserError: an input means none.
    """
    made = [(output_dir / kind).resolve() for kind in get_args(Kind)]

    def below(base: Path, files: Iterable[Path]) -> dict[Path, Path]:
        outside = [folder for folder in made if not base.resolve().is_relative_to(folder)]
        return {
            file: file.relative_to(base)
            for file in sorted(files)
            if is_input(file)
            and not any(file.resolve().is_relative_to(folder) for folder in outside)
        }

    found: dict[Path, Path] = {}
    for name in inputs:
        path = Path(name)
        if path.is_file():
            new = {path: Path(path.name)}
        elif path.is_dir():
            new = below(path, files_below(path))
        else:
            parts = path.parts
            fixed = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
            matches = glob.glob(name, recursive=True)  # noqa: PTH207 (an absolute pattern is fine)
            new = below(Path(*parts[:fixed]), map(Path, matches))
        if not new:
            kinds = ", ".join(SUFFIXES + video.SUFFIXES)
            there = (
                "there is no"
                if not path.exists()
                else "no photograph or video in"
                if path.is_dir()
                else "can't take"
            )
            raise UserError(
                f"{there} {name}; name photographs, videos, or a folder or pattern of some ({kinds})"
            )
        found |= {file: name for file, name in new.items() if file not in found}
    return found


def is_input(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES + video.SUFFIXES and path.is_file()


def is_video(path: Path) -> bool:
    return path.suffix.lower() in video.SUFFIXES


def find_targets(inputs: dict[Path, Path], options: Options) -> dict[Path, dict[str, Path]]:
    """For each input the file of every kind; UserError if two share one, or one is an input."""

    def target(kind: str, source: Path, name: Path) -> Path:
        if not is_video(source):
            name = name.with_suffix(".png")
        elif kind != "label_ids":  # which are a folder of PNG files, called as the video
            name = name.with_suffix(".mp4")
        return options.output_dir / kind / name

    targets: dict[Path, dict[str, Path]] = {
        source: {kind: target(kind, source, name) for kind in options.kinds}
        for source, name in inputs.items()
    }
    owners: dict[Path, Path] = {}
    resolved = {source.resolve() for source in inputs}
    for source, files in targets.items():
        for path in files.values():
            if path in owners:
                raise UserError(
                    f"{owners[path]} and {source} would both become {path}; give each an --output-dir of its own"
                )
            if path.resolve() in resolved:
                raise UserError(f"{path} is an input; choose another --output-dir")
            owners[path] = source
    return targets


def batches(pictures: Iterable[Read], size: int) -> Iterator[list[Read]]:
    """Neighbours of one size, at most `size` of them."""
    for _, group in groupby(pictures, key=lambda picture: picture[2].shape):
        while batch := list(islice(group, size)):
            yield batch


def labels_at(prediction: Tensor, size: tuple[int, int], classes: Classes) -> np.ndarray:
    """Classes (H, W) from logits (C, h, w), among the real classes, or from a map of classes (h, w)."""
    if prediction.dim() == 3:
        labels = (
            upsample(prediction[: classes.num_classes], size).max(0).indices
        )  # faster than argmax
    else:
        labels = F.interpolate(prediction[None, None].float(), size, mode="nearest-exact")[0, 0]
    return labels.to(torch.uint8).cpu().numpy()


def picture(
    kind: str,
    photograph: Image.Image,
    labels: np.ndarray,
    classes: Classes,
    alpha: float,
    present: Iterable[int] | None = None,
) -> Image.Image:
    """One kind of picture. `present`: the classes of a legend, by default those that occur."""
    if kind == "label_ids":
        return rendering.to_label_ids(labels, classes)
    colors = rendering.colorize(labels, classes)
    if kind == "color":
        return colors
    blend = rendering.overlay(photograph, colors, alpha)
    if kind == "overlay":
        return blend
    row = rendering.side_by_side(
        [("photograph", photograph), ("overlay", blend), ("classes", colors)]
    )
    return rendering.stack(
        [
            row,
            rendering.legend(
                classes, row.width, np.unique(labels).tolist() if present is None else present
            ),
        ]
    )


if __name__ == "__main__":
    run(main, Options)
