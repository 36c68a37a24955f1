"""Data sets of road scenes and others: from folders on disk to batches of uint8 images and train ids.

    dataset = open_split("cityscapes", "data/cityscapes", "train", augment=Augmentation(seed=1))
    for images, labels, indices in training_batches(dataset, batch_size=2, seed=1, epoch=1): ...

`cityscapes`, `acdc`, `nyuv2` and `voc2012` know the layouts, `classes` what is told apart, `samples` pairs the files,
`scenes` reads them, `cache` keeps them resized, `transforms` augments and `loading` batches.
"""

from collections.abc import Sequence
from pathlib import Path

from datasets import acdc, cityscapes, nyuv2, voc2012
from datasets.cache import default_cache_dir
from datasets.classes import CITYSCAPES, Classes
from datasets.loading import Batch, evaluation_batches, training_batches
from datasets.samples import Layout, Pairing, Sample, restrict
from datasets.scenes import Item, SceneDataset
from datasets.transforms import Augmentation, to_float
from errors import UserError

__all__ = [
    "CITYSCAPES",
    "DATASETS",
    "Augmentation",
    "Batch",
    "Classes",
    "Item",
    "Sample",
    "SceneDataset",
    "evaluation_batches",
    "find_layout",
    "find_split",
    "open_split",
    "to_float",
    "training_batches",
]

LAYOUTS: dict[str, Layout] = {
    layout.name: layout for layout in (cityscapes.LAYOUT, acdc.LAYOUT, nyuv2.LAYOUT, voc2012.LAYOUT)
}
DATASETS = tuple(LAYOUTS)


def find_layout(dataset: str) -> Layout:
    """The layout of the data set with that name, in any case. Raises UserError if there is none."""
    for name, layout in LAYOUTS.items():
        if name.lower() == dataset.lower():
            return layout
    raise UserError(f"no data set is called {dataset!r}; choose one of {', '.join(DATASETS)}")


def find_split(
    dataset: str, datadir: Path | str, subset: str, *, conditions: Sequence[str] | None = None
) -> Pairing:
    """Pair the files of a split. Raises UserError for a folder that is missing or holds no image,
    and for names that the data set doesn't know; files without partner are reported in the result.
    """
    layout, datadir = find_layout(dataset), Path(datadir)
    if subset not in layout.subsets:
        raise UserError(
            f"{layout.name} has no subset {subset!r}; choose {', '.join(layout.subsets)}"
        )
    for condition in conditions or ():
        if condition not in layout.conditions:
            known = ", ".join(layout.conditions) or "it has none"
            raise UserError(f"{layout.name} has no condition {condition!r} ({known})")
    if not datadir.is_dir():
        raise UserError(f"no folder {datadir}; --datadir must hold {layout.expects(subset)}")
    pairing = layout.find(datadir, subset, tuple(conditions or layout.conditions))
    for folder in pairing.empty:
        what = "no .png or .jpg images in" if folder.is_dir() else "no folder"
        raise UserError(f"{what} {folder}; --datadir must hold {layout.expects(subset)}")
    return pairing


def open_split(
    dataset: str,
    datadir: Path | str,
    subset: str,
    *,
    height: int = 512,
    every: int = 1,
    list_file: Path | None = None,
    conditions: Sequence[str] | None = None,
    cache: bool = True,
    cache_dir: Path | None = None,
    augment: Augmentation | None = None,
    full_labels: bool = False,
    require_labels: bool = True,
) -> SceneDataset:
    """Open "train", "val" or "test" of one of `DATASETS` below `datadir`, sorted by path.

    `height` is the shorter side after resizing. `list_file` names the images to use, one a line,
    and `every` then takes each `every`-th image. `conditions` are ACDC's, all by default. `cache`
    keeps resized images in `cache_dir` (default: $TRANSKD_CACHE or ~/.cache/transkd), which is
    built now if needed. `full_labels` have the resized image's size instead of a quarter of it. Without
    `require_labels`, images may lack labels: their label is then all ignore. Raises UserError for missing
    or unpaired files, and for bad options.
    """
    if height < 32:
        raise UserError(
            f"--height {height} is too small for a network of stride 32; use at least 32"
        )
    if every < 1:
        raise UserError(f"a subset of every {every}-th image makes no sense; use 1 or more")
    layout = find_layout(dataset)
    pairing = find_split(dataset, datadir, subset, conditions=conditions)
    if list_file is not None:
        pairing = Pairing(restrict(pairing.samples, list_file))
        if not pairing.samples:
            raise UserError(f"{list_file} names no image")
    if require_labels and (problems := pairing.problems()):
        raise UserError(f"{'; '.join(problems)} in {datadir}; expected {layout.expects(subset)}")
    scenes = SceneDataset(
        pairing.samples[::every],
        layout.classes,
        height=height,
        augment=augment,
        full_labels=full_labels,
    )
    if cache:
        scenes.use_cache(cache_dir or default_cache_dir(), f"{layout.name}-{subset}-{height}")
    return scenes
