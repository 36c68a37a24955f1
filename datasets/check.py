"""Look through a whole data set before a long training does: pairs, sizes, classes, unreadable files.

    python -m datasets.check --dataset cityscapes --datadir DIR

Reads every image and label of every split that is there, with all cores. Exit code 2 if something is wrong.
"""

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table
from rich.text import Text

import cli
from datasets import DATASETS, find_layout, find_split
from datasets.classes import Classes
from datasets.samples import Sample
from datasets.scenes import read_image, read_label
from errors import UserError
from eval.options import claim_file
from files import atomic_write


@dataclass
class Options:
    """Check a data set."""

    datadir: Path
    """Root of the data set."""
    dataset: Literal[DATASETS] = "cityscapes"  # type: ignore[valid-type]
    """Which layout to expect."""
    json: Path | None = None
    """Also write what was found to this file."""


@dataclass
class Finding:
    """What a split, or one condition of it, holds."""

    images: int = 0
    labelled: int = 0
    sizes: Counter[str] = field(default_factory=Counter)
    """Images by height×width."""
    pixels: Counter[str] = field(default_factory=Counter)
    """Labelled pixels by class; `ignore` too."""
    occurs: Counter[str] = field(default_factory=Counter)
    """Images in which a class occurs."""
    problems: list[str] = field(default_factory=list)


@dataclass
class Look:
    """One image and its label."""

    sample: Sample
    size: str | None = None
    pixels: np.ndarray | None = None  # (n + 1,)
    problem: str | None = None


def look(sample: Sample, classes: Classes) -> Look:
    """Read one pair."""
    found = Look(sample)
    try:
        image = read_image(sample.image)
        found.size = f"{image.height}×{image.width}"
        if sample.label is not None:
            label = read_label(sample, classes)
            found.pixels = np.bincount(label.ravel(), minlength=classes.num_outputs)
            if label.shape != (image.height, image.width):
                found.problem = (
                    f"{sample.label} is {label.shape[0]}×{label.shape[1]}, its image {found.size}"
                )
    except UserError as error:
        found.problem = str(error)
    return found


def check(options: Options) -> dict[str, Finding]:
    """Findings by split, and by split/condition where a data set has conditions.

    Raises:
        UserError: no split of the data set is there.
    """
    layout = find_layout(options.dataset)
    classes = layout.classes
    names = classes.output_names
    findings: dict[str, Finding] = {}
    missing: dict[str, str] = {}
    for subset in layout.subsets:
        try:
            pairing = find_split(options.dataset, options.datadir, subset)
        except UserError as error:
            missing[subset] = str(error)
            continue
        total = findings.setdefault(subset, Finding())
        if subset != "test":  # its labels are not public
            total.problems += [
                f"{problem}; expected {layout.expects(subset)}" for problem in pairing.problems()
            ]
        with ThreadPoolExecutor() as pool:
            looks = pool.map(lambda sample: look(sample, classes), pairing.samples)
            for found in track(
                looks, subset, len(pairing.samples), console=Console(stderr=True), transient=True
            ):
                parts = [total]
                if found.sample.condition:
                    parts.append(
                        findings.setdefault(f"{subset}/{found.sample.condition}", Finding())
                    )
                for part in parts:
                    part.images += 1
                    if found.size:
                        part.sizes[found.size] += 1
                    if found.problem:
                        part.problems.append(found.problem)
                    if found.pixels is not None:
                        part.labelled += 1
                        part.pixels.update(dict(zip(names, found.pixels.tolist(), strict=True)))
                        part.occurs.update(
                            name for name, n in zip(names, found.pixels, strict=True) if n
                        )
    if not findings:
        raise UserError(next(iter(missing.values())))
    for subset in ("train", "val"):  # others may be left out
        if subset in missing:
            findings[subset] = Finding(problems=[missing[subset]])
    return findings


def main(options: Options) -> None:
    if options.json is not None:
        claim_file(options.json)
    findings = check(options)
    console = Console()
    title = Text(
        f"{options.dataset} in {options.datadir}", "table.title"
    )  # as it is: a path may hold brackets
    table = Table("split", "images", "labelled", "sizes", "problems", title=title)
    for name, found in findings.items():
        sizes = ", ".join(f"{size} ({count})" for size, count in found.sizes.most_common(3))
        table.add_row(name, str(found.images), str(found.labelled), sizes, str(len(found.problems)))
    console.print(table)

    splits = [name for name, found in findings.items() if "/" not in name and found.labelled]
    headers = [f"{name} {what}" for what in ("pixels %", "images") for name in splits]
    histogram = Table(Column("class", no_wrap=True), *headers)
    for name in find_layout(options.dataset).classes.output_names:
        shares = [
            100 * findings[s].pixels[name] / max(findings[s].pixels.total(), 1) for s in splits
        ]
        histogram.add_row(
            name,
            *(f"{share:.2f}" for share in shares),
            *(str(findings[s].occurs[name]) for s in splits),
        )
    if splits:
        console.print(histogram)

    if options.json is not None:
        with atomic_write(options.json) as aside:
            aside.write_text(
                json.dumps({name: vars(found) for name, found in findings.items()}, indent=2) + "\n"
            )
    problems = [
        problem for name, found in findings.items() if "/" not in name for problem in found.problems
    ]
    for problem in problems:
        console.print(f"- {problem}", markup=False, highlight=False, soft_wrap=True)
    if problems:
        raise UserError(
            f"{len(problems)} problem{'s' * (len(problems) > 1)} in {options.datadir}, listed above"
        )


if __name__ == "__main__":
    cli.run(main, Options)
