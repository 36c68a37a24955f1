"""A split as a torch data set: reads, checks, resizes and augments one sample at a time."""

import hashlib
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from datasets.cache import Cache, fingerprint, open_cache
from datasets.classes import UNEXPECTED, Classes
from datasets.samples import Sample
from datasets.transforms import Augmentation, label_size, resize_image, resize_label, resized_size
from errors import UserError

BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
"""What Pillow raises for a damaged image."""


class Item(NamedTuple):
    image: Tensor
    """(3, H, W) uint8 RGB"""
    label: Tensor
    """(ceil(H/4), ceil(W/4)), or (H, W) from a data set with full labels; uint8 train ids, ignore = n"""
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs here


def open_image(path: Path, *, load: bool = True, upright: bool = False) -> Image.Image:
    """Open `path`, decode it unless `load` is off, turn it as the camera was held if `upright`.

    Raises:
        UserError: it is missing, broken or too large.
    """
    try:
        image: Image.Image = Image.open(path)
        if load:
            image.load()
        if upright:
            image = ImageOps.exif_transpose(image)
    except FileNotFoundError as error:
        raise UserError(f"{path} is gone; put it back or start again without it") from error
    except BROKEN as error:
        raise UserError(
            f"{path} cannot be read as an image: {' '.join(str(error).split())}"
        ) from error
    return image


def read_image(path: Path, *, upright: bool = False) -> Image.Image:
    """An RGB photograph at its own size. Raises UserError as `open_image`, or if it has over 8 bits a channel."""
    image = open_image(path, upright=upright)
    if image.mode.startswith(("I", "F")):
        raise UserError(
            f"{path} has more than 8 bits a channel (mode {image.mode}); convert it to 8-bit RGB"
        )
    return image.convert("RGB")


def read_label(sample: Sample, classes: Classes) -> np.ndarray:
    """(H0, W0) uint8 train ids at the file's own size, ignore = n. Raises UserError for values that don't belong."""
    assert sample.label is not None
    image = open_image(sample.label)
    raw = np.asarray(image)
    if raw.ndim != 2:
        raise UserError(
            f"{sample.label} looks like a colour map (mode {image.mode}); expected one channel of class ids"
        )
    table = classes.table(sample.encoding)
    if raw.dtype == np.uint8:
        label = table[raw]
    else:  # bilevel, 16 or 32 bits
        raw = raw.astype(np.int64)
        in_table = (raw >= 0) & (raw < len(table))
        label = np.where(in_table, table[np.where(in_table, raw, 0)], np.uint8(UNEXPECTED))
    if (label == UNEXPECTED).any():
        raise UserError(_unexpected_values(sample, classes, np.unique(raw[label == UNEXPECTED])))
    return label


def _unexpected_values(sample: Sample, classes: Classes, values: np.ndarray) -> str:
    shown = ", ".join(str(value) for value in values[:8]) + (", …" if len(values) > 8 else "")
    expected = f"train ids (0–{classes.num_classes - 1}, 255)"
    hint = "is this a colour map, or a label of another data set?"
    if sample.encoding == "label_ids":
        expected = f"label ids of {classes.name}"
    elif (classes.table("label_ids")[values[values < 256]] != UNEXPECTED).all():
        hint = "these look like label ids: name such files *_labelIds.png, or give pair_folders encoding='label_ids'"
    if values.max() > 255:
        hint = "these look like instance ids"
    return f"{sample.label} holds values that are no {expected}: {shown}; {hint}"


class SceneDataset(Dataset[Item]):
    """Resized images with quarter-size labels, or with labels of their size. Make one with `datasets.open_split`.

    `dataset[index]` is the plain sample, `dataset[epoch, index]` the one that training sees in
    that epoch. Raises UserError, naming the file, for whatever is wrong with an image or a label.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        classes: Classes,
        *,
        height: int = 512,
        augment: Augmentation | None = None,
        full_labels: bool = False,
    ) -> None:
        self.samples = list(samples)
        self.classes = classes
        self.height = height
        self.augment = augment
        self.full_labels = full_labels or (augment is not None and augment.zooms)
        self.reduce = (
            self.full_labels and not full_labels
        )  # read at the image's size, handed out at a quarter
        self.cache: Cache | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: int | tuple[int, int]) -> Item:
        epoch, index = key if isinstance(key, tuple) else (None, key)
        pixels, ids = self.cache[index] if self.cache else self.read(index)
        image, label = torch.from_numpy(pixels.copy()), torch.from_numpy(ids.copy())
        if self.augment and epoch is not None:
            draw = self.augment.draw(epoch, index)
            image, label = self.augment(image, label, draw, self.classes.ignore)
        if self.reduce:
            label = torch.tensor(resize_label(label.numpy(), (image.shape[1], image.shape[2])))
        return Item(image, label, index)

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Image (3, H, W) and label, (ceil(H/4), ceil(W/4)) or (H, W), from the files; all ignore if unlabelled."""
        sample = self.samples[index]
        photograph = read_image(sample.image)
        size = resized_size(self.height, (photograph.height, photograph.width))
        if sample.label is None:
            label = np.full(label_size(size, full=self.full_labels), self.classes.ignore, np.uint8)
        else:
            full = read_label(sample, self.classes)
            if full.shape != (photograph.height, photograph.width):
                raise UserError(
                    f"{sample.image} is {photograph.height}×{photograph.width} pixels (height × width),"
                    f" but its label {sample.label} is {full.shape[0]}×{full.shape[1]}"
                )
            label = resize_label(full, size, full=self.full_labels)
        image = np.asarray(resize_image(photograph, self.height))
        return np.ascontiguousarray(image.transpose(2, 0, 1)), label

    def fingerprint(self) -> str:
        """Hash of everything that decides what `read` returns: settings, and each file's path, size and time."""
        tables = [self.classes.table(kind).tobytes() for kind in ("train_ids", "label_ids")]
        encodings = [sample.encoding for sample in self.samples]
        files = [file for sample in self.samples for file in (sample.image, sample.label) if file]
        return fingerprint(files, self.height, tables, encodings, PIL.__version__)

    def identity(self) -> str:
        """Hash of the samples' names and sizes in bytes: says whether data that moved is still the same data."""
        digest = hashlib.sha256()
        for sample in self.samples:
            try:
                sizes = [path.stat().st_size for path in (sample.image, sample.label) if path]
            except OSError as error:
                raise UserError(f"{error.filename} cannot be read: {error.strerror}") from error
            digest.update(f"{sample.name} {sizes}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()[:20]

    def use_cache(self, directory: Path, title: str) -> None:
        """Read from a cache in `directory` from now on, which is built if there is none (see `cache`)."""
        names = fingerprint([], [str(sample.image.absolute()) for sample in self.samples])
        title += "-full" * self.full_labels
        self.cache = open_cache(directory, f"{title}-{names}", self.fingerprint(), self)

    def size(self, index: int) -> tuple[int, int]:
        """(H, W) of the resized image, from the file's header."""
        image = open_image(self.samples[index].image, load=False)
        with image:
            return resized_size(self.height, (image.height, image.width))

    def photograph(self, index: int) -> Image.Image:
        """The RGB image at its own size."""
        return read_image(self.samples[index].image)

    def full_label(self, index: int) -> np.ndarray:
        """(H0, W0) uint8 train ids at the label file's own size, ignore = n. Raises UserError if there is none."""
        sample = self.samples[index]
        if sample.label is None:
            raise UserError(f"{sample.image} has no label")
        return read_label(sample, self.classes)
