"""The files of a split: images with their labels, found in folders, chosen by a list."""

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets.classes import Encoding
from errors import UserError

IMAGE_TYPES = (".png", ".jpg", ".jpeg")


@dataclass(frozen=True)
class Sample:
    """One photograph and, where there is one, its label file.

    Attributes:
        name: the image's path below the data folder, with slashes: leftImg8bit/val/….png
        encoding: how to read the label file's values, see `Classes.table`.
    """

    image: Path
    label: Path | None
    name: str
    condition: str | None = None
    encoding: Encoding = "train_ids"


def unpaired(samples: Sequence[Sample], orphans: Sequence[Path]) -> list[str]:
    """What has no partner, in words: images without label, and labels without image."""
    unlabelled = [sample.image for sample in samples if sample.label is None]
    problems = {"images without label": unlabelled, "labels without image": orphans}
    return [
        f"{what}: {len(paths)}, such as {', '.join(path.name for path in paths[:3])}"
        for what, paths in problems.items()
        if paths
    ]


def files_below(folder: Path) -> Iterator[Path]:
    """Every file below `folder` that is not hidden, through links too; none if it is no folder.

    Raises OSError for a folder that can't be read: nothing in it may go missing unnoticed.
    """
    for entry in os.scandir(folder) if folder.is_dir() else ():
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from files_below(Path(entry.path))
        else:
            yield Path(entry.path)


def images_below(folder: Path) -> list[Path]:
    """The photographs among `files_below`."""
    return [path for path in files_below(folder) if path.suffix.lower() in IMAGE_TYPES]


def restrict(samples: Sequence[Sample], list_file: Path) -> list[Sample]:
    """The samples that a list names, in their own order.

    A line names one image by its path or the end of it, with or without the suffix. The image's
    label may follow, as in lists of pairs; it is not used. Raises UserError if the list can't be
    read, or a line fits no image, or several.
    """
    try:
        text = list_file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"can't read the list {list_file} ({error})") from error

    whole = {sample.name for sample in samples}
    by_ending: dict[str, set[str]] = defaultdict(set)
    for sample in samples:
        for ending in endings_of(sample.name):
            by_ending[ending].add(sample.name)
            by_ending[ending.removesuffix(sample.image.suffix)].add(sample.name)

    def fitting(path: str) -> set[str]:
        path = os.path.normpath(path).lstrip("/")
        for ending in endings_of(path):  # a whole path first, wherever the data lay
            if ending in whole:
                return {ending}
        return by_ending.get(path, set())

    named: set[str] = set()
    wrong = []
    for line in filter(None, map(str.strip, text.replace("\\", "/").splitlines())):
        fits = fitting(line)
        # An image and its label have a folder each: "living room 2" is no pair.
        pair = re.fullmatch(r"(.+?)[\s,;]+(\S*/\S*\.png)", line)
        if not fits and pair:
            fits = fitting(pair[1])
        if len(fits) == 1:
            named |= fits
        else:
            wrong.append(line)
    if wrong or not named:
        shown = ", ".join(wrong[:3]) or "it names none"
        raise UserError(
            f"lines of {list_file} that fit no image, or several: {len(wrong)} ({shown}); "
            f"give paths like {samples[0].name}"
        )
    return [sample for sample in samples if sample.name in named]


def endings_of(path: str) -> list[str]:
    """The path and the ends of it: a/b/c.png, b/c.png, c.png."""
    parts = path.split("/")
    return ["/".join(parts[start:]) for start in range(len(parts))]
