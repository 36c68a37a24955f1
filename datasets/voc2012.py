"""Pascal VOC 2012 with the augmented segmentation labels (Hariharan et al., ICCV 2011): 10582 train, 1449 val."""

from collections.abc import Sequence
from pathlib import Path

from datasets.classes import VOC2012
from datasets.samples import Layout, Pairing, pair_listed


def find(datadir: Path, subset: str, conditions: Sequence[str] = ()) -> Pairing:
    """The images that ImageSets/Segmentation/{subset}.txt lists, with their single-channel labels."""
    listed = datadir / "ImageSets" / "Segmentation" / f"{subset}.txt"
    return pair_listed(datadir, listed, "JPEGImages", "SegmentationClassAugRaw", "label_ids")


LAYOUT = Layout(
    name="VOC2012",
    classes=VOC2012,
    subsets=("train", "val", "trainval", "test"),
    conditions=(),
    expected="JPEGImages/*.jpg, SegmentationClassAugRaw/*.png and ImageSets/Segmentation/{subset}.txt",
    find=find,
)
