"""What the evaluation scripts share: their flags, scoring a split, rendering it."""

import logging
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from datasets import SceneDataset, open_split
from errors import UserError
from eval.inference import ONE_VIEW, Evaluation, Protocol, Views, evaluate
from eval.metrics import percent
from eval.predictor import Predictor, write_pictures
from files import OUTPUTS, write_json
from models.zoo import download_advice

log = logging.getLogger(__name__)

PROTOCOLS = {"paper": "on quarter-size maps (paper)", "full": "at the labels' own size (full)"}


@dataclass
class Options:
    """Flags of every evaluation script."""

    datadir: Path
    """The data set's folder, as its archives unpack."""
    distillation_type: Literal["teacher", "student", "TransKDBase", "TransKD_GL", "TransKD_EA"] = (
        "TransKDBase"
    )
    """Which published checkpoint to look for in outputs/ where no --weights are given."""
    weights: Path | None = None
    """A checkpoint, ours or a released one, distilled or not; a Hugging Face folder or name; or an
    ONNX file that models.export wrote."""
    subset: str = "val"
    """The split to evaluate."""
    height: int | None = None
    """Images are resized so that their shorter side has this many pixels. Default: what the weights
    were trained with, or 512."""
    batch_size: int = 1
    """Images at once; the result does not depend on it."""
    num_workers: int = 2
    """Threads that read images to score."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto takes a GPU if there is one. ONNX files run on the CPU."""
    json: Path | None = None
    """Also write the result to this file, which ends in .json."""

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.num_workers < 0:
            raise UserError("--batch-size must be 1 or more, and --num-workers 0 or more")


@dataclass
class IoUOptions(Options):
    """Flags of the scripts that score."""

    protocol: Protocol = "paper"
    """paper: score quarter-size maps, as published. full: upsample the logits to the label's own
    size and score there, as cityscapesScripts does."""
    test_time: Views = ONE_VIEW


@dataclass
class ColorOptions(Options):
    """Flags of the scripts that render."""

    output_dir: Path | None = None
    """Where the pictures go, under the data set's own paths. Default: outputs/color/WEIGHTS, or for
    a run's weights outputs/color/RUN/WEIGHTS."""
    flat: bool = False
    """All pictures side by side in one folder, as the ACDC server takes them."""
    size: Literal["logits", "full"] = "logits"
    """logits: a quarter of the input, as published. full: the photograph's size."""
    overlay: float | None = None
    """Blend with the photograph, at its size: 0 shows the photograph alone, 1 the classes alone."""
    label_ids: bool = False
    """Write single-channel label ids at full size, as the Cityscapes server takes them."""
    train_ids: bool = False
    """Write single-channel train ids (road is 0) at full size, as the ACDC server takes them."""


def find_weights(options: Options, dataset: str) -> Path:
    """`--weights`, or the published name in outputs/. Raises UserError if that is missing."""
    if options.weights is not None:
        return options.weights.expanduser()
    kind = options.distillation_type
    # One of the published scripts has B2 in the student's name.
    sizes = ("b2", "b0") if kind == "teacher" else ("b0", "b2")
    names = [f"segformer{size}_{kind}_{dataset.lower()}" for size in sizes]
    for name in names:
        if (OUTPUTS / f"{name}.pth").is_file():
            return OUTPUTS / f"{name}.pth"
    raise UserError(
        f"{OUTPUTS / names[0]}.pth is missing; {download_advice(names[0])}name weights by "
        "--weights FILE"
    )


def score(dataset: str, options: IoUOptions) -> Evaluation:
    """Evaluate, print the IoU table, write `--json`."""
    views = options.test_time
    if options.protocol == "paper" and not views.once:
        raise UserError("--scales, --flip and --window are for --protocol full; add that")
    json = options.json and claim_file(options.json)
    weights = find_weights(options, dataset)
    predictor = Predictor(weights, dataset=dataset, height=options.height, device=options.device)
    if options.protocol == "full" and getattr(predictor.network, "predicts_classes", False):
        log.warning("%s predicts classes; enlarged logits would score differently", weights)
    height = predictor.height
    data = open_split(dataset, options.datadir, options.subset, height=height)
    evaluation = evaluate(
        predictor.network,
        data,
        protocol=options.protocol,
        views=views,
        batch_size=options.batch_size,
        num_workers=options.num_workers,
        device=predictor.device,
    )
    print(f"{weights} on {dataset} {options.subset}, {len(data)} images")
    Console().print(iou_table(evaluation))
    if json is not None:
        source = {
            "dataset": dataset,
            "datadir": str(options.datadir.expanduser().resolve()),
            "subset": options.subset,
            "height": height,
            "weights": str(weights),
            # By its step a report knows that the training went on.
            "step": predictor.facts.get("step"),
            "test_time": None if views.once else vars(views),
        }
        write_json(source | evaluation.as_json() | evaluation.details(), json)
    return evaluation


