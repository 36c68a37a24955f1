"""The flags of the evaluation scripts, and what they open: a model and a split."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from cli import MANY, find_device
from datasets import SceneDataset, open_split
from errors import UserError
from files import make_folder
from models import load_model
from models.checkpoints import read_facts

OUTPUTS = Path(__file__).resolve().parents[1] / "outputs"

DistillationType = Literal["teacher", "student", "TransKDBase", "TransKD_GL", "TransKD_EA"]


@dataclass
class Options:
    datadir: Path
    """The data set's folder, as its archives unpack."""
    distillation_type: DistillationType = "TransKDBase"
    """Which published checkpoint to look for in outputs/ when --weights is not given."""
    weights: Path | None = None
    """A checkpoint: ours or a released one, distilled or not (only the network itself is used)."""
    subset: str = "val"
    """The split to evaluate."""
    height: int = 512
    """Images are resized so that their shorter side has this many pixels."""
    batch_size: int = 1
    """Images at once; the result does not depend on it."""
    num_workers: int = 2
    """Processes that read images while the network computes."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto takes a GPU if there is one."""
    cache: bool = False
    """Keep the resized images on disk for the next time (worth it when evaluating often)."""
    json: Path | None = None
    """Also write the result to this file."""


@dataclass
class IoUOptions(Options):
    protocol: Literal["paper", "full"] = "paper"
    """paper: score quarter-size maps, as published. full: upsample the logits to the label's own
    size and score there, as cityscapesScripts does."""


@dataclass
class ColorOptions(Options):
    output_dir: Path | None = None
    """Where the pictures go, under the data set's own paths (default: outputs/color/WEIGHTS, or for a run's weights
    outputs/color/RUN/WEIGHTS)."""
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
    """The file to evaluate: --weights, or the published name in outputs/. UserError if missing."""
    if options.weights is not None:
        if options.distillation_type != Options.distillation_type:
            raise UserError(
                "--distillation-type names a released checkpoint, --weights another; leave one out"
            )
        if not options.weights.exists():  # a folder is another library's
            raise UserError(f"{options.weights} is not there; give --weights a checkpoint")
        return options.weights
    backbone = "segformerb2" if options.distillation_type == "teacher" else "segformerb0"
    path = OUTPUTS / f"{backbone}_{options.distillation_type}_{dataset.lower()}.pth"
    if not path.is_file():
        raise UserError(
            f"{path} is missing; put the released checkpoint there or name yours by --weights FILE"
        )
    return path


def open_model_and_data(
    options: Options, dataset: str, *, require_labels: bool = True
) -> tuple[torch.nn.Module, SceneDataset, Path, torch.device]:
    """Model (eval mode, on its device), data, the weights' path, device; UserError if one fails."""
    if options.batch_size < 1 or not 0 <= options.num_workers < MANY:
        raise UserError(
            f"--batch-size must be at least 1, --num-workers at least 0 and below {MANY}"
        )
    if options.json is not None:
        claim_file(options.json)
    device = find_device(options.device)
    weights = find_weights(options, dataset)
    data = open_split(
        dataset,
        options.datadir,
        options.subset,
        height=options.height,
        cache=options.cache,
        require_labels=require_labels,
    )
    model = load_model(weights).to(device)
    data.classes.require(weights, model.num_classes, model.class_names)
    warn_of_height(weights, options.height)
    return model, data, weights, device


def warn_of_height(weights: Path, height: int) -> None:
    """Say so on stderr where the weights tell that they were trained on images of another height."""
    trained = read_facts(weights).get("height")
    if trained not in (None, height):
        print(
            f"warning: {weights} was trained at --height {trained}, this is {height}",
            file=sys.stderr,
        )


def claim_file(path: Path, ending: str = ".json") -> None:
    """Make the folder of a file to come, which may take the place of an earlier one with that ending, of no other.

    Raises:
        UserError: it can't be written, or there is something else.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is a folder or a device; name a file")
    if path.suffix.lower() != ending and path.exists() and path.stat().st_size:
        raise UserError(
            f"{path} is there already and does not end in {ending}; name another file, or remove it first"
        )
    claim_folder(path.parent)


def claim_folder(folder: Path) -> None:
    """Make the folder now, so that a typing error shows before an hour of work, not after."""
    make_folder(folder)
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder} is not writable; choose another folder")
