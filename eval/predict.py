"""Segment any photographs and videos: files, folders, patterns; with any weights, or an ONNX file.

    python eval/predict.py street.jpg --weights student.safetensors
    python eval/predict.py photos/ 'drive/*.png' --weights student.onnx --output-dir out
    python eval/predict.py drive.mp4 --weights student.safetensors --output-dir out

Pictures have the photograph's size and name, in a folder for each kind (out/color/street.png), with
the subfolders that they have below a folder or a pattern.
    color          the classes by the data set's palette
    overlay        the same, blended with the photograph
    label_ids      one channel, the label ids that Cityscapes' server takes
    side_by_side   photograph, overlay and classes in a row, with a legend of the classes found

A video becomes an MP4 file of its size and times, without sound; each frame of its label ids a PNG,
out/label_ids/drive.mp4/000000.png. This needs PyAV: pip install -r requirements/video.txt.
"""

import glob
import logging
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run from any folder

import cli  # isort: skip  # before torch

import numpy as np
import tyro
from PIL import Image

from datasets import DATASETS
from datasets.samples import files_below
from errors import UserError, require
from eval.predictor import Predictor, ahead, write_pictures
from eval.rendering import draw, save_png
from files import OUTPUTS
from progress import track

log = logging.getLogger(__name__)

PHOTOGRAPHS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
VIDEOS = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".ts", ".wmv", ".flv")
Kind = Literal["color", "overlay", "label_ids", "side_by_side"]


@dataclass
class Options:
    """Segment photographs and videos of any size and write the result as pictures and videos."""

    inputs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Photographs, videos, folders of them, or patterns such as 'drive/**/*.jpg'."""
    weights: Path
    """A checkpoint, a Hugging Face folder or name, or an ONNX file that models.export wrote."""
    output_dir: Path = OUTPUTS / "predicted"
    """Where the pictures go."""
    kinds: tuple[Kind, ...] = ("color", "overlay")
    """Which pictures to write."""
    alpha: float = 0.5
    """Share of the colours in an overlay."""
    dataset: Literal[DATASETS] = "cityscapes"  # type: ignore[valid-type]
    """The data set whose classes the network knows: names, colours and label ids."""
    height: int | None = None
    """Photographs are resized so that their shorter side has this many pixels. Default: what the
    weights were trained with, or 512."""
    batch_size: int = 1
    """Photographs of one size at once; the result does not depend on it."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto takes a GPU if there is one. ONNX files run on the CPU."""


def main(options: Options) -> None:
    named = options.inputs and options.kinds
    if not named or not 0 <= options.alpha <= 1 or options.batch_size < 1:
        raise UserError("name inputs and --kinds, --alpha from 0 to 1, --batch-size of 1 or more")
    options = replace(options, output_dir=options.output_dir.expanduser())
    targets = find_targets(options)
    videos = [source for source in targets if is_video(source)]
    if videos:
        require("av", "-r requirements/video.txt")
    loading = {"dataset": options.dataset, "height": options.height, "device": options.device}
    predictor = Predictor(options.weights.expanduser(), **loading)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    photographs = {source: paths for source, paths in targets.items() if not is_video(source)}
    failed = write_pictures(predictor, photographs, options.alpha, options.batch_size)
    for source in videos:
        try:
            predict_video(source, targets[source], predictor, options)
        except UserError as error:
            log.warning("%s", error)
            failed.append(source)
    if failed:
        more = " …" if len(failed) > 1 else ""
        raise UserError(f"{len(failed)} of {len(targets)} inputs can't be done: {failed[0]}{more}")
    print(f"{len(targets)} inputs: {', '.join(options.kinds)} in {options.output_dir}")


def find_targets(options: Options) -> dict[Path, dict[str, Path]]:
    """Every photograph and video that the inputs mean, and the files of its kinds of picture.

    Pictures that an earlier call wrote are no inputs. Raises UserError if an input means none, or
    two would become one.
    """
    written = {(options.output_dir / kind).resolve() for kind in get_args(Kind)}
    targets: dict[Path, dict[str, Path]] = {}
    for given in options.inputs:
        path = Path(given).expanduser()
        if path.is_file():
            base, files = path.parent, [path]
        elif path.is_dir():
            base, files = path, sorted(files_below(path))
        else:
            magic = [i for i, part in enumerate(path.parts) if glob.has_magic(part)]
            base = Path(*path.parts[: magic[0]]) if magic else path
            found = map(Path, glob.glob(str(path), recursive=True))  # noqa: PTH207
            files = sorted(path for path in found if not path.is_dir())
        known = [file for file in files if file.suffix.lower() in PHOTOGRAPHS + VIDEOS]
        matched = {
            file: target_paths(options, file.relative_to(base))
            for file in known
            if written.isdisjoint(file.resolve().parents)
        }
        if not matched:
            kinds = ", ".join(PHOTOGRAPHS + VIDEOS)
            raise UserError(f"no photograph or video at {given!r} (their names end in {kinds})")
        if others := len(files) - len(known):
            log.warning("%s: %d files are no photographs or videos by their names", path, others)
        targets |= {file: paths for file, paths in matched.items() if file not in targets}
    counts = Counter(path for paths in targets.values() for path in paths.values())
    path, count = counts.most_common(1)[0]
    if count > 1:
        raise UserError(f"{count} of the inputs would become {path}; rename all but one")
    return targets


def target_paths(options: Options, name: Path) -> dict[str, Path]:
    """The file of each kind; for a video's label ids, the folder of its frames."""
    paths: dict[str, Path] = {}
    for kind in options.kinds:
        path = options.output_dir / kind / name
        if not is_video(name):
            path = path.with_suffix(".png")
        elif kind != "label_ids":
            path = path.with_suffix(".mp4")
        paths[kind] = path
    return paths


def is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEOS


def predict_video(
    source: Path, targets: dict[str, Path], predictor: Predictor, options: Options
) -> None:
    """Write a video for each kind, and label ids as a PNG for each frame.

    Raises UserError if it can't be read, or the result can't be written; then there is no video.
    """
    from eval.video import Video, writing_video  # needs PyAV

    video = Video(source)
    count = video.stream.frames or None  # 0 where the file does not say
    classes = predictor.classes
    # A legend of the classes in a frame would change the picture's size from frame to frame.
    present = range(classes.num_classes)

    def draw_kinds(predicted: tuple[int, Image.Image, np.ndarray]) -> list[Image.Image]:
        _, frame, labels = predicted
        return [draw(kind, labels, classes, frame, options.alpha, present) for kind in targets]

    with ThreadPoolExecutor() as threads, ExitStack() as stack:
        adders: dict[str, Any] = {}
        for kind, path in targets.items():
            if kind != "label_ids":
                adders[kind] = stack.enter_context(writing_video(path, video))
            for frame in path.glob("[0-9]*.png"):  # of an earlier video, which may have had more
                frame.unlink()
        predicted = predictor.predict(video.frames(), options.batch_size)
        painted = track(ahead(threads, draw_kinds, predicted, 4), source.name, count)
        for index, ((time, _, _), pictures) in enumerate(painted):
            for kind, picture in zip(targets, pictures.result(), strict=True):
                if kind == "label_ids":
                    save_png(picture, targets[kind] / f"{index:06}.png")
                else:
                    adders[kind](picture, time)


if __name__ == "__main__":
    cli.run(main, Options)
