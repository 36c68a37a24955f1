"""Reads photographs and label files.

Photographs are turned upright by their EXIF orientation; labels are read by their palette and bit
depth.
"""

import logging
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from datasets.classes import UNEXPECTED, Classes, Encoding, colormap
from errors import UserError

log = logging.getLogger(__name__)

# What Pillow raises for a damaged image.
BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
# Not ImageOps.exif_transpose: it writes EXIF anew, and fails where another tag is malformed.
TURNS = {  # EXIF's orientation -> how the pixels are brought upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
VOC_COLOURS = colormap(256)
LOW_DEPTHS = {"L;2": 85, "L;4": 17}  # by these Pillow multiplies grey values of 2 and 4 bits


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """An image file, not decoded yet. Raises UserError for damage that shows within the block."""
    try:
        with Image.open(path) as image:
            yield image
    except BROKEN as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} can't be read as an image: {reason}") from error


def orientation(image: Image.Image, path: Path) -> int:
    """EXIF's orientation, 1 (upright) where there is none."""
    if image.format == "TIFF":  # which Pillow turns upright when it decodes it
        return 1
    try:
        number = int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception as error:  # a malformed EXIF block can make its reader raise anything
        log.warning("%s has EXIF that can't be read (%s); it is taken as it lies", path, error)
        return 1
    return number if number in TURNS else 1  # 0 and 9 mean nothing


def upright(image: Image.Image, path: Path) -> Image.Image:
    """Decode an opened image and turn it as the camera was held."""
    image.load()
    turn = TURNS.get(orientation(image, path))
    if turn is not None:
        image = image.transpose(turn)
        image.info.clear()  # where it says how it lay: it must not be turned once more
    return image


def upright_size(path: Path) -> tuple[int, int]:
    """(H, W) of the upright image, from the file's header."""
    with open_image(path) as image:
        turned = orientation(image, path) in (5, 6, 7, 8)
        return (image.width, image.height) if turned else (image.height, image.width)


def read_photograph(path: Path) -> Image.Image:
    """An upright RGB photograph at its own size.

    Raises UserError if it is missing, broken or too large, or has more than 8 bits a channel.
    """
    with open_image(path) as image:
        if image.mode.startswith(("I", "F")):
            raise UserError(
                f"{path} has more than 8 bits a channel (mode {image.mode}); convert it to RGB"
            )
        return upright(image, path).convert("RGB")


def read_label(path: Path, encoding: Encoding, classes: Classes) -> np.ndarray:
    """(H, W) uint8 train ids at the file's own size, ignore = n.

    Raises UserError if it can't be read, is no map of these classes, or has others' palette.
    """
    with open_image(path) as image:
        tiles: Any = getattr(image, "tile", None)  # which is gone once it is decoded
        packing = tiles[0].args if tiles else None
        kind = image.format
        image = upright(image, path)
    values = by_palette(image, path, encoding, classes) if image.mode == "P" else np.asarray(image)
    if values.ndim != 2 or kind in ("JPEG", "MPO"):  # which changes numbers
        raise UserError(
            f"{path} looks like a picture ({kind}, mode {image.mode}), such as a colour map; "
            "expected a PNG with one channel of class ids"
        )
    if packing in LOW_DEPTHS:
        values = values // np.uint8(LOW_DEPTHS[packing])
    as_bytes = values.astype(np.uint8)  # of bilevel, 16 and 32 bits as well
    label = classes.table(encoding)[as_bytes]
    label[values != as_bytes] = UNEXPECTED
    unexpected = set(np.unique(values[label == UNEXPECTED]).tolist())
    hint = "is this a colour map, or a label of another data set?"
    if encoding == "train_ids":
        expected = f"train ids (0–{classes.num_classes - 1}, 255)"
        if unexpected and unexpected <= {*classes.label_ids, *classes.ignored_label_ids}:
            hint = "these look like label ids: name such files *_labelIds.png"
    else:
        expected = f"label ids of {classes.name}"
        if not unexpected and (values == 255).any():
            # 255 is rare among label ids, and so are those without a class if none is large.
            ids = set(np.unique(values).tolist()) - {255}
            if max(ids, default=0) < classes.num_classes:
                unexpected = ids & set(classes.ignored_label_ids) - {0}
                hint = "these look like train ids: name such files *_labelTrainIds.png"
    if unexpected:
        shown = ", ".join(str(value) for value in sorted(unexpected)[:8])
        raise UserError(f"{path} holds values that are no {expected}: {shown}; {hint}")
    return label


def by_palette(image: Image.Image, path: Path, encoding: Encoding, classes: Classes) -> np.ndarray:
    """Grey palettes mean their grey values, others the index, if it is that of the colour's class.

    Programs that make files smaller write the former.
    """
    values, table = np.asarray(image), classes.table(encoding)
    palette = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
    greys = palette[:, 0][np.minimum(values, len(palette) - 1)]
    if (palette == palette[:, :1]).all() and len(np.unique(greys)) == len(np.unique(values)):
        return greys
    colours = np.concatenate([classes.palette, VOC_COLOURS[255:]])  # and that of VOC's borders
    meanings = np.array([*range(classes.num_outputs), classes.ignore])
    for index in np.flatnonzero(np.bincount(values.ravel(), minlength=256)):
        if index >= len(palette) or (palette[index] == VOC_COLOURS[index]).all():
            continue  # the palette of VOC, which many tools give to any classes
        same_colour = meanings[(colours == palette[index]).all(axis=1)]
        # The value 255 is ignored in whatever colour: licence plates have that of cars.
        if len(same_colour) and index != 255 and table[index] not in same_colour:
            name = classes.output_names[same_colour[0]]
            raise UserError(
                f"{path} has a palette in which {index} has the colour of {name}, whose number it "
                "isn't; convert the colours to class ids"
            )
    return values
