"""The weathers, and the skies that come with them."""

from typing import NamedTuple

WEATHERS = ("clear", "fog", "night", "rain", "snow")


class Sky(NamedTuple):
    colours: str  # at the horizon, at the zenith, on everything
    sun: float
    clouds: tuple[float, float]  # from, to
    fog: tuple[float, float]  # extinction per metre; from, to


SKIES = {
    "sunny": Sky("d6dfe8 4f82d1 969ead", 0.9, (0, 0.75), (0.001, 0.003)),
    "overcast": Sky("d2d9e2 a2a9b0 d2d4d7", 0.15, (0.9, 0.9), (0.002, 0.005)),
    "fog": Sky("c7cdd3 aab0b5 b6bbc1", 0.06, (0.5, 0.5), (0.018, 0.055)),
    "night": Sky("14161e 08090c 1f212d", 0.0, (0, 0.4), (0.002, 0.004)),
    "rain": Sky("9da2a7 82868a 8a8e92", 0.04, (0.5, 0.5), (0.006, 0.012)),
    "snow": Sky("d0d7dd b0b5ba c2c8cd", 0.1, (0.5, 0.5), (0.004, 0.014)),
}
