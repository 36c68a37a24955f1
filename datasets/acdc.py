"""ACDC (Sakaridis et al., ICCV 2021) on disk: Cityscapes' classes in fog, night, rain and snow.

400 train images a condition and 100 / 106 / 100 / 100 val, of 1080×1920. The archives' train_ref
and val_ref (the same places in fair weather, unlabelled) are no splits.
"""

from collections.abc import Sequence
from pathlib import Path

from datasets.classes import CITYSCAPES
from datasets.samples import Layout, Pairing, pair_folders

CONDITIONS = ("fog", "night", "rain", "snow")


def find(datadir: Path, subset: str, conditions: Sequence[str] = CONDITIONS) -> Pairing:
    """Pair GOPR0475_frame_000041_rgb_anon.png with GOPR0475_frame_000041_gt_label(Train)Ids.png."""
    parts = [
        pair_folders(
            datadir,
            f"rgb_anon/{condition}/{subset}",
            f"gt/{condition}/{subset}",
            image_suffix="_rgb_anon",
            label_suffix="_gt",
            condition=condition,
        )
        for condition in sorted(set(conditions))
    ]
    return Pairing(
        [sample for part in parts for sample in part.samples],
        [orphan for part in parts for orphan in part.orphans],
        [folder for part in parts for folder in part.empty],
    )


LAYOUT = Layout(
    name="ACDC",
    classes=CITYSCAPES,
    subsets=("train", "val", "test"),
    conditions=CONDITIONS,
    expected="rgb_anon/{condition}/{subset}/<sequence>/*_rgb_anon.png (or .jpg) and"
    " gt/{condition}/{subset}/<sequence>/*_gt_labelTrainIds.png (or _labelIds.png)",
    find=find,
)
