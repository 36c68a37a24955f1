"""What happens to an image and its label between the files and the network.

Resize once (PIL, exactly as published), then flip and shift at random, as the paper does; on request also
change colours, scale and crop. Because every random step comes after the resize, the resized images can be
cached without changing a number.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from errors import UserError


def quarter(size: int) -> int:
    """Length of a label (and of the logits, stride 4) for an image of length `size`: ceil(size / 4)."""
    return -(-size // 4)


def label_size(size: tuple[int, int], *, full: bool = False) -> tuple[int, int]:
    """(H, W) of the label of an image of `size`: a quarter, or as large."""
    return size if full else (quarter(size[0]), quarter(size[1]))


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


def resize_label(label: np.ndarray, size: tuple[int, int], *, full: bool = False) -> np.ndarray:
    """Nearest from the label's own size to a quarter of the resized image's `size` (H, W), or to all of it.

    Label pixel i takes the source pixel floor((i + 0.5) · H0 / h): 8i + 4 for 1024 -> 128.
    """
    h, w = label_size(size, full=full)
    return np.asarray(Image.fromarray(label).resize((w, h), Image.Resampling.NEAREST))


def to_float(images: Tensor) -> Tensor:
    """uint8 RGB -> float32 in [0, 1]; the paper's models take no mean/std normalisation."""
    return images.to(torch.float32).div_(255)


def shift(x: Tensor, tx: int, ty: int, fill: int) -> Tensor:
    """Move the content of (…, H, W) right by `tx` and down by `ty` (negative: left, up); same size.

    The strips that open are set to `fill`.
    """
    height, width = x.shape[-2:]
    tx, ty = max(-width, min(tx, width)), max(-height, min(ty, height))  # no more can be cut off
    return F.pad(x, (tx, -tx, ty, -ty), value=fill)


def change_colours(image: Tensor, brightness: float, contrast: float, saturation: float) -> Tensor:
    """Multiply brightness, then the distance from the mean grey, then that from each pixel's grey.

    Args:
        image: (3, H, W) uint8 RGB, and so is the result; 1 leaves a property as it is.
    """
    red, green, blue = (
        x / image[0].numel() for x in image.sum((1, 2), dtype=torch.int64).tolist()
    )  # exact sums
    mean = _grey(red, green, blue)
    x = image.to(torch.float32) * (brightness * contrast) + (1 - contrast) * brightness * mean
    x = x * saturation + _grey(*x) * (1 - saturation)
    return x.round_().clamp_(0, 255).to(torch.uint8)


def _grey(red: Any, green: Any, blue: Any) -> Any:
    return 0.299 * red + 0.587 * green + 0.114 * blue  # ITU-R BT.601


def zoom(
    image: Tensor,
    label: Tensor,
    scale: float,
    size: tuple[int, int],
    place: tuple[float, float],
    ignore: int,
) -> tuple[Tensor, Tensor]:
    """A window onto the scaled image and its label.

    Where the scaled image is smaller than the window, it lies in it on black and ignore.

    Args:
        image, label: (3, H, W) and (H, W) uint8.
        scale: of the image.
        size: (h, w) of the window and of the results.
        place: where the window lies between top and bottom, left and right, in [0, 1).
    """
    rows, columns = (
        _visible(*numbers)
        for numbers in zip(image.shape[1:], (scale, scale), size, place, strict=True)
    )
    shape = rows.to.stop - rows.to.start, columns.to.stop - columns.to.start
    box = columns.begin, rows.begin, columns.end, rows.end

    def resample(x: np.ndarray, how: Image.Resampling) -> np.ndarray:
        return np.asarray(Image.fromarray(x).resize(shape[::-1], how, box))

    new_image, new_label = image.new_zeros(3, *size), label.new_full(size, ignore)
    colours = resample(
        np.ascontiguousarray(image.permute(1, 2, 0).numpy()), Image.Resampling.BILINEAR
    )
    new_image[:, rows.to, columns.to] = torch.tensor(colours).permute(2, 0, 1)
    new_label[rows.to, columns.to] = torch.tensor(
        resample(label.contiguous().numpy(), Image.Resampling.NEAREST)
    )
    return new_image, new_label


class _Span(NamedTuple):
    """One direction of a window: the source pixels from `begin` to `end` fill its part `to`."""

    to: slice
    begin: float
    end: float


