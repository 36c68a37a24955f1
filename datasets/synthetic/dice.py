"""Random numbers and colours."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from datasets.synthetic.palette import PAINTS, Colour

T = TypeVar("T")


class Dice:
    def __init__(self, rng: np.random.Generator):
        self.rng = rng

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self.rng.random()

    def times(self, low: float, high: float) -> range:
        """Something to loop over that often."""
        return range(int(self.uniform(low, high)))

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def pick(self, options: Sequence[T]) -> T:
        return options[int(self.rng.random() * len(options))]

    def tone(self, palette: Sequence[Colour], spread: float = 0.2, odd: float = 0.0) -> Colour:
        """A colour like those of the palette, brighter or darker by `spread`; a share of `odd` is any colour at all."""
        red, green, blue = self.pick(palette)
        if self.chance(odd):
            red, green, blue = (self.rng.random(3) * 0.6 + 0.1).tolist()
        factor = 1 + self.uniform(-spread, spread)
        return (
            red * factor + self.uniform(-0.02, 0.02),
            green * factor,
            blue * factor + self.uniform(-0.02, 0.02),
        )

    def paint(self) -> Colour:
        """A colour that people give to things."""
        return self.tone(PAINTS, odd=0.1)
