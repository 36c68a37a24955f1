"""Line and bar charts as inline SVG: axes, ticks, legend, and a title to hover on every mark.

Colours are CSS variables --c0 … --c7 of the page, so that light and dark pages both fit.
"""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from math import ceil, floor, isfinite, log10

COLORS = 8
SMALL, LARGE, BARS = (380, 240), (780, 500), 300
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 42

Points = Sequence[tuple[float, float]]


def line_chart(
    lines: Mapping[str, Points],
    colors: Mapping[str, int],
    *,
    label: str,
    unit: str = "",
    levels: Mapping[str, float] | None = None,
    dots: bool = False,
    size: tuple[int, int] = SMALL,
) -> str:
    """Curves by name over training steps. `levels` are dashed horizontal lines by name.

    Long curves are averaged in bins, so that noise does not hide the course; `dots` marks every
    point instead (few, exact points). Values that are not finite are left out.
    """
    levels, (width, height) = levels or {}, size
    drawn = {
        name: thin([(x, y) for x, y in points if isfinite(y)], 10_000 if dots else 120)
        for name, points in lines.items()
    }
    xs = [x for points in drawn.values() for x, _ in points]
    ys = [y for points in drawn.values() for _, y in points] + list(levels.values())
    if not xs:
        return ""
    x_ticks, y_ticks = ticks(0, max(xs), about=6), ticks(0, max(ys))
    x_end, y_end = max(xs), y_ticks[-1]
    plot_width, plot_height = width - LEFT - RIGHT, height - TOP - BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        right = x / x_end if x_end else 0.5
        return round(LEFT + plot_width * right, 1), round(TOP + plot_height * (1 - y / y_end), 1)

    parts = y_axis(y_ticks, lambda y: place(0, y)[1], width)
    for tick in x_ticks:
        if tick <= x_end:
            x = place(tick, 0)[0]
            parts.append(f'<text x="{x}" y="{height - BOTTOM + 18}" class="mid">{short(tick)}</text>')
    parts.append(f'<text x="{LEFT + plot_width / 2}" y="{height - 4}" class="mid">step</text>')
    for name, value in levels.items():
        y = place(0, value)[1]
        parts.append(
            f'<line x1="{LEFT}" x2="{width - RIGHT}" y1="{y}" y2="{y}" class="level">'
            f"{hover(name, value, unit)}</line>"
            f'<text x="{LEFT + 6}" y="{y - 5}" class="note">{escape(name)}</text>'
        )
    for name, points in drawn.items():
        color = f"var(--c{colors[name] % COLORS})"
        path = " ".join(f"{x},{y}" for x, y in (place(*point) for point in points))
        parts.append(f'<polyline points="{path}" class="line" stroke="{color}"/>')
        for step, value in points:
            x, y = place(step, value)
            style = "" if dots else ' fill-opacity="0"'
            parts.append(
                f'<circle cx="{x}" cy="{y}" r="{3 if dots else 6}" fill="{color}"{style}>'
                f"{hover(f'{name}, step {step:.0f}', value, unit)}</circle>"
            )
    return svg(label, parts, width, height)


def bar_chart(
    groups: Sequence[str],
    bars: Mapping[str, Sequence[float | None]],
    colors: Mapping[str, int],
    *,
    label: str,
    unit: str = "",
) -> str:
    """For each group one bar per name, side by side; None leaves a gap."""
    values = [value for row in bars.values() for value in row if value is not None]
    if not values:
        return ""
    y_ticks = ticks(0, max(values))
    bar = max(4.0, min(14.0, 44 / len(bars)))
    group = bar * len(bars) + 14
    width, height, bottom = LEFT + RIGHT + group * len(groups), BARS, 92
    plot_height = height - TOP - bottom

    def top(value: float) -> float:
        return round(TOP + plot_height * (1 - value / y_ticks[-1]), 1)

    parts = y_axis(y_ticks, top, width)
    for place, title in enumerate(groups):
        left = LEFT + place * group + 7
        for offset, (name, row) in enumerate(bars.items()):
            value = row[place]
            if value is None:
                continue
            x, y = left + offset * bar, top(value)
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{bar - 1:.1f}" '
                f'height="{max(1.0, top(0) - y):.1f}" fill="var(--c{colors[name] % COLORS})">'
                f"{hover(f'{title}, {name}', value, unit)}</rect>"
            )
        x, y = left + (group - 14) / 2 + 4, height - bottom + 14
        parts.append(
            f'<text x="{x:.1f}" y="{y}" class="end" transform="rotate(-45 {x:.1f} {y})">{escape(title)}</text>'
        )
    return svg(label, parts, width, height)


def legend(colors: Mapping[str, int]) -> str:
    """The names with their colours, as HTML."""
    items = "".join(
        f'<span class="key"><i style="background:var(--c{color % COLORS})"></i>{escape(name)}</span>'
        for name, color in colors.items()
    )
    return f'<p class="legend">{items}</p>'


def thin(points: Points, most: int) -> list[tuple[float, float]]:
    """At most `most` points: means of equally long runs of neighbours."""
    size = ceil(len(points) / most) or 1
    runs = (points[start : start + size] for start in range(0, len(points), size))
    return [(run[-1][0], sum(y for _, y in run) / len(run)) for run in runs]


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2, 5 · 10^k apart) from at most `low` to at least `high`."""
    span = high - low or abs(high) or 1.0
    magnitude = 10.0 ** floor(log10(span / about))
    step = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude * about >= span * 0.999)
    first, last = floor(low / step), ceil((low + span) / step - 1e-9)
    return [round(index * step, 10) for index in range(first, last + 1)]


def short(value: float) -> str:
    """1500 as 1.5k; small numbers as they are."""
    return f"{value / 1000:g}k" if abs(value) >= 1000 else f"{value:g}"


def y_axis(values: Sequence[float], place: Callable[[float], float], width: float) -> list[str]:
    return [
        f'<line x1="{LEFT}" x2="{width - RIGHT}" y1="{place(v)}" y2="{place(v)}" class="grid"/>'
        f'<text x="{LEFT - 8}" y="{place(v) + 4}" class="end">{short(v)}</text>'
        for v in values
    ]


def hover(name: str, value: float, unit: str) -> str:
    return f"<title>{escape(name)}: {value:.4g}{unit}</title>"


def svg(label: str, parts: Sequence[str], width: float, height: float) -> str:
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(label)}">'
        + "".join(parts)
        + "</svg>"
    )