def _visible(length: int, scale: float, window: int, place: float) -> _Span:
    scaled = max(round(length * scale), 1)
    start = int(
        place * (abs(scaled - window) + 1)
    )  # of the window in the image, or of this in the window
    if scaled < window:
        return _Span(slice(start, start + scaled), 0, length)
    return _Span(
        slice(0, window), start * length / scaled, min((start + window) * length / scaled, length)
    )


class Draw(NamedTuple):
    """One random augmentation. `tx`, `ty` count label pixels."""

    flip: bool
    tx: int
    ty: int
    scale: float = 1.0
    place: tuple[float, float] = (0.0, 0.0)
    """Of the crop, see `zoom`."""
    colours: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Brightness, contrast, saturation."""


@dataclass(frozen=True)
class Augmentation:
    """Random flip and shift (the paper's only augmentation), scale, crop and colours. Every draw is a pure
    function of (seed, epoch, index), so neither the number of workers nor an interruption changes it.
    """

    flip: bool = True
    """Mirror every other image, on average."""
    shift: int = 2
    """Largest shift in x and in y, in label pixels; one label pixel is four image pixels. 0: none."""
    published_shift: bool = False
    """Shift as the published code does: the image by t pixels, its quarter-size label by t *label*
    pixels (up to 6 image pixels apart), and where the label moves left or up, road (0) fills the
    strip."""
    scale: tuple[float, float] = (1.0, 1.0)
    """Smallest and largest scale; what is drawn between them is cropped, or padded, to `crop`."""
    crop: tuple[int, int] | None = None
    """(H, W) to crop at random; None: the image's own size."""
    jitter: float = 0.0
    """Brightness, contrast and saturation are multiplied by 1 − jitter … 1 + jitter."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.shift < 0 or self.seed < 0:
            raise UserError(
                f"the shift ({self.shift}) and the seed ({self.seed}) must not be negative"
            )
        if self.published_shift and self.zooms:
            raise UserError(
                "the published shift knows quarter-size labels alone; it goes with no scale and no crop"
            )

    @property
    def zooms(self) -> bool:
        """Whether images are scaled or cropped, for which their labels must have their size."""
        return self.scale != (1.0, 1.0) or self.crop is not None

    def draw(self, epoch: int, index: int) -> Draw:
        # The closing 1 keeps this stream apart from the data order's, (seed, epoch): numpy pads
        # seeds with zeros.
        rng = np.random.default_rng((self.seed, epoch, index, 1))
        mirrored = bool(rng.random() < 0.5) and self.flip
        tx, ty = (int(t) for t in rng.integers(-self.shift, self.shift + 1, size=2))
        # What the paper doesn't have is drawn last, and all of it: no part changes another's draws.
        scale, (y, x) = float(rng.uniform(*self.scale)), rng.random(2).tolist()
        brightness, contrast, saturation = rng.uniform(1 - self.jitter, 1 + self.jitter, 3).tolist()
        place = (y, x) if self.zooms else (0.0, 0.0)
        return Draw(mirrored, tx, ty, scale, place, (brightness, contrast, saturation))

    def __call__(
        self, image: Tensor, label: Tensor, draw: Draw, ignore: int
    ) -> tuple[Tensor, Tensor]:
        """Apply `draw` to image (…, 3, H, W) and label (…, ceil(H/4), ceil(W/4)) or (…, H, W), on any device.

        Image and label move together (exactly so where H and W are multiples of 4); what comes
        into view is black and ignored. To change colours, scale or crop it takes a single image on the
        CPU; for the latter two, with a label of its size.
        """
        mirrored, tx, ty, scale, place, colours = draw
        if colours != (1.0, 1.0, 1.0):
            image = change_colours(image, *colours)
        if self.zooms:
            height, width = self.crop or image.shape[-2:]
            image, label = zoom(image, label, scale, (height, width), place, ignore)
        if mirrored:
            image, label = image.flip(-1), label.flip(-1)
        if tx == 0 and ty == 0:
            return image, label
        step = 1 if self.published_shift else 4
        label_step = 4 if label.shape[-2:] == image.shape[-2:] else 1
        image = shift(image, step * tx, step * ty, 0)
        label = shift(label, label_step * tx, label_step * ty, ignore)
        if self.published_shift:
            if tx < 0:
                label[..., tx:] = 0
            if ty < 0:
                label[..., ty:, :] = 0
        return image, label
