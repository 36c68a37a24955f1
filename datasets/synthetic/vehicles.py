"""Vehicles: the outline of a side, drawn out across the width."""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from datasets.synthetic.canvas import SIDES, Canvas, Outline, Point
from datasets.synthetic.palette import (
    AMBER,
    BLACK,
    CAR,
    GLASS,
    LAMP,
    RED,
    STEEL,
    TRAIN,
    TRUCK,
    TYRE,
    WHITE,
    Colour,
)

# The outline of a car's side, from tail to nose, as fractions of length and height; and the point where the cabin
# begins, with the rear window. It ends at point 6, with the windscreen.
CARS: dict[str, tuple[Outline, int]] = {
    "saloon": (
        [(-0.5, 0.16), (-0.5, 0.6), (-0.47, 0.68), (-0.36, 0.7), (-0.23, 0.98), (0.07, 1), (0.23, 0.69), (0.45, 0.6),
         (0.5, 0.48), (0.5, 0.16)], 3
    ),
    "hatchback": (
        [(-0.5, 0.16), (-0.5, 0.5), (-0.48, 0.66), (-0.4, 0.95), (-0.3, 1), (0.06, 1), (0.23, 0.68), (0.45, 0.6),
         (0.5, 0.46), (0.5, 0.16)], 2
    ),
    "van": (
        [(-0.5, 0.14), (-0.5, 0.4), (-0.5, 0.62), (-0.48, 0.98), (-0.46, 1), (0.24, 1), (0.4, 0.62), (0.47, 0.52),
         (0.5, 0.42), (0.5, 0.14)], 2
    ),
}  # fmt: skip


def mean(outline: Outline) -> tuple[float, float]:
    return sum(along for along, _ in outline) / len(outline), sum(up for _, up in outline) / len(
        outline
    )


@dataclass
class Vehicle:
    """Paints in a vehicle's own metres: along (forward), across (to its right) and up. Outlines are (along, up)."""

    c: Canvas
    x: float
    z: float
    heading: float  # 0 drives away from the camera
    label: int
    length: float
    width: float
    tall: float
    belt: float = math.inf  # above this it is narrower

    def __post_init__(self) -> None:
        self.sin, self.cos, self.half = (
            math.sin(self.heading),
            math.cos(self.heading),
            self.width / 2,
        )
        self.c.stand(self.x, self.z)
        corners = ((-0.5, -0.5), (-0.5, 0.5), (0.5, 0.5), (0.5, -0.5))
        self.c.shadow(
            [self.at(a * self.length, b * self.width, 0) for a, b in corners], self.tall * 0.8, 0.25
        )

    def at(self, along: float, across: float, up: float) -> Point:
        return (
            self.x + along * self.sin + across * self.cos,
            up,
            self.z + along * self.cos - across * self.sin,
        )

    def half_width(self, up: float) -> float:
        return self.half * (0.84 if up > self.belt else 1.0)

    def sides(self, outline: Outline, colour: Colour, out: float = 0.0, **kind: Any) -> None:
        """The same polygon on both flanks, `out` metres off them."""
        for side in SIDES:
            points = [
                self.at(along, side * (self.half_width(up) + out), up) for along, up in outline
            ]
            self.c.face(points, colour, self.label, inside=self.at(0, 0, self.tall / 2), **kind)

    def hull(self, outline: Outline, paint: Colour, special: dict[int, Colour]) -> None:
        """What lies between the flanks, far parts first; `special` has edges of another colour."""
        along, up = mean(outline)
        middle = self.at(along, 0, up)
        edges = [
            (-self.cos * (a + b), i, (a, y), (b, v))
            for i, ((a, y), (b, v)) in enumerate(itertools.pairwise(outline))
        ]
        for _, i, (a, y), (b, v) in sorted(edges):
            w, u = self.half_width(y), self.half_width(v)
            points = [self.at(a, -w, y), self.at(a, w, y), self.at(b, u, v), self.at(b, -u, v)]
            self.c.face(
                points, special.get(i, paint), self.label, inside=middle, rough=0.03, grain=4
            )

    def body(self, outline: Outline, paint: Colour, special: dict[int, Colour]) -> None:
        """The hull and both flanks."""
        self.hull(outline, paint, special)
        self.sides(outline, paint, rough=0.04)

    def panel(
        self,
        along: float,
        left: float,
        right: float,
        low: float,
        high: float,
        colour: Colour,
        glow: float = 0.0,
    ) -> bool:
        """A rectangle on the front or the back; answers whether that is to be seen."""
        points = [
            self.at(along, a, y)
            for a, y in ((left, low), (right, low), (right, high), (left, high))
        ]
        return self.c.face(points, colour, self.label, inside=self.at(0, 0, low), glow=glow)

    def fittings(self, low: float, lit: bool, wheels: Iterable[float], radius: float) -> None:
        """Wheels; lamps, number plates and bumpers at both ends."""
        angles = [2 * math.pi * i / 12 for i in range(12)]
        for spot, (r, colour) in itertools.product(
            wheels, ((radius, TYRE), (radius * 0.62, STEEL))
        ):
            self.sides(
                [(spot + r * math.cos(t), radius + r * math.sin(t)) for t in angles], colour, 0.01
            )
        for end, lamp, glow in ((-1, RED, 0.25), (1, WHITE, 0.5)):
            along, shine = (
                end * (self.length / 2 + 0.01),
                glow * lit * (2.2 if self.c.night else 1.0),
            )
            if self.panel(along, -self.half, self.half, low * 0.5, low * 0.8, TYRE):
                for side in SIDES:
                    self.panel(
                        along,
                        side * self.half * 0.66,
                        side * self.half * 0.96,
                        low,
                        low + 0.17,
                        lamp,
                        shine,
                    )
                self.panel(along, -0.26, 0.26, low * 0.86, low * 0.86 + 0.13, WHITE)


