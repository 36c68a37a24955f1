"""A split as a torch data set: reads, checks, resizes and augments one sample at a time."""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from datasets.classes import Classes
from datasets.images import read_label, read_photograph, upright_size
from datasets.samples import Sample
from datasets.transforms import Augmentation, resize_image, resize_label
from errors import UserError


class Item(NamedTuple):
    """Image (3, H, W) uint8 RGB; label (ceil(H/4), ceil(W/4)) or (H, W), uint8 train ids."""

    image: Tensor
    label: Tensor
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs here


class SceneDataset(Dataset[Item]):
    """Resized images with labels of a quarter of their size, or of it; see `datasets.open_split`.

    `dataset[index]` is the plain sample, `dataset[epoch, index]` the one that training sees in that
    epoch. Raises UserError, naming the file, for whatever is wrong with an image or a label.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        classes: Classes,
        *,
        height: int = 512,
        augment: Augmentation | None = None,
        full_labels: bool = False,
        title: str = "scenes",
    ) -> None:
        self.title = title
        self.samples = list(samples)
        self.classes = classes
        self.height = height
        self.augment = augment
        crops = augment is not None and augment.crops
        self.full_labels = full_labels or crops  # as they are read and cached
        self.reduce = crops and not full_labels  # after that, to a quarter
        self.cache: Any = None  # of resized images, see `datasets.cache.use_cache`

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: int | tuple[int, int]) -> Item:
        epoch, index = key if isinstance(key, tuple) else (None, key)
        pixels, ids = self.read(index) if self.cache is None else self.cache[index]
        # Copies: the cache's arrays are read-only views of its file.
        image, label = torch.from_numpy(pixels.copy()), torch.from_numpy(ids.copy())
        if self.augment and epoch is not None:
            draw = self.augment.draw(epoch, index)
            image, label = self.augment(image, label, draw, self.classes.ignore)
        if self.reduce:
            label = torch.tensor(resize_label(label.numpy(), (image.shape[1], image.shape[2])))
        return Item(image, label, index)

    def load(self, index: int) -> tuple[Image.Image, np.ndarray]:
        """Photograph and label at their own size. Raises UserError if these differ."""
        photograph, label = self.photograph(index), self.full_label(index)
        if label.shape != (photograph.height, photograph.width):
            sample = self.samples[index]
            raise UserError(
                f"{sample.image} is {photograph.height}×{photograph.width} pixels (height × "
                f"width), but its label {sample.label} is {label.shape[0]}×{label.shape[1]}"
            )
        return photograph, label

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Image (3, H, W) and label, resized from the files."""
        photograph, label = self.load(index)
        image = np.asarray(resize_image(photograph, self.height)).transpose(2, 0, 1)
        size = (image.shape[1], image.shape[2])
        return np.ascontiguousarray(image), resize_label(label, size, full=self.full_labels)

    def photograph(self, index: int) -> Image.Image:
        """The RGB image at its own size."""
        return read_photograph(self.samples[index].image)

    def full_label(self, index: int) -> np.ndarray:
        """(H0, W0) uint8 train ids at the label file's own size; all ignore where there is none."""
        sample = self.samples[index]
        if sample.label is None:
            return np.full(upright_size(sample.image), self.classes.ignore, np.uint8)
        return read_label(sample.label, sample.encoding, self.classes)

    def plain(self) -> "SceneDataset":
        """The same samples as evaluation sees them."""
        scenes = SceneDataset(self.samples, self.classes, height=self.height)
        if not self.full_labels:  # else the cache's labels have another size
            scenes.cache = self.cache
        return scenes

    def count_class_weights(self) -> tuple[float, ...]:
        """1 / ln(1.1 + frequency of the class), the published rule, of this split; 0 for ignore."""
        counts = np.zeros(self.classes.num_outputs)
        for index in range(len(self)):
            counts += np.bincount(self[index].label.numpy().ravel(), minlength=len(counts))
        frequencies = counts[:-1] / counts[:-1].sum()
        return (*(1 / np.log(1.1 + frequencies)).tolist(), 0.0)

    def identity(self) -> str:
        """Hash of the samples' names and sizes in bytes: whether data that moved is the same."""
        digest = hashlib.sha256()
        for sample in self.samples:
            sizes = [path.stat().st_size for path in (sample.image, sample.label) if path]
            digest.update(f"{sample.name} {sizes}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()[:20]
