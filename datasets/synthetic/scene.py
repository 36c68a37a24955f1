"""One scene, from random numbers to an image and its labels."""

import numpy as np

from datasets.synthetic.canvas import Canvas
from datasets.synthetic.shading import Pixels, as_image
from datasets.synthetic.street import Street


def draw_scene(
    rng: np.random.Generator, height: int, width: int, weather: str = "clear"
) -> tuple[np.ndarray, np.ndarray]:
    """One scene: image uint8 (height, width, 3) RGB and labels uint8 (height, width), train ids, 255 ignored.

    A function of the state of `rng` and of the other arguments alone; with another of the `WEATHERS`
    the scene and its labels are the same, and only the image differs.
    """
    c = Canvas(rng, 2 * height, 2 * width, weather)
    Street(c).paint()
    pixels = Pixels(c)
    pixels.shade()
    image = np.asarray(
        as_image(pixels.colour * np.float32(c.uniform(0.95, 1.2))).reduce(2), np.float32
    )
    image = image + rng.standard_normal((height, width, 1), np.float32) * c.uniform(1.5, 4.5)
    return np.clip(image, 0, 255).astype(np.uint8), np.ascontiguousarray(pixels.labels[::2, ::2])
