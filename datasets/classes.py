"""The classes of a data set: names, colours, weights and the values that its label files hold.

How many classes a data set has stands here alone. A network has `num_outputs` outputs, the last of
which stands for "ignore", as in the published code.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from errors import UserError

Encoding = Literal["train_ids", "label_ids"]
UNEXPECTED = 255  # what `Classes.table` gives for a value that must not occur in a label file
# Names that other libraries give to an output beyond the classes.
VOID = {"ignore", "ignored", "void", "unlabeled", "unlabelled", "background"}


def plain(name: str) -> str:
    """A name as it is compared: `Traffic_Light` is `traffic light`."""
    return re.sub(r"[\s_-]+", "", name).lower()


@dataclass(frozen=True, eq=False)
class Classes:
    """n classes with train ids 0 .. n-1, and the train id n for pixels that don't count.

    Attributes:
        palette: (n + 1, 3) uint8 RGB; the last row is ignore, black.
        label_ids: n + 1; train id -> the label id of the data set's own files. The last is what is
            written for ignore: 0, VOC's 255.
        ignored_label_ids: label ids that stand for none of these classes.
        weights: n + 1 weights of the cross entropy, 0 for ignore; None where none are published.
    """

    name: str
    names: tuple[str, ...]
    palette: np.ndarray
    label_ids: tuple[int, ...]
    ignored_label_ids: tuple[int, ...] = ()
    weights: tuple[float, ...] | None = None

    @property
    def num_classes(self) -> int:
        return len(self.names)

    @property
    def ignore(self) -> int:
        return len(self.names)

    @property
    def num_outputs(self) -> int:
        return len(self.names) + 1

    @property
    def output_names(self) -> tuple[str, ...]:
        return (*self.names, "ignore")

    def order(self, source: object, outputs: int, names: Sequence[str] | None) -> list[int]:
        """For each train id, the index of a network's output, as `model.reorder` takes it.

        A network has these classes, with or without one output more. Names may come in any order;
        `LABEL_0`, which transformers gives, and `class 0` say nothing, and then the order is ours.

        Raises UserError, naming `source`, for another number of outputs or names of other classes.
        """
        names = names or ()
        theirs = [plain(name) for name in names]
        if outputs not in (self.num_classes, self.num_outputs):
            problem = f"{outputs} classes, and {self.name} has {self.num_classes} and ignore"
        elif all(re.fullmatch(r"(label|class)\d+", name) for name in theirs):
            return list(range(outputs))
        else:
            lacking = [name for name in self.names if plain(name) not in theirs]
            ours = [theirs.index(plain(name)) for name in self.names if name not in lacking]
            others = [place for place in range(len(names)) if place not in ours]
            if not lacking and VOID.issuperset(theirs[place] for place in others):
                return ours + others
            problem = f"other classes than {self.name}'s"
            problem += f"; it has {', '.join(names[place] for place in others[:5])}"
            problem += f"; it lacks {', '.join(lacking[:5])}"
        raise UserError(f"{source} predicts {problem}; use weights of these classes, or their data")

    def table(self, encoding: Encoding) -> np.ndarray:
        """(256,) uint8: value in a label file -> train id, ignore, or `UNEXPECTED`.

        "train_ids": 0 .. n-1, and 255 for ignore. "label_ids": the data set's own numbering.
        """
        table = np.full(256, UNEXPECTED, np.uint8)
        if encoding == "train_ids":
            table[: self.num_classes] = range(self.num_classes)
            table[255] = self.ignore
        else:
            table[list(self.ignored_label_ids)] = self.ignore
            table[list(self.label_ids[: self.num_classes])] = range(self.num_classes)
        return table


# Cordts et al., The Cityscapes Dataset (CVPR 2016). ACDC and BDD100K use the same classes. The
# weights are the published 1 / ln(1.1 + share of pixels), at reduced resolution.
_CITYSCAPES = (
    # name, label id, colour, weight
    ("road", 7, (128, 64, 128), 2.5959737),
    ("sidewalk", 8, (244, 35, 232), 6.741505),
    ("building", 11, (70, 70, 70), 3.5353868),
    ("wall", 12, (102, 102, 156), 9.866315),
    ("fence", 13, (190, 153, 153), 9.690922),
    ("pole", 17, (153, 153, 153), 9.369371),
    ("traffic light", 19, (250, 170, 30), 10.289124),
    ("traffic sign", 20, (220, 220, 0), 9.953209),
    ("vegetation", 21, (107, 142, 35), 4.3098087),
    ("terrain", 22, (152, 251, 152), 9.490392),
    ("sky", 23, (70, 130, 180), 7.674411),
    ("person", 24, (220, 20, 60), 9.396925),
    ("rider", 25, (255, 0, 0), 10.347794),
    ("car", 26, (0, 0, 142), 6.3928986),
    ("truck", 27, (0, 0, 70), 10.226673),
    ("bus", 28, (0, 60, 100), 10.241072),
    ("train", 31, (0, 80, 100), 10.28059),
    ("motorcycle", 32, (0, 0, 230), 10.396977),
    ("bicycle", 33, (119, 11, 32), 10.05567),
)

CITYSCAPES = Classes(
    name="Cityscapes",
    names=tuple(name for name, _, _, _ in _CITYSCAPES),
    palette=np.array([colour for _, _, colour, _ in _CITYSCAPES] + [(0, 0, 0)], np.uint8),
    label_ids=(*(label_id for _, label_id, _, _ in _CITYSCAPES), 0),
    # unlabeled .. ground, parking, rail track, guard rail, bridge, tunnel, polegroup, caravan,
    # trailer; the licence plate is -1, which is 255 in a byte
    ignored_label_ids=(0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30, 255),
    weights=(*(weight for _, _, _, weight in _CITYSCAPES), 0.0),
)


def colormap(count: int) -> np.ndarray:
    """(count, 3) uint8, the colours of Pascal VOC: the bits of the number, dealt to R, G and B."""
    number = np.arange(count)[:, None]
    channel = np.arange(3)
    bits = [(number >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(8)]
    return np.sum(bits, axis=0).astype(np.uint8)


# Everingham et al., The Pascal Visual Object Classes Challenge (IJCV 2010). Background is a class
# like the others.
_VOC = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
    "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
    "train", "tvmonitor",
)  # fmt: skip

VOC2012 = Classes(
    name="VOC 2012",
    names=_VOC,
    palette=np.concatenate([colormap(21), np.zeros((1, 3), np.uint8)]),
    label_ids=(*range(21), 255),
    ignored_label_ids=(255,),
)

# Silberman et al., Indoor Segmentation and Support Inference from RGBD Images (ECCV 2012), in the
# 40 classes of Gupta et al. (CVPR 2013). The label files count from 1; 0 is unlabelled.
_NYU = (
    "wall", "floor", "cabinet", "bed", "chair", "sofa", "table", "door", "window", "bookshelf",
    "picture", "counter", "blinds", "desk", "shelves", "curtain", "dresser", "pillow", "mirror",
    "floor mat", "clothes", "ceiling", "books", "refrigerator", "television", "paper", "towel",
    "shower curtain", "box", "whiteboard", "person", "night stand", "toilet", "sink", "lamp",
    "bathtub", "bag", "other structure", "other furniture", "other prop",
)  # fmt: skip

NYU40 = Classes(
    name="NYUv2",
    names=_NYU,
    palette=np.concatenate([colormap(41)[1:], np.zeros((1, 3), np.uint8)]),
    label_ids=(*range(1, 41), 0),
    ignored_label_ids=(0, 255),
)