def car(c: Canvas, x: float, z: float, heading: float, lit: bool) -> None:
    name, paint = c.pick(("saloon", "hatchback", "hatchback", "van")), c.paint()
    shape, rear = CARS[name]
    tall = c.uniform(1.38, 1.62) + 0.35 * (name == "van")
    length, width = c.uniform(3.7, 4.9), c.uniform(1.68, 1.9)
    v = Vehicle(c, x, z, heading, CAR, length=length, width=width, tall=tall, belt=0.74 * tall)
    outline = [(a * length, y * tall) for a, y in shape]
    cabin = outline[rear:7]
    v.hull(outline, paint, {rear: GLASS, 5: GLASS})
    v.sides(cabin, paint)
    v.sides([(a, min(y, 0.7 * tall)) for a, y in outline], paint, rough=0.03)
    ma, my = mean(cabin)
    v.sides([(ma + (a - ma) * 0.86, my + (y - my) * 0.72) for a, y in cabin], GLASS, 0.01)
    if c.pixels_tall(tall, z) > 14:
        back, front, low, high = ma - 0.04, ma + 0.06, my - 0.2, tall * 0.96
        v.sides(
            [(back, low), (front, low), (front, high), (back, high)], paint, 0.02
        )  # between the doors
        v.fittings(0.42 * tall, lit, (-0.31 * length, 0.31 * length), c.uniform(0.29, 0.35))


def coach(c: Canvas, x: float, z: float, heading: float, label: int) -> None:
    """A bus, or a tram of two cars: long boxes with a band of windows."""
    tram, length, tall, paint = label == TRAIN, c.uniform(10, 14), c.uniform(2.9, 3.5), c.paint()
    lower, panes = c.pick((paint, c.paint())), int(length / c.uniform(1.2, 1.9))
    half, nose, roof, sill, width = (
        length / 2,
        0.9 if tram else 0.25,
        tall - 0.5,
        1.2,
        c.uniform(2.4, 2.6),
    )
    rear = [(-half, 0.3), (-half, sill), (-half + nose * 0.4, roof), (-half + nose, tall)]
    outline = rear + [(-a, y) for a, y in reversed(rear)]
    for part in (1, 0) if tram else (0,):  # the far car first
        v = Vehicle(
            c, x, z + part * (length + 0.4), heading, label, length=length, width=width, tall=tall
        )
        v.body(outline, paint, {0: lower, 1: GLASS, 5: GLASS, 6: lower})
        v.sides([(-half, 0.3), (-half, sill), (half, sill), (half, 0.3)], lower, rough=0.03)
        for i in range(panes):
            a, b = (
                -half + nose * 0.6 + (length - 1.2 * nose) * (i + t) / panes for t in (0.08, 0.92)
            )
            low = 0.45 if not tram and i in (panes - 1, panes // 2) else 1.3  # doors
            pane = [(a, low), (a, roof), (b, roof), (b, low)]
            v.sides(pane, LAMP if c.night else GLASS, 0.01, glow=0.3 * c.night)
        for end in SIDES:  # where it goes
            v.panel(
                end * (half - nose * 0.3 + 0.05), -0.5, 0.5, tall - 0.42, tall - 0.2, AMBER, 0.5
            )
        v.fittings(0.62, True, () if tram else (-0.3 * length, 0.33 * length), 0.48)


def truck(c: Canvas, x: float, z: float, heading: float) -> None:
    tall, paint, load = c.uniform(2.7, 3.7), c.paint(), c.paint()
    length, width = c.uniform(6, 10.5), c.uniform(2.2, 2.55)
    v = Vehicle(c, x, z, heading, TRUCK, length=length, width=width, tall=tall)
    h, top = length / 2, min(tall - 0.1, c.uniform(2.3, 2.8))
    cab = [
        (h - 1.9, 0.45),
        (h - 1.9, top),
        (h - 0.5, top),
        (h - 0.12, top * 0.58),
        (h, top * 0.52),
        (h, 0.35),
    ]
    window = [
        (h - 1.5, top * 0.6),
        (h - 1.5, top * 0.92),
        (h - 0.6, top * 0.92),
        (h - 0.3, top * 0.6),
    ]
    chassis = [(-h, 0.4), (-h, 0.9), (h - 0.1, 0.9), (h - 0.1, 0.4)]
    box = [(-h, 0.85), (-h, tall), (h - 2.1, tall), (h - 2.1, 0.85)]
    parts = [(cab, paint), (chassis, TYRE), (box, load)]
    for outline, colour in parts if v.cos > 0 else reversed(parts):  # far parts first
        v.body(outline, colour, {2: GLASS} if outline is cab else {})
        if outline is cab:
            v.sides(window, GLASS, 0.01)
    if c.chance(0.5):  # lettering
        low, high = sorted((c.uniform(1.2, tall), c.uniform(1.2, tall)))
        v.sides(
            [(-h * 0.8, low), (-h * 0.8, high), (h * 0.3, high), (h * 0.3, low)], c.paint(), 0.01
        )
    v.panel(-h - 0.01, -0.03, 0.03, 0.9, tall, BLACK)  # between the doors
    v.fittings(0.6, True, (-0.32 * length, -0.2 * length, h - 1.0), 0.48)