def iou_table(evaluation: Evaluation) -> Table:
    """Per class and means, in percent; one column for the split and one for each condition."""
    conditions = evaluation.conditions
    table = Table("class", caption=f"IoU in % {PROTOCOLS[evaluation.protocol]}")
    for name in ("all", *conditions):
        table.add_column(name if conditions else "IoU", justify="right")
    scores = [part.as_json() for part in (evaluation, *conditions.values())]
    for name in evaluation.classes.names:
        table.add_row(name, *(percent(part["per_class"][name]) for part in scores))
    table.add_section()
    table.add_row("mean", *(percent(part["mean_iou"]) for part in scores), style="bold")
    others = {"pixel_accuracy": "pixel accuracy", "mean_accuracy": "mean accuracy"}
    if any(None in part["per_class"].values() for part in scores):
        others = {"mean_iou_published": "published mean (absent = 0)"} | others
    for key, title in others.items():
        table.add_row(title, *(percent(part[key]) for part in scores))
    return table


def render(dataset: str, options: ColorOptions) -> list[Path]:
    """Render every image of the split, say where the pictures are, write `--json`."""
    wanted = {"label_ids": options.label_ids, "train_ids": options.train_ids}
    wanted["overlay"] = options.overlay is not None
    if sum(wanted.values()) > 1 or not 0 <= (options.overlay or 0) <= 1:
        raise UserError("give one of --overlay (from 0 to 1), --label-ids and --train-ids, or none")
    kind = next((kind for kind, given in wanted.items() if given), "color")
    json = options.json and claim_file(options.json)
    weights = find_weights(options, dataset)
    run = weights.absolute().parent
    parts = [run.name] if (run / "options.json").is_file() else []
    folder = (options.output_dir or OUTPUTS.joinpath("color", *parts, weights.stem)).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    predictor = Predictor(weights, dataset=dataset, height=options.height, device=options.device)
    predictor.full_size = options.size == "full" or kind != "color"
    predictor.ignore = not kind.endswith("ids")  # benchmark servers don't know it
    data = open_split(dataset, options.datadir, options.subset, require_labels=False)
    paths = output_paths(data, folder, options.flat)
    targets = {sample.image: {kind: path} for sample, path in zip(data.samples, paths, strict=True)}
    failed = write_pictures(predictor, targets, options.overlay or 0, options.batch_size)
    if failed:
        raise UserError(f"{len(failed)} of {len(paths)} images can't be rendered: {failed[0]}")
    print(f"{len(paths)} pictures in {folder}")
    if json is not None:
        files = [str(path) for path in paths]
        write_json({"weights": str(weights), "images": len(files), "files": files}, json)
    return paths


def output_paths(data: SceneDataset, folder: Path, flat: bool) -> list[Path]:
    """A .png for each image, at the path that it has in the data set, or by its name alone.

    Raises UserError if one would lie outside the folder, among the images, or stand for two.
    """
    root = folder.resolve()
    names = [Path(sample.name).with_suffix(".png") for sample in data.samples]
    paths = [root / (name.name if flat else name) for name in names]
    images = {sample.image.resolve().parent for sample in data.samples}
    counts = Counter(paths)
    for path in paths:
        place = path.resolve()
        if counts[path] > 1 or place.parent in images or not place.is_relative_to(root):
            raise UserError(
                f"{path} leaves {folder}, lies among the images, or is the picture of two; "
                "choose another folder, or leave --flat out"
            )
    return paths


def claim_file(path: Path, ending: str = ".json") -> Path:
    """Make the folder of a file to come, so that a mistake shows before an hour of work.

    Raises UserError if it can't be written, or is of another kind, as weights named by mistake.
    """
    path = path.expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    writable = os.access(path.parent, os.W_OK) and not path.is_dir()
    if path.suffix.lower() != ending or not writable:
        raise UserError(f"can't write {path}; name a file that ends in {ending}, in another folder")
    return path
