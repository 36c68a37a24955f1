"""Label maps as pictures: palette, overlay on the photograph, legend, captioned side by side."""

from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from datasets.classes import Classes

PAPER = (255, 255, 255)
INK = (30, 30, 30)


def colorize(labels: np.ndarray, classes: Classes) -> Image.Image:
    """Class indices (H, W) in 0..n to RGB through the palette; ignore (n) is black."""
    picture = Image.fromarray(labels.astype(np.uint8))
    picture.putpalette(classes.palette.tobytes())
    return picture.convert("RGB")  # Pillow's lookup; numpy's takes 5 times longer


def to_label_ids(labels: np.ndarray, classes: Classes) -> Image.Image:
    """Train ids (H, W) to the single-channel label ids that Cityscapes' server takes; ignore to 0."""
    return Image.fromarray(np.take(np.asarray(classes.label_ids, np.uint8), labels))


def overlay(photograph: Image.Image, colors: Image.Image, alpha: float) -> Image.Image:
    """(1 - alpha) · photograph + alpha · colours, at the photograph's size."""
    if colors.size != photograph.size:
        colors = colors.resize(photograph.size, Image.Resampling.NEAREST)
    return Image.blend(photograph.convert("RGB"), colors, alpha)


def legend(classes: Classes, width: int = 900, present: Iterable[int] | None = None) -> Image.Image:
    """A strip of swatches with class names, `width` pixels wide and as high as that needs.

    `present` limits it to these class indices (default: all, without ignore).
    """
    font, swatch, line = ImageFont.load_default(13), 14, 24
    chosen = range(classes.num_classes) if present is None else sorted(set(present))
    names = {index: [*classes.names, "ignore"][index] for index in chosen}
    cell = swatch + 22 + max((int(font.getlength(name)) for name in names.values()), default=0)
    columns = max(1, width // cell)
    strip = Image.new("RGB", (width, line * -(-len(names) // columns) or 1), PAPER)
    draw = ImageDraw.Draw(strip)
    for place, (index, name) in enumerate(names.items()):
        x, y = 4 + place % columns * (width // columns), place // columns * line + 5
        color = tuple(int(value) for value in classes.palette[index])
        draw.rectangle((x, y, x + swatch, y + swatch), fill=color)
        draw.text((x + swatch + 6, y + swatch // 2), name, INK, font, anchor="lm")
    return strip


def side_by_side(
    pictures: Sequence[tuple[str, Image.Image]], height: int | None = None
) -> Image.Image:
    """Captioned pictures in a row, scaled to one `height` (default: the highest picture's)."""
    font, caption, gap = ImageFont.load_default(16), 28, 8
    height = height or max(picture.height for _, picture in pictures)
    scaled = []
    for _, picture in pictures:
        # a label map that grows must not get colours between two classes
        growing = picture.height < height
        method = Image.Resampling.NEAREST if growing else Image.Resampling.LANCZOS
        width = max(1, round(picture.width * height / picture.height))
        scaled.append(picture.convert("RGB").resize((width, height), method))
    total = sum(picture.width for picture in scaled) + gap * (len(scaled) - 1)
    row = Image.new("RGB", (max(1, total), caption + height), PAPER)
    draw, x = ImageDraw.Draw(row), 0
    for (title, _), picture in zip(pictures, scaled, strict=True):
        draw.text((x + picture.width // 2, caption // 2), title, INK, font, anchor="mm")
        row.paste(picture, (x, caption))
        x += picture.width + gap
    return row


def stack(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures one under the other, left aligned: rows of a figure, the legend last."""
    size = (max(p.width for p in pictures), sum(p.height for p in pictures))
    page = Image.new("RGB", size, PAPER)
    y = 0
    for picture in pictures:
        page.paste(picture, (0, y))
        y += picture.height
    return page
