"""The report's charts: each a matplotlib figure, as SVG that follows the page's colours and as a PNG file."""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from math import ceil, isfinite
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure

from eval.page import LIGHT
from files import atomic_write

COLORS = 8
DASHES = ("-", "--", ":", "-.")  # of the first eight lines, of the next eight, …
SMALL, LARGE = (3.6, 2.2), (7.4, 5.2)  # inches
STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": LIGHT["rule"],
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": LIGHT["soft"],
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": LIGHT["ink"],
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "grid.color": LIGHT["rule"],
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "report",  # the same chart gives the same file
    "text.color": LIGHT["ink"],
    "text.parse_math": False,  # names may have dollars
    "xtick.color": LIGHT["soft"],
    "xtick.major.size": 0,
    "ytick.color": LIGHT["soft"],
    "ytick.major.size": 0,
}
TICKS: dict[str, Any] = {
    "nbins": 6,
    "steps": [1, 2, 5, 10],
}  # as many at every size: the layout knows their widths
HOVER = "hover: "  # begins the id of what shows the rest of it under the mouse

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """A figure, the stem of its file's name, and its title."""

    name: str
    title: str
    figure: Figure
    marks: Mapping[str, Any] = field(default_factory=dict)
    """What the legend explains, by label. (matplotlib's own list leaves out labels that begin with "_".)"""

    @mpl.rc_context(STYLE)
    def svg(self) -> str:
        """For inside a page: its colours are the page's variables, its marks say their value when pointed at."""
        file = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        self.figure.savefig(file, format="svg", transparent=True, metadata=nothing)
        text = file.getvalue()
        text = text[text.index("<svg") :]
        width = f"--natural: {96 * self.figure.get_figwidth():.0f}px"
        role = f'role="img" aria-label="{escape(self.title)}" style="{width}"'
        text = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', role, text, count=1)
        text = re.sub(rf"""<g id=(["']){HOVER}(.*?)\1>""", r"<g><title>\2</title>", text)
        text = re.sub(
            r' id="[a-z\d.]+_\d+"', "", text
        )  # names of groups; what marks refer to has no underscore
        for variable, color in LIGHT.items():
            text = text.replace(color, f"var(--{variable})")
        return text

    @mpl.rc_context(STYLE)
    def save(self, folder: Path) -> Path:
        """Write NAME.png with title and legend, which on the page stand outside the chart.

        Raises:
            UserError: it can't be written.
        """
        figure, path = self.figure, folder / f"{self.name}.png"
        figure.suptitle(self.title)
        if self.marks:
            longest = 0.7 + 0.08 * max(map(len, self.marks))  # inches, about
            columns = max(1, int(figure.get_figwidth() // longest))
            figure.set_figheight(figure.get_figheight() + 0.2 * ceil(len(self.marks) / columns))
            figure.legend(
                [*self.marks.values()], [*self.marks], loc="outside lower center", ncols=columns
            )
        with atomic_write(path) as aside:  # tight: as wide as a name that is wider than the chart
            figure.savefig(
                aside, format="png", dpi=200, facecolor=LIGHT["card"], bbox_inches="tight"
            )
        return path


@mpl.rc_context(STYLE)
def line_chart(
    name: str,
    title: str,
    lines: Mapping[str, Points],
    colors: Mapping[str, int],
    *,
    unit: str = "",
    levels: Mapping[str, float] | None = None,
    dots: bool = False,
    size: tuple[float, float] = SMALL,
) -> Chart | None:
    """Curves by name over training steps, None without a point. `levels` are dashed horizontal lines by name.

    Long curves are averaged in bins, so that noise does not hide the course; `dots` draws every point instead and
    marks it while there are few. Values that are not finite are left out.
    """
    figure = Figure(figsize=size)
    axes = figure.add_subplot(xlabel="step")
    marks = {}
    for label, points in lines.items():
        points = [(x, y) for x, y in points if isfinite(y)]
        if not points:
            continue
        color, dashes = _color(colors[label]), DASHES[colors[label] // COLORS % len(DASHES)]
        shown = points if dots else thin(points, 120)
        last = f"{label}: {shown[-1][1]:.4g}{unit} at step {shown[-1][0]:.0f}"
        (marks[label],) = axes.plot(
            *zip(*shown, strict=True), color=color, linestyle=dashes, gid=HOVER + last
        )
        if dots and len(shown) <= 60:
            for x, y in shown:
                axes.plot(
                    x,
                    y,
                    "o",
                    color=color,
                    markersize=4,
                    gid=f"{HOVER}{label}, step {x:.0f}: {y:.4g}{unit}",
                )
    if not marks:
        return None
    for index, (label, value) in enumerate((levels or {}).items()):
        axes.axhline(value, color=LIGHT["soft"], linestyle="--", linewidth=1, gid=f"{HOVER}{label}")
        place: dict[str, Any] = {
            "xycoords": ("axes fraction", "data"),
            "textcoords": "offset points",
        }
        axes.annotate(label, (0, value), xytext=(3 + 65 * index, 3), color=LIGHT["soft"], **place)
    axes.locator_params(**TICKS)
    axes.set_xlim(left=0)
    axes.set_ylim(0, 1.05 * axes.dataLim.y1 or 1)
    axes.xaxis.set_major_formatter(
        lambda step, _: f"{step / 1000:g}k" if step >= 1000 else f"{step:g}"
    )
    return Chart(name, title, figure, marks)


@mpl.rc_context(STYLE)
def bar_chart(
    name: str,
    title: str,
    groups: Sequence[str],
    bars: Mapping[str, Sequence[float | None]],
    colors: Mapping[str, int],
    *,
    unit: str = "",
) -> Chart | None:
    """For each group one bar per name, side by side; a None leaves a gap. None without a value."""
    if not any(value is not None for row in bars.values() for value in row):
        return None
    group = len(bars) + 1.5  # widths of a bar
    figure = Figure(figsize=(max(6.0, 0.6 + 0.1 * group * len(groups)), 3.2))
    axes = figure.add_subplot()
    marks = {}
    for offset, (label, row) in enumerate(bars.items()):
        known = [(place, value) for place, value in enumerate(row) if value is not None]
        xs = [place * group + offset - (len(bars) - 1) / 2 for place, _ in known]
        marks[label] = axes.bar(
            xs, [value for _, value in known], width=0.9, color=_color(colors[label])
        )
        for patch, (place, value) in zip(marks[label], known, strict=True):
            patch.set_gid(f"{HOVER}{groups[place]}, {label}: {value:.4g}{unit}")
    turned: dict[str, Any] = (
        {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if len(groups) > 8 else {}
    )
    axes.set_xticks([place * group for place in range(len(groups))], groups, **turned)
    axes.locator_params("y", **TICKS)
    axes.set_xlim(-group / 2, (len(groups) - 0.5) * group)
    return Chart(name, title, figure, marks)


@mpl.rc_context(STYLE)
def confusion_chart(
    name: str, title: str, counts: Sequence[Sequence[int]], classes: Sequence[str]
) -> Chart:
    """Where the pixels of each true class went, in percent of its row.

    `counts`: a row for each class, a column for each class and then perhaps one for "ignore". Classes that are
    neither in the truth nor predicted are left out.
    """
    matrix = np.asarray(counts, float)
    rows = np.flatnonzero(matrix.sum(axis=1))
    predicted = np.flatnonzero(matrix.sum(axis=0))
    columns = [*rows, *(index for index in predicted if index not in rows)]
    labels = [*classes, "ignore"]
    share = 100 * matrix[np.ix_(rows, columns)] / matrix[rows].sum(axis=1, keepdims=True)

    cell = 0.34
    figure = Figure(figsize=(1.6 + cell * len(columns), 1.5 + cell * len(rows)))
    axes = figure.add_subplot(xlabel="predicted", ylabel="true", aspect="equal")
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    shades = LinearSegmentedColormap.from_list(
        "shades", [to_rgba(LIGHT["c0"], 0), to_rgba(LIGHT["c0"], 1)]
    )
    for y, row in enumerate(share):
        for x, value in enumerate(row):
            hover = f"{HOVER}{labels[rows[y]]} as {labels[columns[x]]}: {value:.1f} %"
            axes.add_patch(
                mpl.patches.Rectangle(
                    (x, y), 1, 1, color=shades(value / 100), linewidth=0, gid=hover
                )
            )
            if value >= 0.5:
                ink = LIGHT["card" if value > 75 else "ink"]  # legible on light and dark pages
                axes.text(
                    x + 0.5,
                    y + 0.5,
                    f"{value:.0f}",
                    color=ink,
                    ha="center",
                    va="center",
                    size=7,
                    gid=hover,
                )
    axes.set_xticks(
        np.arange(len(columns)) + 0.5, [labels[index] for index in columns], rotation=90
    )
    axes.set_yticks(np.arange(len(rows)) + 0.5, [labels[index] for index in rows])
    axes.set_xlim(0, len(columns))
    axes.set_ylim(len(rows), 0)
    return Chart(name, title, figure)


def thin(points: Points, most: int) -> list[tuple[float, float]]:
    """At most `most` points: means of equally long runs of neighbours."""
    size = ceil(len(points) / most) or 1
    runs = (points[start : start + size] for start in range(0, len(points), size))
    return [(run[-1][0], sum(y for _, y in run) / len(run)) for run in runs]


def _color(index: int) -> str:
    return LIGHT[f"c{index % COLORS}"]
