"""Data sets of road scenes and others: from folders to batches of uint8 images and train ids.

    dataset = open_split("cityscapes", "data/cityscapes", "train", augment=Augmentation(seed=1))
    for images, labels, indices in training_batches(dataset, batch_size=2, seed=1, epochs=[1]): ...

`layouts` knows where files lie and pairs them, `classes` what labels mean, `images` reads them,
`scenes` resizes them, `cache` keeps them resized, `transforms` augments and `loading` batches.
"""

from pathlib import Path

from datasets.cache import use_cache
from datasets.classes import CITYSCAPES, Classes
from datasets.layouts import DATASETS, LAYOUTS
from datasets.loading import training_batches
from datasets.samples import restrict, unpaired
from datasets.scenes import SceneDataset
from datasets.transforms import Augmentation, require_height, to_float
from errors import UserError

__all__ = [
    "CITYSCAPES",
    "DATASETS",
    "LAYOUTS",
    "Augmentation",
    "Classes",
    "SceneDataset",
    "open_split",
    "to_float",
    "training_batches",
    "use_cache",
]


def open_split(
    dataset: str,
    datadir: Path | str,
    subset: str,
    *,
    height: int = 512,
    every: int = 1,
    list_file: Path | None = None,
    augment: Augmentation | None = None,
    full_labels: bool = False,
    require_labels: bool = True,
) -> SceneDataset:
    """Open "train", "val" or "test" of one of `DATASETS` below `datadir`, sorted by path.

    Args:
        height: the shorter side after resizing, in pixels.
        every: take each `every`-th image.
        list_file: names the images to use, one a line.
        full_labels: labels have the resized image's size instead of a quarter of it.
        require_labels: without it images may lack labels, which are then all ignore.

    Raises UserError if the height is too small, or files are missing or unpaired.
    """
    require_height(height)
    layout = LAYOUTS[dataset]
    samples, orphans = layout.find(Path(datadir).expanduser(), subset)
    if list_file is not None:
        samples, orphans = restrict(samples, list_file.expanduser()), []
    problems = unpaired(samples, orphans)
    if require_labels and problems:
        raise UserError(f"{'; '.join(problems)} in {datadir}; expected {layout.expects(subset)}")
    return SceneDataset(
        samples[::every],
        layout.classes,
        height=height,
        augment=augment,
        full_labels=full_labels,
        title=f"{layout.name}-{subset}",
    )
