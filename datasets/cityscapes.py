"""Cityscapes (Cordts et al., CVPR 2016) on disk: 2975 train and 500 val images of 1024×2048."""

from collections.abc import Sequence
from pathlib import Path

from datasets.classes import CITYSCAPES
from datasets.samples import Layout, Pairing, pair_folders


def find(datadir: Path, subset: str, conditions: Sequence[str] = ()) -> Pairing:
    """Pair frankfurt_000000_000294_leftImg8bit.png with frankfurt_000000_000294_gtFine_label(Train)Ids.png."""
    return pair_folders(
        datadir,
        f"leftImg8bit/{subset}",
        f"gtFine/{subset}",
        image_suffix="_leftImg8bit",
        label_suffix="_gtFine",
    )


LAYOUT = Layout(
    name="cityscapes",
    classes=CITYSCAPES,
    subsets=("train", "val", "test"),
    conditions=(),
    expected="leftImg8bit/{subset}/<city>/*_leftImg8bit.png (or .jpg) and"
    " gtFine/{subset}/<city>/*_gtFine_labelTrainIds.png (or _labelIds.png)",
    find=find,
)
