"""Which image belongs to which label: found by name, mismatches reported.

The published code sorts the image list and the label list and zips them, so one missing file
shifts every pair after it. Here a pair shares its folder and the part of its name before the
suffix.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from datasets.classes import Classes, Encoding
from errors import UserError

IMAGE_TYPES = (".png", ".jpg", ".jpeg")


@dataclass(frozen=True)
class Sample:
    """One photograph and, where there is one, its label file."""

    image: Path
    label: Path | None
    name: str
    """The image's path below the data folder, with slashes: leftImg8bit/val/frankfurt/….png"""
    condition: str | None = None
    encoding: Encoding = "train_ids"
    """How to read the label file's values, see `Classes.table`."""


@dataclass(frozen=True)
class Pairing:
    """What lies in a split, before anybody has judged it."""

    samples: list[Sample]
    """Every image, sorted by name; its label is None where none was found."""
    orphans: list[Path] = field(default_factory=list)
    """Labels without an image."""
    empty: list[Path] = field(default_factory=list)
    """Image folders that are missing or hold no image."""

    def problems(self) -> list[str]:
        """What has no partner, in words: counts and the first names. Empty if all are paired."""
        unlabelled = [sample.image for sample in self.samples if sample.label is None]
        total = len(self.samples)
        found = []
        if unlabelled:
            found.append(
                f"images without label: {len(unlabelled)} of {total} ({first(unlabelled)})"
            )
        if self.orphans:
            found.append(f"labels without image: {len(self.orphans)} ({first(self.orphans)})")
        return found


@dataclass(frozen=True)
class Layout:
    """How a data set lies on disk. `find(datadir, subset, conditions)` pairs one of its splits."""

    name: str
    classes: Classes
    subsets: tuple[str, ...]
    conditions: tuple[str, ...]
    expected: str
    """Folders and names in words; {subset} stands for a split's name."""
    find: Callable[[Path, str, Sequence[str]], Pairing]

    def expects(self, subset: str) -> str:
        """What a split's files must be called, in words."""
        return self.expected.replace("{subset}", subset)


def first(paths: Sequence[Path], count: int = 3) -> str:
    return ", ".join(path.name for path in paths[:count]) + (", …" if len(paths) > count else "")


def files_below(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Every file below `folder` that is not hidden, through links too: data sets are often linked together.

    `above` are the folders on the way here, into which a link would lead round and round.
    Raises PermissionError for one that must not be read: what is in it must not go missing unnoticed.
    """
    here = folder.resolve()
    try:
        entries = [] if here in above else list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from files_below(Path(entry.path), (*above, here))
        else:
            yield Path(entry.path)


def pair_folders(
    datadir: Path,
    images: str,
    labels: str,
    *,
    image_suffix: str,
    label_suffix: str,
    condition: str | None = None,
    encoding: Encoding | None = None,
) -> Pairing:
    """Pair {key}{image_suffix}.png|jpg|jpeg in folder `images` with
    {key}{label_suffix}_labelTrainIds.png or else {key}{label_suffix}_labelIds.png in `labels`; given an `encoding`,
    with {key}{label_suffix}.png, which is read by it.

    Both folders are relative to `datadir`; a key includes the subfolders, such as the city.
    Raises UserError if two images have one key.
    """
    found: dict[str, dict[Encoding, Path]] = defaultdict(dict)
    kinds: dict[str, Encoding] = {
        f"{label_suffix}_labelTrainIds.png": "train_ids",
        f"{label_suffix}_labelIds.png": "label_ids",
    }
    if encoding is not None:
        kinds = {f"{label_suffix}.png": encoding}
    for path in files_below(datadir / labels):
        for ending, kind in kinds.items():
            if path.name.endswith(ending):
                key = path.relative_to(datadir / labels).as_posix().removesuffix(ending)
                found[key][kind] = path

    samples: dict[str, Sample] = {}
    for path in files_below(datadir / images):
        if path.suffix.lower() not in IMAGE_TYPES:
            continue
        key = path.relative_to(datadir / images).with_suffix("").as_posix()
        key = key.removesuffix(image_suffix)
        if key in samples:
            raise UserError(f"{samples[key].image} and {path} have the same name; keep one of them")
        sample = Sample(path, None, path.relative_to(datadir).as_posix(), condition)
        for kind in kinds.values():
            if kind in found[key]:
                sample = replace(sample, label=found[key][kind], encoding=kind)
                break
        samples[key] = sample

    orphans = [
        path for key, files in found.items() if key not in samples for path in files.values()
    ]
    return Pairing(
        sorted(samples.values(), key=lambda sample: sample.name),
        sorted(orphans),
        [] if samples else [datadir / images],
    )


def pair_listed(
    datadir: Path, list_file: Path, images: str, labels: str, encoding: Encoding
) -> Pairing:
    """Pair images/NAME.jpg|jpeg|png with labels/NAME.png for every NAME that `list_file` holds, one a line.

    A line may also bring folder and ending, of which the stem counts. Raises UserError for a list that can't be
    read, or that names images that are not there.
    """
    try:
        names = [
            Path(line.split()[0]).stem
            for line in list_file.read_text(encoding="utf-8").splitlines()
            if line.strip()
        ]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read the list {list_file} ({_reason(error)}); check --datadir"
        ) from error
    found = {
        path.stem: path
        for path in files_below(datadir / images)
        if path.suffix.lower() in IMAGE_TYPES
    }
    missing = [Path(name) for name in names if name not in found]
    if missing:
        raise UserError(
            f"{list_file} names {len(missing)} images that are not in {datadir / images} ({first(missing)})"
        )
    samples = []
    for name in sorted(set(names)):
        label = datadir / labels / f"{name}.png"
        image = found[name]
        where = image.relative_to(datadir).as_posix()
        samples.append(Sample(image, label if label.is_file() else None, where, encoding=encoding))
    return Pairing(samples, empty=[] if samples else [datadir / images])


def restrict(samples: Sequence[Sample], list_file: Path) -> list[Sample]:
    """The samples that `list_file` names, in the split's order.

    One image a line: its file name, its stem, or the end of its path; empty lines and lines that
    start with # are skipped. Raises UserError for a name that is not in the split or that fits
    several images.
    """
    try:
        lines = [line.strip() for line in list_file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read the list {list_file} ({_reason(error)}); check the path"
        ) from error
    wanted = [line for line in lines if line and not line.startswith("#")]

    by_name: dict[str, list[int]] = defaultdict(list)
    for position, sample in enumerate(samples):
        parts = sample.name.split("/")
        for start in range(len(parts)):
            ending = "/".join(parts[start:])
            by_name[ending].append(position)
            by_name[ending.removesuffix(sample.image.suffix)].append(position)

    unknown = [Path(line) for line in wanted if line not in by_name]
    if unknown:
        raise UserError(
            f"{list_file}: not in the split: {len(unknown)} of {len(wanted)} names ({first(unknown)})"
        )
    ambiguous = [Path(line) for line in wanted if len(by_name[line]) > 1]
    if ambiguous:
        raise UserError(
            f"{list_file}: several images fit {first(ambiguous)}; give more of the path"
        )
    chosen = {by_name[line][0] for line in wanted}
    return [samples[position] for position in sorted(chosen)]


def _reason(error: OSError | UnicodeDecodeError) -> str:
    return error.strerror or "it can't be read" if isinstance(error, OSError) else "it is no text"
