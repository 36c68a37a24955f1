"""What happens to an image and its label between the files and the network.

Resize once (PIL, exactly as published), then flip and shift at random, as the paper does; on
request also scale and crop. Every random step comes after the resize: its results can be cached.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from errors import UserError

SMALLEST = 32
"""Pixels of the smallest side that a network takes: stage 1 then has the 8 rows that its attention
reduces to one."""


def require_height(height: int) -> None:
    """Raise UserError for images that no network takes."""
    if height < SMALLEST:
        raise UserError(f"height {height} is too small; it must be at least {SMALLEST}")


def label_size(size: tuple[int, int], *, full: bool = False) -> tuple[int, int]:
    """(H, W) of an image's label: a quarter, rounded up as the logits are (stride 4), or all."""
    return size if full else (-(-size[0] // 4), -(-size[1] // 4))


def resized_size(height: int, size: tuple[int, int]) -> tuple[int, int]:
    """(H, W) for a shorter side of `height`; the longer is rounded down: 1080×1920 -> 512×910."""
    longer = int(height * max(size) / min(size))
    return (height, longer) if size[0] <= size[1] else (longer, height)


def resize_image(image: Image.Image, height: int) -> Image.Image:
    """Bilinear (antialiased) so that the shorter side is `height`; a copy if it is already."""
    h, w = resized_size(height, (image.height, image.width))
    return image.resize((w, h), Image.Resampling.BILINEAR)


def resize_label(label: np.ndarray, size: tuple[int, int], *, full: bool = False) -> np.ndarray:
    """Nearest from the label's own size to a quarter of the resized image's `size`, or to all.

    Label pixel i takes the source pixel floor((i + 0.5) · H0 / h): 8i + 4 for 1024 -> 128.
    """
    h, w = label_size(size, full=full)
    return np.asarray(Image.fromarray(label).resize((w, h), Image.Resampling.NEAREST))


def to_float(images: Tensor) -> Tensor:
    """uint8 RGB -> float32 in [0, 1]; the paper's models take no mean/std normalisation."""
    return images.to(torch.float32).div_(255)


def shift(x: Tensor, tx: int, ty: int, fill: int) -> Tensor:
    """Move the content of (…, H, W) right by `tx` and down by `ty`; `fill` follows it."""
    height, width = x.shape[-2:]
    tx = max(-width, min(tx, width))  # no more can be cut off
    ty = max(-height, min(ty, height))
    return F.pad(x, (tx, -tx, ty, -ty), value=fill)  # negative padding cuts off


def place_window(length: int, scale: float, size: int, place: float) -> tuple[slice, float, float]:
    """Along one axis: which part of the window is filled, and from where to where of the image."""
    scaled = max(round(length * scale), 1)
    # Where the window begins in the image, or the image in a window that is larger.
    start = int(place * (abs(scaled - size) + 1))
    if scaled < size:
        return slice(start, start + scaled), 0, length
    end = min((start + size) * length / scaled, length)
    return slice(0, size), start * length / scaled, end


def scale_and_crop(
    image: Tensor,
    label: Tensor,
    scale: float,
    size: tuple[int, int],
    place: tuple[float, float],
    ignore: int,
) -> tuple[Tensor, Tensor]:
    """A window of `size` (h, w) onto the scaled image (3, H, W) and its label (H, W), both uint8.

    `place`, in [0, 1), says where the window lies between top and bottom, left and right. Where
    the scaled image is smaller than the window, it lies in it on black and ignore.
    """
    rows, top, bottom = place_window(image.shape[1], scale, size[0], place[0])
    columns, left, right = place_window(image.shape[2], scale, size[1], place[1])
    shape = (columns.stop - columns.start, rows.stop - rows.start)
    box = (left, top, right, bottom)
    pixels = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
    pixels = pixels.resize(shape, Image.Resampling.BILINEAR, box)
    ids = Image.fromarray(label.contiguous().numpy())
    ids = ids.resize(shape, Image.Resampling.NEAREST, box)
    new_image = image.new_zeros(3, *size)
    new_image[:, rows, columns] = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)
    new_label = label.new_full(size, ignore)
    new_label[rows, columns] = torch.from_numpy(np.array(ids))
    return new_image, new_label


class Draw(NamedTuple):
    """What is drawn for one image; `tx`, `ty` in label pixels, `place` as in `scale_and_crop`."""

    flip: bool
    tx: int
    ty: int
    scale: float = 1.0
    place: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Augmentation:
    """Random flip and shift (the paper's only augmentation), scale and crop.

    Every draw is a pure function of (seed, epoch, index), so neither the number of workers nor an
    interruption changes it.

    Attributes:
        flip: mirror every other image, on average.
        shift: largest shift in x and in y, in label pixels; one is four image pixels.
        published_shift: shift as the published code does: the image by t pixels, its quarter-size
            label by t *label* pixels (up to 6 image pixels apart), and where the label moves left
            or up, road (0) fills the strip. Neither scale nor crop go with it.
        scale: smallest and largest; what is drawn between them is cropped, or padded, to `crop`.
        crop: (H, W); None is the image's own size.
    """

    flip: bool = True
    shift: int = 2
    published_shift: bool = False
    scale: tuple[float, float] = (1.0, 1.0)
    crop: tuple[int, int] | None = None
    seed: int = 0

    @property
    def crops(self) -> bool:
        """Whether images are scaled or cropped, for which their labels must have their size."""
        return self.scale != (1.0, 1.0) or self.crop is not None

    def draw(self, epoch: int, index: int) -> Draw:
        """What is done to an image in an epoch."""
        # The closing 1 keeps this stream apart from the data order's, (seed, epoch): numpy pads
        # seeds with zeros.
        rng = np.random.default_rng((self.seed, epoch, index, 1))
        flip = bool(rng.random() < 0.5) and self.flip
        tx, ty = (int(t) for t in rng.integers(-self.shift, self.shift + 1, size=2))
        # What the paper doesn't have is drawn last: it leaves the paper's draws as they are.
        scale = float(rng.uniform(*self.scale))
        y, x = rng.random(2).tolist()
        return Draw(flip, tx, ty, scale, (y, x))

    def __call__(
        self, image: Tensor, label: Tensor, draw: Draw, ignore: int
    ) -> tuple[Tensor, Tensor]:
        """Apply `draw` to image (3, H, W) and label (ceil(H/4), ceil(W/4)) or (H, W), uint8.

        Image and label move together (exactly so where H and W are multiples of 4); what comes into
        view is black and ignored. To scale or crop, the label must have the image's size.
        """
        if self.crops:
            size = self.crop or (image.shape[-2], image.shape[-1])
            image, label = scale_and_crop(image, label, draw.scale, size, draw.place, ignore)
        if draw.flip:
            image, label = image.flip(-1), label.flip(-1)
        if draw.tx == 0 and draw.ty == 0:
            return image, label
        image_step = 1 if self.published_shift else 4
        label_step = 4 if label.shape[-2:] == image.shape[-2:] else 1
        image = shift(image, image_step * draw.tx, image_step * draw.ty, 0)
        label = shift(label, label_step * draw.tx, label_step * draw.ty, ignore)
        if self.published_shift:
            if draw.tx < 0:
                label[..., draw.tx :] = 0
            if draw.ty < 0:
                label[..., draw.ty :, :] = 0
        return image, label
