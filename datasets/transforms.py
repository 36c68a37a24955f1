"""What happens to an image and its label between the files and the network.

Resize once (PIL, exactly as published), then flip and shift at random. Because every random step
comes after the resize, the resized images can be cached without changing a number.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cli import UserError


def quarter(size: int) -> int:
    """Length of a label (and of the logits, stride 4) for an image of length `size`: ceil(size / 4)."""
    return -(-size // 4)


def resized_size(height: int, size: tuple[int, int]) -> tuple[int, int]:
    """(H, W) after scaling an image of `size` (H0, W0) so that its shorter side is `height`.

    The longer side is rounded down: 1080×1920 becomes 512×910.
    """
    short, long = min(size), max(size)
    other = int(height * long / short)
    return (height, other) if size[0] <= size[1] else (other, height)


def resize_image(image: Image.Image, height: int) -> Image.Image:
    """Bilinear (antialiased) so that the shorter side is `height`; untouched if it is that already."""
    h, w = resized_size(height, (image.height, image.width))
    if (image.width, image.height) == (w, h):
        return image
    return image.resize((w, h), Image.Resampling.BILINEAR)


def resize_label(label: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Nearest from the label's own size to a quarter of the resized image's `size` (H, W).

    Label pixel i takes the source pixel floor((i + 0.5) · H0 / h): 8i + 4 for 1024 -> 128.
    """
    h, w = quarter(size[0]), quarter(size[1])
    return np.asarray(Image.fromarray(label).resize((w, h), Image.Resampling.NEAREST))


def to_float(images: Tensor) -> Tensor:
    """uint8 RGB -> float32 in [0, 1]; the paper's models take no mean/std normalisation."""
    return images.to(torch.float32).div_(255)


def flip(x: Tensor) -> Tensor:
    """Mirror (…, H, W) left to right."""
    return x.flip(-1)


def shift(x: Tensor, tx: int, ty: int, fill: int) -> Tensor:
    """Move the content of (…, H, W) right by `tx` and down by `ty` (negative: left, up); same size.

    The strips that open are set to `fill`.
    """
    height, width = x.shape[-2:]
    rows, columns = max(height - abs(ty), 0), max(width - abs(tx), 0)
    y_to, x_to, y_from, x_from = max(ty, 0), max(tx, 0), max(-ty, 0), max(-tx, 0)
    out = torch.full_like(x, fill)
    out[..., y_to : y_to + rows, x_to : x_to + columns] = x[..., y_from : y_from + rows, x_from : x_from + columns]
    return out


class Draw(NamedTuple):
    """One random augmentation. `tx`, `ty` count label pixels."""

    flip: bool
    tx: int
    ty: int


@dataclass(frozen=True)
class Augmentation:
    """Random flip and shift (the paper's only augmentation). Every draw is a pure function of
    (seed, epoch, index), so neither the number of workers nor an interruption changes it.
    """

    flip: bool = True
    """Mirror every other image, on average."""
    shift: int = 2
    """Largest shift in x and in y, in label pixels; one label pixel is four image pixels. 0: none."""
    published_shift: bool = False
    """Shift as the published code does: the image by t pixels, its quarter-size label by t *label*
    pixels (up to 6 image pixels apart), and where the label moves left or up, road (0) fills the
    strip."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.shift < 0 or self.seed < 0:
            raise UserError(f"the shift ({self.shift}) and the seed ({self.seed}) must not be negative")

    def draw(self, epoch: int, index: int) -> Draw:
        # The closing 1 keeps this stream apart from the data order's, (seed, epoch): numpy pads
        # seeds with zeros.
        rng = np.random.default_rng((self.seed, epoch, index, 1))
        mirrored = bool(rng.random() < 0.5) and self.flip
        tx, ty = (int(t) for t in rng.integers(-self.shift, self.shift + 1, size=2))
        return Draw(mirrored, tx, ty)

    def __call__(self, image: Tensor, label: Tensor, draw: Draw, ignore: int) -> tuple[Tensor, Tensor]:
        """Apply `draw` to image (…, 3, H, W) and label (…, ceil(H/4), ceil(W/4)), on any device.

        Image and label move together (exactly so where H and W are multiples of 4); what comes
        into view is black and ignored.
        """
        mirrored, tx, ty = draw
        if mirrored:
            image, label = flip(image), flip(label)
        if tx == 0 and ty == 0:
            return image, label
        step = 1 if self.published_shift else 4
        image, label = shift(image, step * tx, step * ty, 0), shift(label, tx, ty, ignore)
        if self.published_shift:
            if tx < 0:
                label[..., tx:] = 0
            if ty < 0:
                label[..., ty:, :] = 0
        return image, label
