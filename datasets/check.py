"""Check a whole data set before a long training.

    python -m datasets.check --dataset cityscapes --datadir DIR

Reads every image and label as training does, with all cores, and lists whatever training would
refuse. Exit code 2 if there is something.
"""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from rich.console import Console
from rich.table import Table

import cli
from datasets import DATASETS, LAYOUTS, SceneDataset
from datasets.images import open_image, orientation
from datasets.layouts import SUBSETS
from datasets.samples import unpaired
from errors import UserError
from progress import track


@dataclass
class Options:
    """Check a data set."""

    datadir: Path
    """Root of the data set."""
    dataset: Literal[DATASETS] = "cityscapes"  # type: ignore[valid-type]
    """Which layout to expect."""


@dataclass
class Finding:
    """Counts and problems of an image, of a split, or of one condition of a split."""

    images: int = 0
    turned: int = 0  # by EXIF
    sizes: Counter[str] = field(default_factory=Counter)  # images by height×width
    pixels: Counter[str] = field(default_factory=Counter)  # by class, "ignore" too
    problems: list[str] = field(default_factory=list)

    def add(self, other: "Finding") -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


def examine(scenes: SceneDataset, index: int) -> Finding:
    """One image and its label."""
    finding = Finding(images=1)
    sample, classes = scenes.samples[index], scenes.classes
    try:
        photograph, label = scenes.load(index)
        with open_image(sample.image) as image:
            finding.turned = int(orientation(image, sample.image) != 1)
        finding.sizes[f"{photograph.height}×{photograph.width}"] = 1
        if sample.label is not None:
            counts = np.bincount(label.ravel(), minlength=classes.num_outputs).tolist()
            finding.pixels.update(dict(zip(classes.output_names, counts, strict=True)))
    except UserError as error:
        finding.problems.append(str(error))
    return finding


def check(dataset: str, datadir: Path) -> dict[str, Finding]:
    """Findings by split, and by split/condition where a data set has conditions.

    The test split may be missing, or lack labels, which are not public.
    """
    layout = LAYOUTS[dataset]
    findings: dict[str, Finding] = {}
    for subset in SUBSETS:
        try:
            samples, orphans = layout.find(datadir.expanduser(), subset)
        except UserError as error:
            if subset != "test":
                findings[subset] = Finding(problems=[str(error)])
            continue
        problems = [] if subset == "test" else unpaired(samples, orphans)
        expected = layout.expects(subset)
        findings[subset] = Finding(problems=[f"{what}; expected {expected}" for what in problems])
        scenes = SceneDataset(samples, layout.classes)
        with ThreadPoolExecutor() as pool:
            results = pool.map(partial(examine, scenes), range(len(scenes)))
            tracked = track(results, subset, len(scenes))
            for sample, finding in zip(samples, tracked, strict=True):
                findings[subset].add(finding)
                if sample.condition:
                    findings.setdefault(f"{subset}/{sample.condition}", Finding()).add(finding)
    return findings


def main(options: Options) -> None:
    findings = check(options.dataset, options.datadir)
    table = Table("split", "images", "turned by EXIF", "sizes", "problems")
    for name, finding in findings.items():
        sizes = ", ".join(f"{size} ({count})" for size, count in finding.sizes.most_common(3))
        counts = [finding.images, finding.turned, sizes, len(finding.problems)]
        table.add_row(name, *map(str, counts))
    console = Console()
    console.print(table)

    splits = {name: finding for name, finding in findings.items() if "/" not in name}
    histogram = Table("class", *(f"{name} pixels %" for name in splits))
    for name in LAYOUTS[options.dataset].classes.output_names:
        fractions = [x.pixels[name] / max(x.pixels.total(), 1) for x in splits.values()]
        histogram.add_row(name, *(f"{100 * fraction:.2f}" for fraction in fractions))
    console.print(histogram)

    problems = [problem for finding in splits.values() for problem in finding.problems]
    for problem in problems:
        console.print(f"- {problem}", markup=False, highlight=False, soft_wrap=True)
    if problems:
        raise UserError(f"problems in {options.datadir}: {len(problems)}, listed above")


if __name__ == "__main__":
    cli.run(main, Options)
