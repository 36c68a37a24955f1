"""Label maps as pictures: palette, overlay on the photograph, legend, captioned side by side."""

from collections.abc import Iterable, Sequence
from itertools import count
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from datasets.classes import Classes
from files import atomic_write

PAPER = (255, 255, 255)
INK = (30, 30, 30)


def colorize(labels: np.ndarray, classes: Classes) -> Image.Image:
    """Class indices (H, W) in 0..n to RGB through the palette; ignore (n) is black."""
    picture = Image.fromarray(labels.astype(np.uint8))
    picture.putpalette(classes.palette.tobytes())
    return picture.convert("RGB")  # Pillow's lookup; numpy's takes 5 times longer


def draw(
    kind: str,
    labels: np.ndarray,
    classes: Classes,
    photograph: Image.Image,
    alpha: float,
    present: Iterable[int] | None = None,
) -> Image.Image:
    """A picture of class indices (H, W) uint8.

    Args:
        kind: color; train_ids or label_ids, one channel, for benchmark servers; overlay on the
            photograph; side_by_side, with a legend.
        alpha: share of colour in an overlay.
        present: the classes of the legend; by default those that occur.
    """
    if kind == "train_ids":
        return Image.fromarray(labels)
    if kind == "label_ids":
        return Image.fromarray(np.take(np.asarray(classes.label_ids, np.uint8), labels))
    colors = colorize(labels, classes)
    if kind == "color":
        return colors
    blend = Image.blend(photograph, colors, alpha)
    if kind == "overlay":
        return blend
    row = side_by_side([("photograph", photograph), ("overlay", blend), ("classes", colors)])
    names = legend(classes, row.width, np.unique(labels).tolist() if present is None else present)
    page = ImageOps.expand(row, (0, 0, 0, names.height), PAPER)
    page.paste(names, (0, row.height))
    return page


def legend(classes: Classes, width: int, present: Iterable[int]) -> Image.Image:
    """A strip of swatches with names of the `present` classes."""
    font = ImageFont.load_default(13)
    swatch = 14
    line = 24
    names = {index: classes.output_names[index] for index in sorted(present)}
    cell = swatch + 22 + max(int(font.getlength(name)) for name in names.values())
    columns = max(1, width // cell)
    strip = Image.new("RGB", (width, line * -(-len(names) // columns)), PAPER)
    pen = ImageDraw.Draw(strip)
    for place, (index, name) in enumerate(names.items()):
        x = 4 + place % columns * (width // columns)
        y = 5 + place // columns * line
        color = tuple(classes.palette[index].tolist())
        pen.rectangle((x, y, x + swatch, y + swatch), fill=color)
        pen.text((x + swatch + 6, y + swatch // 2), name, INK, font, anchor="lm")
    return strip


def side_by_side(pictures: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Captioned RGB pictures of one size in a row."""
    font = ImageFont.load_default(16)
    caption = 28
    gap = 8
    width, height = pictures[0][1].size
    row = Image.new("RGB", (len(pictures) * (width + gap) - gap, caption + height), PAPER)
    pen = ImageDraw.Draw(row)
    for x, (title, picture) in zip(count(0, width + gap), pictures, strict=False):
        pen.text((x + width // 2, caption // 2), title, INK, font, anchor="mm")
        row.paste(picture, (x, caption))
    return row


def save_png(picture: Image.Image, path: Path) -> None:
    """Save in one step, so that an interrupted run leaves no half file."""
    with atomic_write(path) as temporary:
        picture.save(temporary, format="PNG")
