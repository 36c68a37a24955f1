"""Houses, walls and fences along the road."""

from typing import Any

from datasets.synthetic.canvas import BARS, BLOCKS, FACADE, Canvas
from datasets.synthetic.palette import (
    BUILDING,
    FENCE,
    FENCES,
    GLASSES,
    PLASTER,
    ROOFS,
    WALL,
    Colour,
)


def facade(c: Canvas) -> tuple[Colour, dict[str, Any]]:
    """The colour of a house, and its windows."""
    params = (c.uniform(1.8, 3.8), c.uniform(2.8, 3.6), c.uniform(0.35, 0.75), c.uniform(0.45, 0.7))
    rough, grain = c.uniform(0.05, 0.16), c.pick((3.0, 8.0, 16.0))
    kind = {
        "pattern": FACADE,
        "params": params,
        "second": c.tone(GLASSES),
        "rough": rough,
        "grain": grain,
    }
    return c.tone(PLASTER, 0.3, odd=0.04), kind


def house(c: Canvas, x: float, z0: float, z1: float, side: int, tall: float, pitched: bool) -> None:
    c.sunny, deep, out = 1.0, c.uniform(8, 14) * side, 0.25 * side
    colour, windows = facade(c)
    if pitched:
        ridge, top = x + deep / 2, tall + abs(deep) * 0.35
        slope = [
            (x - out, tall - 0.1, z0),
            (x - out, tall - 0.1, z1),
            (ridge, top, z1),
            (ridge, top, z0),
        ]
        c.face(slope, c.tone(ROOFS), BUILDING, rough=0.15)
        c.face([(x, tall, z0), (x + deep, tall, z0), (ridge, top, z0)], colour, BUILDING, rough=0.1)
    c.upright(x, x + deep, 0, tall, z0, colour, BUILDING, **windows)
    c.along(x, z0, z1, 0, tall, colour, BUILDING, **windows)
    if not pitched:
        c.along(x - out, z0, z1, tall - 0.5, tall, c.tone([colour]), BUILDING)  # the cornice
    if c.chance(0.5):  # shops
        y, params = c.uniform(2.6, 3.3), (c.uniform(2, 4), 3.3, 0.8, 0.68)
        c.along(
            x,
            z0,
            z1,
            0,
            y,
            c.tone(PLASTER),
            BUILDING,
            pattern=FACADE,
            params=params,
            second=c.pick(GLASSES),
        )
        if c.chance(0.5):
            c.along(x - out / 2, z0, z1, y, y + 0.6, c.paint(), BUILDING, glow=0.3 * c.night)


def fence(c: Canvas, x: float, z0: float, z1: float) -> None:
    tall, colour = c.uniform(0.8, 2.2), c.tone(FENCES, 0.3)
    c.stand(x, (z0 + z1) / 2)
    params = (c.uniform(0.13, 0.3), tall, c.pick((0.3, 0.45, 0.75)), 0)
    c.along(x, z0, z1, 0.05, tall, colour, FENCE, pattern=BARS, params=params, rough=0.15)


def wall(c: Canvas, x: float, z0: float, z1: float) -> None:
    tall, colour = c.uniform(0.8, 2.2), c.tone(PLASTER, 0.3)
    c.stand(x, (z0 + z1) / 2)
    params, joints = (c.uniform(0.5, 2.5), c.uniform(0.25, 0.9), 0.05, 0), c.tone([colour], 0.4)
    c.along(
        x,
        z0,
        z1,
        0,
        tall,
        colour,
        WALL,
        pattern=BLOCKS,
        params=params,
        second=joints,
        rough=0.14,
        grain=8,
    )
    c.along(x, z0, z1, tall, tall + 0.12, c.tone([colour]), WALL)
