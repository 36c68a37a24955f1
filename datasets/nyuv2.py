"""NYUv2 on disk, in 40 classes: 795 train and 654 test images of 480×640."""

from collections.abc import Sequence
from pathlib import Path

from datasets.classes import NYU40
from datasets.samples import Layout, Pairing, pair_listed


def find(datadir: Path, subset: str, conditions: Sequence[str] = ()) -> Pairing:
    """The images that {subset}.txt lists, with labels that count from 1.

    NYUv2 comes with a train and a test list; where there is no val.txt, test.txt is what validates.
    """
    if subset == "val" and not (datadir / "val.txt").exists():
        subset = "test"
    return pair_listed(datadir, datadir / f"{subset}.txt", "images", "labels40", "label_ids")


LAYOUT = Layout(
    name="NYUv2",
    classes=NYU40,
    subsets=("train", "val", "test"),
    conditions=(),
    expected="images/*.jpg (or .png), labels40/*.png and {subset}.txt",
    find=find,
)
