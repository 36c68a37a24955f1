"""A small procedural road-scene data set in the layout of Cityscapes or ACDC; nothing to download.

    python -m datasets.synthetic --output data/synthetic --train 400 --val 80
    python -m datasets.synthetic --output data/weather --dataset ACDC

How a picture comes about: a street is laid out in metres (`Street`) and seen through a pinhole camera behind
a windscreen. Its polygons are painted far to near into one buffer of face numbers (`Canvas`). Then all pixels
are shaded at once (`Pixels`): the plane of a pixel's face gives its depth and its place on the surface, those
give texture, windows, light, shadow, fog and snow. Images are drawn at twice their size and averaged down,
labels are every other pixel. Colours are drawn anew for every object and shared between classes, so that
shape, place and texture tell classes apart and colour alone does not.
"""

import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

import cli

GENERATOR = 1  # raise it when the same settings give other pictures
ROAD, SIDEWALK, BUILDING, WALL, FENCE, POLE, TRAFFIC_LIGHT, TRAFFIC_SIGN, VEGETATION, TERRAIN = range(10)
SKY, PERSON, RIDER, CAR, TRUCK, BUS, TRAIN, MOTORCYCLE, BICYCLE = range(10, 19)
IGNORE = 255
WEATHERS = ("clear", "fog", "night", "rain", "snow")
CITIES = {"train": ("altstadt", "neustadt", "weststadt"), "val": ("hafen",)}
PLAIN, FACADE, BLOCKS, BARS, LEAVES, SPOKES = range(6)  # patterns; from BARS on, what is behind shows through
NEAR, FAR = 0.7, 130.0  # metres
SIDES = (-1, 1)  # left and right

Point = tuple[float, float, float]  # x to the right of the road's middle, y up from the ground, z ahead; metres
Outline = list[tuple[float, float]]
Colour = tuple[float, float, float]  # RGB in 0..1


def rgb(text: str) -> tuple[Colour, ...]:
    """Colours from hexadecimal numbers."""
    return tuple((int(t[:2], 16) / 255, int(t[2:4], 16) / 255, int(t[4:], 16) / 255) for t in text.split())


PLASTER = rgb("bfb399 99543f 9e9991 ccb880 736b66 d9d6cc 8c99a8 b8856b a86850 c9a88c 8f8a70")
ROOFS, GLASSES, METALS = rgb("733d2e 4d4747 5c4d42"), rgb("29303b 475461 66788a"), rgb("6b7073 333b38 99998f")
PAINTS = rgb("16171e 2a2c30 4d4f54 8a8d91 b0b2b5 dcdcd8 f0efea 8c1c1c 1d3a6e 2f5d8c 1f4a33 7a6a4f 5e1f2b b5651d")
CLOTHES = rgb("1a1a20 2b3350 4a4a4a 7a6a58 8c2f2f 2f5a44 c8c4b8 3f5f8a b08040 6a4a6a d0d0d4 25303a")
LEAF, BARK = rgb("42692b 58732d 325428 486440 8a702a 7c4a2a 50783a"), rgb("4d4033 5e5548")
SKIN, GRASS = rgb("d9a88c b38061 6b4733"), rgb("4d662e 616b33 73664c 80735c")
SLABS, FENCES = rgb("807d78 948070 6b6b6b 9e9989"), rgb("333833 735438 999999 d9d9d1 244733")
WHITE, RED, BLUE, YELLOW, GREEN, BLACK = rgb("eceae6 c21a1f 1a409e ebb81a 146640 17181a")
AMBER, LAMP, TYRE, GLASS, STEEL, HAZE = rgb("ff991a ffd999 121214 21282f 6b6e70 80858c")

# At the horizon, at the zenith, on everything; the sun; from and to how cloudy and foggy (extinction per metre).
SKIES: dict[str, tuple[str, float, tuple[float, float], tuple[float, float]]] = {
    "sunny": ("d6dfe8 4f82d1 969ead", 0.9, (0, 0.75), (0.001, 0.003)),
    "overcast": ("d2d9e2 a2a9b0 d2d4d7", 0.15, (0.9, 0.9), (0.002, 0.005)),
    "fog": ("c7cdd3 aab0b5 b6bbc1", 0.06, (0.5, 0.5), (0.018, 0.055)),
    "night": ("14161e 08090c 1f212d", 0.0, (0, 0.4), (0.002, 0.004)),
    "rain": ("9da2a7 82868a 8a8e92", 0.04, (0.5, 0.5), (0.006, 0.012)),
    "snow": ("d0d7dd b0b5ba c2c8cd", 0.1, (0.5, 0.5), (0.004, 0.014)),
}


class Canvas:
    """A camera in some weather, a buffer of face numbers, and a table (`FIELDS`) of what each face is made of."""

    FIELDS: tuple[str, ...] = (
        "a",
        "b",
        "c",
        "d",
        "red",
        "green",
        "blue",
        "red2",
        "green2",
        "blue2",
        "p0",
        "p1",
        "p2",
        "p3",
    )
    FIELDS += ("sun", "open", "label", "pattern", "rough", "grain", "glow")

    def __init__(self, rng: np.random.Generator, height: int, width: int, weather: str):
        self.rng, self.size, self.weather, self.night = rng, (width, height), weather, weather == "night"
        self.focal, self.centre = width * self.uniform(0.68, 0.95), width * self.uniform(0.42, 0.58)
        self.horizon = height / 2 - width * self.uniform(0.0, 0.05)
        self.eye, self.at = self.uniform(1.25, 1.7), 0.0  # the camera's height, and its place across the road
        self.bend = self.chance(0.5) * rng.normal(0, 0.0009)  # of the road: x shifts by bend * z²
        self.lights()
        self.ids, self.veils, self.shadows = (Image.new(mode, self.size) for mode in "IIL")
        self.draw_ids, self.draw_veils, self.draw_shadows = map(ImageDraw.Draw, (self.ids, self.veils, self.shadows))
        self.faces: list[tuple[float, ...]] = [(0, 0, 1, 1000, *[0.0] * 12, SKY, PLAIN, 0, 1, 0)]
        self.lamps: list[Point] = []
        self.sunny, self.veiled = 1.0, False  # does the sun reach what is painted next; is anything in `veils`

    def lights(self) -> None:
        fine = self.pick(("sunny", "sunny", "overcast"))
        sky = fine if self.weather == "clear" else self.weather
        colours, sun, clouds, fog = SKIES[sky]
        bright, azimuth, high = self.uniform(0.85, 1.15), self.uniform(0, 2 * math.pi), self.uniform(0.3, 1.1)
        self.air, self.zenith, self.ambient = np.array(rgb(colours), np.float32) * np.float32(bright)
        warm = self.uniform(-0.08, 0.12) + 0.14 * (high < 0.5)
        self.sunlight = np.array((1 + warm, 1, 1 - warm), np.float32) * np.float32(sun * bright)
        # Towards the sun, in camera coordinates: x right, y down, z ahead.
        self.sun = (math.cos(high) * math.cos(azimuth), -math.sin(high), math.cos(high) * math.sin(azimuth))
        self.clouds, self.fog = self.uniform(*clouds), self.uniform(*fog)
        damp = self.chance(0.4)
        self.wet = 0.75 if sky == "rain" else 0.4 * (damp and self.night)
        self.snow = self.uniform(0.7, 1.0) * (sky == "snow")

    # Random numbers.

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self.rng.random()

    def count(self, low: float, high: float) -> range:
        return range(int(self.uniform(low, high)))

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def pick(self, options: Sequence[Any]) -> Any:
        return options[int(self.rng.random() * len(options))]

    def tone(self, palette: Sequence[Colour], spread: float = 0.2, odd: float = 0.0) -> Colour:
        """A colour like those of the palette, brighter or darker by `spread`; one in `odd` is any colour at all."""
        red, green, blue = self.pick(palette)
        if self.chance(odd):
            red, green, blue = (self.rng.random(3) * 0.6 + 0.1).tolist()
        k = 1 + self.uniform(-spread, spread)
        return (red * k + self.uniform(-0.02, 0.02), green * k, blue * k + self.uniform(-0.02, 0.02))

    def paint(self) -> Colour:
        return self.tone(PAINTS, odd=0.1)

    # The camera.

    def view(self, p: Point) -> Point:
        """Street to camera coordinates: x right, y down, z ahead."""
        return (p[0] - self.at + self.bend * p[2] * p[2], self.eye - p[1], p[2])

    def project(self, points: list[Point]) -> Outline:
        """Pixels of a polygon in camera coordinates, cut off at the near plane; empty if out of sight."""
        if min(p[2] for p in points) < NEAR:
            kept = []
            for p, q in zip(points, points[1:] + points[:1], strict=True):
                if p[2] >= NEAR:
                    kept.append(p)
                if (p[2] >= NEAR) != (q[2] >= NEAR):
                    t = (NEAR - p[2]) / (q[2] - p[2])
                    kept.append((p[0] + t * (q[0] - p[0]), p[1] + t * (q[1] - p[1]), NEAR))
            points = kept
        f, cx, cy = self.focal, self.centre, self.horizon
        flat = [(cx + f * x / z, cy + f * y / z) for x, y, z in points]
        return flat if len(flat) > 2 and min(flat)[0] < self.size[0] and max(flat)[0] > 0 else []

    # Painting.

    def face(
        self, points: Sequence[Point], colour: Colour, label: int, *, pattern: int = PLAIN, second: Colour = BLACK,
        params: Sequence[float] = (0, 0, 0, 0), rough: float = 0.06, grain: float = 12.0, glow: float = 0.0,
        inside: Point | None = None,
    ) -> bool:  # fmt: skip
        """Paint a flat polygon over what is there; the keywords say how `Pixels` fills it.

        `inside` is a point behind the surface: where the camera is on that side too, nothing is painted
        and the answer is False.
        """
        seen, n = [self.view(p) for p in points], len(points)
        (x0, y0, z0), (x1, y1, z1), (x2, y2, z2) = seen[0], seen[n // 3], seen[2 * n // 3]
        ax, ay, az, bx, by, bz = x1 - x0, y1 - y0, z1 - z0, x2 - x0, y2 - y0, z2 - z0
        nx, ny, nz = ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx  # the plane's normal ...
        scale = math.copysign(math.sqrt(nx * nx + ny * ny + nz * nz) or 1.0, nx * x0 + ny * y0 + nz * z0)
        nx, ny, nz = nx / scale, ny / scale, nz / scale  # ... of length 1, away from the camera
        distance = nx * x0 + ny * y0 + nz * z0
        if inside is not None:
            x, y, z = self.view(inside)
            if nx * x + ny * y + nz * z <= distance:
                return False
        if flat := self.project(seen):
            sun = self.sunny * max(0.0, -nx * self.sun[0] - ny * self.sun[1] - nz * self.sun[2])
            surface = (sun, 0.78 + 0.22 * max(0.0, ny), label, pattern, rough, grain, glow)
            self.faces.append((nx, ny, nz, distance, *colour, *second, *params, *surface))
            if pattern >= BARS:
                self.draw_veils.polygon(flat, fill=len(self.faces) - 1)
                self.veiled = True
            else:
                self.draw_ids.polygon(flat, fill=len(self.faces) - 1)
                if self.veiled:
                    self.draw_veils.polygon(flat, fill=0)
        return True

    def upright(self, x0: float, x1: float, y0: float, y1: float, z: float, *what, **kind) -> None:
        """A rectangle that faces the camera."""
        self.face([(x0, y0, z), (x1, y0, z), (x1, y1, z), (x0, y1, z)], *what, **kind)

    def along(self, x: float, z0: float, z1: float, y0: float, y1: float, *what, **kind) -> None:
        """An upright rectangle along the road."""
        self.face([(x, y0, z0), (x, y0, z1), (x, y1, z1), (x, y1, z0)], *what, **kind)

    def rod(self, x0: float, y0: float, x1: float, y1: float, z: float, thick: float, *what, **kind) -> None:
        """A straight rod, as a rectangle that faces the camera."""
        k = thick / 2 / (math.hypot(x1 - x0, y1 - y0) or 1.0)
        dx, dy = (y0 - y1) * k, (x1 - x0) * k
        ends = [(x0 + dx, y0 + dy, z), (x1 + dx, y1 + dy, z), (x1 - dx, y1 - dy, z), (x0 - dx, y0 - dy, z)]
        self.face(ends, *what, **kind)

    def disc(self, x: float, y: float, z: float, rx: float, ry: float, n: int, *what, ragged=0.0, turn=0.0, **kind):
        """A polygon of n corners on an ellipse, or about it, that faces the camera."""
        radii = (1 + ragged * (self.rng.random(n) - 0.6)).tolist() if ragged else [1.0] * n
        angles = [turn + 2 * math.pi * i / n for i in range(n)]
        ring = [(x + rx * r * math.cos(t), y + ry * r * math.sin(t), z) for r, t in zip(radii, angles, strict=True)]
        self.face(ring, *what, **kind)

    def strip(self, x0: float, x1: float, z0: float, z1: float, *what, **kind) -> None:
        """A piece of ground along the road, following its bend."""
        z0 = max(z0, NEAR)
        if z1 > z0:
            zs = np.geomspace(z0, z1, 12 if self.bend and z1 - z0 > 5 else 2).tolist()
            self.face([(x0, 0, z) for z in zs] + [(x1, 0, z) for z in reversed(zs)], *what, **kind)

    def shadow(self, foot: Sequence[Point], tall: float, contact: float) -> None:
        """Darken the ground: away from the sun, and close around `foot`, the corners on which something stands."""
        k, (sx, _, sz) = min(-tall / self.sun[1], 40.0), self.sun
        cast = [(x - sx * k, 0.0, z - sz * k) for x, _, z in foot]
        mx, mz = (sum(p[i] for p in foot) / len(foot) for i in (0, 2))
        close = [(x + math.copysign(contact, x - mx), 0.0, z + math.copysign(contact, z - mz)) for x, _, z in foot]
        walls = [[foot[i - 1], cast[i - 1], cast[i], foot[i]] for i in range(len(foot))]
        jobs = [(points, 140) for points in (*walls, cast) if self.sunlight[0] > 0.3]
        for points, dark in jobs + [(close, 255)] * (contact > 0):
            if flat := self.project([self.view(p) for p in points]):
                self.draw_shadows.polygon(flat, fill=dark)

    def stand(self, x: float, z: float, wide: float = 0.0, tall: float = 0.0) -> None:
        """What is painted next stands here, and gets no sun if that is in a shadow."""
        px, py, pz = self.view((x, 0, max(z, 1.0)))
        u, v = int(self.centre + self.focal * px / pz), int(self.horizon + self.focal * py / pz)
        seen = 0 <= u < self.size[0] and 0 <= v < self.size[1]
        self.sunny = 0.15 if seen and self.shadows.getpixel((u, v)) == 140 else 1.0
        if wide:
            d = 0.15
            self.shadow(
                [(x - wide, 0, z - d), (x + wide, 0, z - d), (x + wide, 0, z + d), (x - wide, 0, z + d)], tall, 0.05
            )


# --- upright things: people, cycles, plants, street furniture --------------------------------------------------------


def person(c: Canvas, x: float, z: float, label: int = PERSON, saddle: float = 0.0) -> None:
    """A walker or, on a saddle of that height, a rider."""
    s = c.uniform(1.5, 1.9) * (0.68 if c.chance(0.1) and not saddle else 1.0)
    c.stand(x, z, 0.25, 0.8 * s)
    shirt, trousers = c.tone(CLOTHES, odd=0.1), c.tone(CLOTHES, odd=0.1)
    step, swing, wide = c.uniform(0.02, 0.22), c.uniform(-0.07, 0.07), s * c.uniform(0.115, 0.15)
    hips, foot = (saddle + 0.06, saddle * 0.35) if saddle else (0.48 * s, 0.04)
    neck, hem, hand = hips + 0.36 * s, hips - c.uniform(-0.08, 0.12) * s, hips + (0.16 * s if saddle else 0.02)
    top, sleeve = neck - 0.06 * s, c.tone([shirt])
    for side in SIDES:
        end = x + side * step
        c.rod(x + side * 0.05 * s, hips + 0.03, end, foot, z, 0.095 * s, trousers, label)
        c.rod(end, foot, end + 0.07, foot, z, 0.08, BLACK, label)
    body = [(-0.85, hem), (0.85, hem), (1.0, top), (0.5, neck), (-0.5, neck), (-1.0, top)]
    c.face([(x + wide * dx, y, z) for dx, y in body], shirt, label, rough=0.15)
    for side in SIDES:
        c.rod(x + side * wide * 0.98, top, x + side * (wide * 1.25 + swing), hand, z, 0.07 * s, sleeve, label)
    if c.chance(0.35) and not saddle:  # a bag
        c.rod(x + wide * c.pick(SIDES), hips, x + wide * 0.6, hips + 0.28 * s, z, 0.18 * s, c.paint(), label)
    c.disc(x, neck + 0.075 * s, z, 0.058 * s, 0.08 * s, 10, c.tone(SKIN), label)
    c.disc(x, neck + 0.11 * s, z, 0.064 * s, 0.055 * s, 10, c.tone(PAINTS if saddle else CLOTHES), label)


def cycle(c: Canvas, x: float, z: float, label: int, ridden: bool) -> None:
    """A bicycle or motorcycle, from the side or from behind."""
    paint, motor, way, sidelong = c.paint(), label == MOTORCYCLE, c.pick(SIDES), c.chance(0.45)
    r, half, seat = (0.31, 0.68, (-0.18, 0.78)) if motor else (0.34, 0.54, (-0.18, 0.92))
    c.stand(x, z, half if sidelong else 0.15, 0.7)
    if sidelong:
        hub, fork, bars, pedal = (-half, r), (half, r), (half - 0.16, 1.02), (-0.05, 0.3)
        for dx, y in (hub, fork):
            params = (c.view((x + way * dx, y, z))[0], y, r, 0.55 if motor else 0.8)
            c.disc(x + way * dx, y, z, r, r, 14, TYRE, label, pattern=SPOKES, params=params)
        if motor:
            tank = [(-half, 0.72), seat, (0.35, 0.9), (0.45, 0.5), pedal, (-half, 0.5)]
            c.face([(x + way * dx, y, z) for dx, y in tank], paint, label, rough=0.15)
            c.rod(x - way * 0.3, 0.3, x + way * 0.3, 0.36, z, 0.32, STEEL, label, rough=0.3)
            c.rod(x - way * half, 0.8, x + way * 0.05, 0.82, z, 0.13, BLACK, label)
        for p, q in ((hub, seat), (seat, pedal), (pedal, hub), (pedal, bars), (seat, bars), (bars, fork)):
            c.rod(x + way * p[0], p[1], x + way * q[0], q[1], z, 0.07 if motor else 0.05, paint, label)
        c.rod(x + way * seat[0] - 0.13, seat[1], x + way * seat[0] + 0.13, seat[1], z, 0.07, BLACK, label)
    else:
        c.upright(x - 0.06, x + 0.06, 0.02, 0.7, z, TYRE, label)
        c.disc(x, 0.72, z, 0.22 if motor else 0.06, 0.3, 8, paint, label, rough=0.15)
        c.rod(x - 0.3, 1.0, x + 0.3, 1.0, z, 0.06, BLACK, label)
        c.disc(x, 0.66, z, 0.05, 0.05, 6, RED, label, glow=0.6)
    if ridden:
        person(c, x + way * seat[0] * sidelong, z - 0.02, RIDER, seat[1])


def tree(c: Canvas, x: float, z: float) -> None:
    tall = c.uniform(4, 11)
    bare, trunk, leaf = tall * c.uniform(0.2, 0.4), 0.025 * tall + 0.06, c.tone(LEAF, 0.25)
    rx, ry, middle = (tall - bare) * c.uniform(0.32, 0.55), (tall - bare) / 2, (tall + bare) / 2
    c.stand(x, z)
    c.shadow([(x - rx * 0.8, 0, z), (x, 0, z - rx * 0.5), (x + rx * 0.8, 0, z), (x, 0, z + rx * 0.5)], tall * 0.8, 0)
    c.rod(x, 0, x, tall * 0.6, z, 2 * trunk, c.tone(BARK), VEGETATION, rough=0.3)
    n, size, corners = (7, 0.5, 15) if c.focal * tall / max(z, 1) > 60 else (3, 0.65, 9)  # less for the small ones
    kind: dict[str, Any] = {"label": VEGETATION, "grain": 9, "ragged": 0.36}
    c.disc(x, middle, z, rx * 1.15, ry * 1.15, corners + 8, leaf, pattern=LEAVES, rough=0.45, **kind)
    for i in range(n):
        angle, out = i * 2.4 + c.uniform(0, 1), c.uniform(0.25, 0.62)
        dx, dy = rx * out * math.cos(angle), ry * out * math.sin(angle)
        k = 1.0 + 0.5 * dy / ry + c.uniform(-0.08, 0.08)  # brighter towards the top
        colour = (leaf[0] * k, leaf[1] * k, leaf[2] * k)
        c.disc(x + dx, middle + dy, z, rx * size, ry * size, corners, colour, rough=0.5, **kind)


def bush(c: Canvas, x: float, z: float, wide: float = 0.0) -> None:
    leaf, wide, tall = c.tone(LEAF, 0.3), wide or c.uniform(0.6, 1.8), c.uniform(0.6, 1.6)
    c.stand(x, z)
    for _ in range(3):
        middle, y = x + c.uniform(-0.4, 0.4) * wide, tall * c.uniform(0.35, 0.5)
        c.disc(middle, y, z, wide * 0.7, tall * 0.55, 12, c.tone([leaf]), VEGETATION, ragged=0.36, rough=0.45)


def traffic_sign(c: Canvas, x: float, z: float) -> None:
    y, r, turn = c.uniform(2.1, 3.0), c.uniform(0.3, 0.48), c.pick(SIDES) * math.pi / 2
    c.stand(x, z, 0.05, y)
    c.rod(x, 0, x, y + r * 0.8, z, 0.09, c.tone(METALS), POLE)
    kind: dict[str, Any] = {"label": TRAFFIC_SIGN, "glow": 0.25 if c.night else 0.06, "rough": 0.02}
    shape, ground, ink = c.pick(("round", "round", "triangle", "board", "back")), WHITE, BLACK
    if shape == "board":
        (ground, ink), wide = (
            c.pick(((BLUE, WHITE), (GREEN, WHITE), (WHITE, BLACK), (YELLOW, BLACK))),
            r * c.uniform(0.9, 2.5),
        )
        c.upright(x - wide, x + wide, y - r, y + r, z, ground, **kind)
        for row in (y - 0.4 * r, y + 0.3 * r):
            c.rod(x - wide * 0.7, row, x + wide * c.uniform(-0.1, 0.7), row, z, r * 0.28, ink, **kind)
    else:
        corners, rims = 3 if shape == "triangle" else 14, ((RED, WHITE), (BLUE, BLUE), (RED, RED), (RED, BLUE))
        rim, middle = {"round": c.pick(rims), "triangle": (RED, WHITE), "back": (STEEL, STEEL)}[shape]
        c.disc(x, y, z, r, r, corners, rim, turn=turn, **kind)
        c.disc(x, y, z, r * 0.7, r * 0.7, corners, middle, turn=turn, **kind)
        if shape == "round":
            c.rod(x - r * 0.4, y, x + r * 0.4, y, z, r * 0.3, BLACK if middle == WHITE else WHITE, **kind)


def traffic_light(c: Canvas, x: float, z: float, reach: float) -> None:
    """Signals on a post and, if `reach` is not 0, on an arm over the road."""
    grey, lit, heads = c.tone(METALS), c.pick((0, 0, 1, 2)), [(x, c.uniform(2.3, 2.9)), (x + reach, 5.2)]
    c.stand(x, z, 0.1, 5)
    c.rod(x, 0, x, 5.6 if reach else 3.4, z, 0.16, grey, POLE)
    if reach:
        c.rod(x, 5.5, x + reach, 5.7, z, 0.12, grey, POLE)
    for hx, hy in heads[: 2 if reach else 1]:
        c.upright(hx - 0.24, hx + 0.24, hy - 0.6, hy + 0.6, z, c.tone([BLACK], 0.5), TRAFFIC_LIGHT)
        for i, (red, green, blue) in enumerate(rgb("ff1f1a ffb31a 26f273")):
            k = 1.0 if i == lit else 0.22
            bulb = (red * k, green * k, blue * k)
            c.disc(hx, hy + 0.38 * (1 - i), z, 0.14, 0.14, 8, bulb, TRAFFIC_LIGHT, glow=float(i == lit))


def lamp_post(c: Canvas, x: float, z: float) -> None:
    tall, thick, steel = c.uniform(5, 8.5), c.uniform(0.12, 0.2), c.tone(METALS)
    head = x - math.copysign(c.uniform(0.4, 2.2), x)
    c.stand(x, z, 0.08, tall)
    c.rod(x, 0, x, tall - 0.1, z, thick, steel, POLE)
    c.rod(x, tall - 0.15, head, tall, z, thick * 0.6, steel, POLE)
    c.rod(head - 0.3, tall, head + 0.3, tall, z, 0.16, LAMP if c.night else steel, POLE, glow=float(c.night))
    c.lamps.append(c.view((head, tall, z)))


def clutter(c: Canvas, x: float, z: float) -> None:
    """Bins, cabinets and the like, which are none of the 19 classes."""
    wide, tall, colour = c.uniform(0.2, 0.6), c.uniform(0.5, 1.3), c.paint()
    c.stand(x, z, wide, tall)
    c.upright(x - wide, x + wide, 0, tall, z, colour, IGNORE)
    c.upright(x - wide, x + wide, tall * 0.85, tall, z, c.tone([colour], 0.5), IGNORE)


# --- vehicles: the outline of a side, drawn out across the width -----------------------------------------------------

# From tail to nose as fractions of length and height; which points are the cabin's; the rear window's edge.
CARS: dict[str, tuple[Outline, slice, int]] = {
    "saloon": ([(-0.5, 0.16), (-0.5, 0.6), (-0.47, 0.68), (-0.36, 0.7), (-0.23, 0.98), (0.07, 1), (0.23, 0.69),
                (0.45, 0.6), (0.5, 0.48), (0.5, 0.16)], slice(3, 7), 3),
    "hatchback": ([(-0.5, 0.16), (-0.5, 0.5), (-0.48, 0.66), (-0.4, 0.95), (-0.3, 1), (0.06, 1), (0.23, 0.68),
                   (0.45, 0.6), (0.5, 0.46), (0.5, 0.16)], slice(2, 7), 2),
    "van": ([(-0.5, 0.14), (-0.5, 0.4), (-0.5, 0.62), (-0.48, 0.98), (-0.46, 1), (0.24, 1), (0.4, 0.62),
             (0.47, 0.52), (0.5, 0.42), (0.5, 0.14)], slice(2, 7), 2),
}  # fmt: skip


class Vehicle:
    """Paints in a vehicle's own metres: along (forward), across (to its right) and up."""

    def __init__(self, c: Canvas, x: float, z: float, heading: float, label: int, size: Point):
        self.c, self.x, self.z, self.label = c, x, z, label
        self.sin, self.cos = math.sin(heading), math.cos(heading)  # heading 0 drives away from the camera
        (self.length, width, self.tall), self.belt = size, math.inf  # above the belt it is narrower
        self.half = width / 2
        c.stand(x, z)
        corners = [
            self.at(a * self.length, b * width, 0) for a, b in ((-0.5, -0.5), (-0.5, 0.5), (0.5, 0.5), (0.5, -0.5))
        ]
        c.shadow(corners, self.tall * 0.8, 0.25)

    def at(self, along: float, across: float, up: float) -> Point:
        return (self.x + along * self.sin + across * self.cos, up, self.z + along * self.cos - across * self.sin)

    def width(self, up: float) -> float:
        return self.half * (0.84 if up > self.belt else 1.0)

    def sides(self, outline: Outline, colour: Colour, out: float = 0.0, **kind) -> None:
        """The same polygon on both flanks, `out` metres off them."""
        for side in SIDES:
            points = [self.at(a, side * (self.width(y) + out), y) for a, y in outline]
            self.c.face(points, colour, self.label, inside=self.at(0, 0, self.tall / 2), **kind)

    def body(self, outline: Outline, paint: Colour, special: dict[int, Colour]) -> None:
        """Both flanks and what lies between, far parts first; `special` has edges of another colour."""
        edges = list(itertools.pairwise(outline))
        middle = self.at(sum(p[0] for p in outline) / len(outline), 0, sum(p[1] for p in outline) / len(outline))
        for i in sorted(range(len(edges)), key=lambda i: -self.cos * (edges[i][0][0] + edges[i][1][0])):
            (a, y), (b, v) = edges[i]
            w, u = self.width(y), self.width(v)
            points = [self.at(a, -w, y), self.at(a, w, y), self.at(b, u, v), self.at(b, -u, v)]
            self.c.face(points, special.get(i, paint), self.label, inside=middle, rough=0.03, grain=4)
        if self.belt == math.inf:
            self.sides(outline, paint, rough=0.04)

    def panel(self, along: float, left: float, right: float, low: float, high: float, colour: Colour, glow=0.0) -> bool:
        """A rectangle on the front or the back."""
        points = [self.at(along, a, y) for a, y in ((left, low), (right, low), (right, high), (left, high))]
        return self.c.face(points, colour, self.label, inside=self.at(0, 0, low), glow=glow)

    def fittings(self, low: float, lit: bool, wheels: Iterable[float], radius: float) -> None:
        """Wheels; lamps, number plates and bumpers at both ends."""
        for spot, (r, colour) in itertools.product(wheels, ((radius, TYRE), (radius * 0.62, STEEL))):
            angles = [2 * math.pi * i / 12 for i in range(12)]
            self.sides([(spot + r * math.cos(t), radius + r * math.sin(t)) for t in angles], colour, 0.01)
        for end, lamp, glow in ((-1, RED, 0.25), (1, WHITE, 0.5)):
            along, shine = end * (self.length / 2 + 0.01), glow * lit * (2.2 if self.c.night else 1.0)
            if self.panel(along, -self.half, self.half, low * 0.5, low * 0.8, TYRE):
                for side in SIDES:
                    self.panel(along, side * self.half * 0.66, side * self.half * 0.96, low, low + 0.17, lamp, shine)
                self.panel(along, -0.26, 0.26, low * 0.86, low * 0.86 + 0.13, WHITE)


def car(c: Canvas, x: float, z: float, heading: float, lit: bool) -> None:
    name, paint = c.pick(("saloon", "hatchback", "hatchback", "van")), c.paint()
    shape, cabin, rear = CARS[name]
    tall = c.uniform(1.38, 1.62) + 0.35 * (name == "van")
    v = Vehicle(c, x, z, heading, CAR, (c.uniform(3.7, 4.9), c.uniform(1.68, 1.9), tall))
    v.belt = 0.74 * tall
    outline = [(a * v.length, y * tall) for a, y in shape]
    window = outline[cabin]
    v.body(outline, paint, {rear: GLASS, 5: GLASS})
    v.sides(window, paint)
    v.sides([(a, min(y, 0.7 * tall)) for a, y in outline], paint, rough=0.03)
    ma, my = (sum(p[i] for p in window) / len(window) for i in (0, 1))
    v.sides([(ma + (a - ma) * 0.86, my + (y - my) * 0.72) for a, y in window], GLASS, 0.01)
    if c.focal * tall / max(z, 1) > 14:  # pixels
        v.sides(
            [(ma - 0.04, my - 0.2), (ma + 0.06, my - 0.2), (ma + 0.06, tall * 0.96), (ma - 0.04, tall * 0.96)],
            paint,
            0.02,
        )
        v.fittings(0.42 * tall, lit, (-0.31 * v.length, 0.31 * v.length), c.uniform(0.29, 0.35))


def coach(c: Canvas, x: float, z: float, heading: float, label: int) -> None:
    """A bus, or a tram of two cars: long boxes with a band of windows."""
    tram, length, tall, paint = label == TRAIN, c.uniform(10, 14), c.uniform(2.9, 3.5), c.paint()
    lower, panes = c.pick((paint, c.paint())), int(length / c.uniform(1.2, 1.9))
    h, n, roof, sill, wide = length / 2, 0.9 if tram else 0.25, tall - 0.5, 1.2, c.uniform(2.4, 2.6)
    rear = [(-h, 0.3), (-h, sill), (-h + n * 0.4, roof), (-h + n, tall)]
    outline = rear + [(-a, y) for a, y in reversed(rear)]
    for part in (1, 0) if tram else (0,):  # the far car first
        v = Vehicle(c, x, z + part * (length + 0.4), heading, label, (length, wide, tall))
        v.body(outline, paint, {0: lower, 1: GLASS, 5: GLASS, 6: lower})
        v.sides([(-h, 0.3), (-h, sill), (h, sill), (h, 0.3)], lower, rough=0.03)
        for i in range(panes):
            a, b = (-h + n * 0.6 + (length - 1.2 * n) * (i + t) / panes for t in (0.08, 0.92))
            low = 0.45 if not tram and i in (panes - 1, panes // 2) else 1.3  # doors
            pane = [(a, low), (a, roof), (b, roof), (b, low)]
            v.sides(pane, LAMP if c.night else GLASS, 0.01, glow=0.3 * c.night)
        for end in SIDES:  # where it goes
            v.panel(end * (h - n * 0.3 + 0.05), -0.5, 0.5, tall - 0.42, tall - 0.2, AMBER, 0.5)
        v.fittings(0.62, True, () if tram else (-0.3 * length, 0.33 * length), 0.48)


def truck(c: Canvas, x: float, z: float, heading: float) -> None:
    tall, cab, load = c.uniform(2.7, 3.7), c.paint(), c.paint()
    v = Vehicle(c, x, z, heading, TRUCK, (c.uniform(6, 10.5), c.uniform(2.2, 2.55), tall))
    h, top = v.length / 2, min(tall - 0.1, c.uniform(2.3, 2.8))
    front = [(h - 1.9, 0.45), (h - 1.9, top), (h - 0.5, top), (h - 0.12, top * 0.58), (h, top * 0.52), (h, 0.35)]
    window = [(h - 1.5, top * 0.6), (h - 1.5, top * 0.92), (h - 0.6, top * 0.92), (h - 0.3, top * 0.6)]
    box = [(-h, 0.85), (-h, tall), (h - 2.1, tall), (h - 2.1, 0.85)]
    chassis = [(-h, 0.4), (-h, 0.9), (h - 0.1, 0.9), (h - 0.1, 0.4)]
    parts = [(front, cab, {2: GLASS}), (chassis, TYRE, {}), (box, load, {})]
    for outline, colour, special in parts if v.cos > 0 else parts[::-1]:
        v.body(outline, colour, special)
        if outline is front:
            v.sides(window, GLASS, 0.01)
    if c.chance(0.5):  # lettering
        low, high = sorted((c.uniform(1.2, tall), c.uniform(1.2, tall)))
        v.sides([(-h * 0.8, low), (-h * 0.8, high), (h * 0.3, high), (h * 0.3, low)], c.paint(), 0.01)
    v.panel(-h - 0.01, -0.03, 0.03, 0.9, tall, BLACK)  # between the doors
    v.fittings(0.6, True, (-0.32 * v.length, -0.2 * v.length, h - 1.0), 0.48)


# --- the street ------------------------------------------------------------------------------------------------------


def facade(c: Canvas) -> tuple[Colour, dict[str, Any]]:
    """Colour and windows of a house: bay width, storey height, and the share of each that is glass."""
    params = (c.uniform(1.8, 3.8), c.uniform(2.8, 3.6), c.uniform(0.35, 0.75), c.uniform(0.45, 0.7))
    rough, grain = c.uniform(0.05, 0.16), c.pick((3.0, 8.0, 16.0))
    kind = {"pattern": FACADE, "params": params, "second": c.tone(GLASSES), "rough": rough, "grain": grain}
    return c.tone(PLASTER, 0.3, odd=0.04), kind


def house(c: Canvas, x: float, z0: float, z1: float, side: int, tall: float, pitched: bool) -> None:
    c.sunny, deep, out = 1.0, c.uniform(8, 14) * side, 0.25 * side
    colour, windows = facade(c)
    if pitched:
        ridge, top = x + deep / 2, tall + abs(deep) * 0.35
        slope = [(x - out, tall - 0.1, z0), (x - out, tall - 0.1, z1), (ridge, top, z1), (ridge, top, z0)]
        c.face(slope, c.tone(ROOFS), BUILDING, rough=0.15)
        c.face([(x, tall, z0), (x + deep, tall, z0), (ridge, top, z0)], colour, BUILDING, rough=0.1)
    c.upright(x, x + deep, 0, tall, z0, colour, BUILDING, **windows)
    c.along(x, z0, z1, 0, tall, colour, BUILDING, **windows)
    if not pitched:
        c.along(x - out, z0, z1, tall - 0.5, tall, c.tone([colour]), BUILDING)  # the cornice
    if c.chance(0.5):  # shops
        y, params = c.uniform(2.6, 3.3), (c.uniform(2, 4), 3.3, 0.8, 0.68)
        c.along(x, z0, z1, 0, y, c.tone(PLASTER), BUILDING, pattern=FACADE, params=params, second=c.pick(GLASSES))
        if c.chance(0.5):
            c.along(x - out / 2, z0, z1, y, y + 0.6, c.paint(), BUILDING, glow=0.3 * c.night)


def barrier(c: Canvas, x: float, z0: float, z1: float, label: int) -> None:
    """A wall or a fence along the road."""
    tall, colour = c.uniform(0.8, 2.2), c.tone(PLASTER if label == WALL else FENCES, 0.3)
    c.stand(x, (z0 + z1) / 2)
    if label == FENCE:
        params = (c.uniform(0.13, 0.3), tall, c.pick((0.3, 0.45, 0.75)), 0)
        c.along(x, z0, z1, 0.05, tall, colour, FENCE, pattern=BARS, params=params, rough=0.15)
    else:
        params, joints = (c.uniform(0.5, 2.5), c.uniform(0.25, 0.9), 0.05, 0), c.tone([colour], 0.4)
        c.along(x, z0, z1, 0, tall, colour, WALL, pattern=BLOCKS, params=params, second=joints, rough=0.14, grain=8)
        c.along(x, z0, z1, tall, tall + 0.12, c.tone([colour]), WALL)


class Street:
    """Lays out one scene: the ground is painted at once, the rest becomes a list of things ordered by depth."""

    def __init__(self, c: Canvas):
        self.c = c
        self.things: list[tuple[float, Callable[[], None]]] = []
        self.taken: list[tuple[float, float, float, float]] = []
        self.urban, self.busy, lanes = c.uniform(0, 1) ** 0.7, c.uniform(0.3, 1.0), c.pick((1, 1, 1, 2))
        green, lane = 1 - self.urban, c.uniform(2.9, 3.7)
        self.lanes, self.lane, self.road = lanes, lane, lane * lanes  # the road is half of its width, without parking
        # Outer edges, left and right, as distances from the middle of the road.
        self.parking = {side: c.chance(0.5 - 0.1 * side) for side in SIDES}
        self.kerb = {side: self.road + 2.2 * self.parking[side] for side in SIDES}
        self.verge = {side: self.kerb[side] + c.uniform(1.2, 3.0) * c.chance(0.15 + 0.5 * green) for side in SIDES}
        self.walk = {side: self.verge[side] + c.uniform(1.8, 4.5) for side in SIDES}
        self.front = {side: self.walk[side] + c.uniform(2, 8) * c.chance(0.1 + green) for side in SIDES}
        self.crossing = c.uniform(12, 50) if c.chance(0.6) else 999.0
        self.beyond = self.crossing + c.uniform(7, 12)
        c.at = self.road - lane / 2 + c.uniform(-0.3, 0.3)

    def paint(self) -> None:
        for part in (
            self.ground,
            self.markings,
            self.backdrop,
            self.frontages,
            self.traffic,
            self.kerbside,
            self.people,
        ):
            part()
        for _, draw in sorted(self.things, key=lambda thing: -thing[0]):
            draw()

    def add(self, depth: float, draw: Callable[..., None], *args: Any) -> None:
        self.things.append((depth, partial(draw, self.c, *args)))

    def free(self, x: float, z: float, half: float, deep: float) -> bool:
        """Claim a piece of ground, unless something stands there."""
        here = (x - half, x + half, z - deep, z + deep)
        if any(here[0] < t[1] and t[0] < here[1] and here[2] < t[3] and t[2] < here[3] for t in self.taken):
            return False
        self.taken.append(here)
        return True

    def spots(self, first: float, last: float, low: float, high: float) -> list[float]:
        """Depths along the road, `low` to `high` metres apart, none of them at the crossing."""
        found, z = [], first
        while z < last:
            if not self.crossing - 6 < z < self.beyond + 3:
                found.append(z)
            z += self.c.uniform(low, high)
        return found

    def ground(self) -> None:
        c = self.c
        grass, slab, grey = c.tone(GRASS), c.tone(SLABS), c.uniform(0.3, 0.5)
        turf: dict[str, Any] = {"label": TERRAIN, "rough": 0.3, "grain": 6}
        tar: dict[str, Any] = {"label": ROAD, "rough": c.uniform(0.05, 0.14), "grain": c.pick((5.0, 20.0))}
        slabs: dict[str, Any] = {"label": SIDEWALK, "rough": 0.1, "pattern": BLOCKS, "second": c.tone([slab], 0.3)}
        slabs["params"] = (c.uniform(0.3, 1.0), c.uniform(0.3, 1.0), 0.06, 0)
        c.strip(-400, 400, NEAR, 400, grass, **turf)
        for side in SIDES:
            kerb = side * self.kerb[side]
            c.strip(kerb, side * self.walk[side], NEAR, 200, slab, **slabs)
            c.strip(kerb, side * self.verge[side], NEAR, 200, c.tone([grass]), **turf)
            c.strip(kerb, kerb + side * 0.2, NEAR, 200, c.tone([slab], 0.3), SIDEWALK, rough=0.1)
        asphalt = [(grey, grey, grey * 1.02)]
        c.strip(-self.kerb[-1], self.kerb[1], NEAR, 200, asphalt[0], **tar)
        c.strip(-90, 90, self.crossing, min(self.beyond, FAR), c.tone(asphalt, 0.05), **tar)
        for _ in c.count(0, 7):  # patches
            x, z = c.uniform(-self.kerb[-1], self.kerb[1] - 2), c.uniform(3, 30)
            c.strip(x, x + c.uniform(0.5, 2), z, z + c.uniform(0.5, 6), c.tone(asphalt), **tar)

    def markings(self) -> None:
        c = self.c
        mark = partial(c.strip, colour=c.tone([WHITE]), label=ROAD, rough=0.16, grain=10)

        def line(x: float, dashed: bool) -> None:
            z, step = NEAR + c.uniform(0, 4), 3 if dashed else 90
            while z < 90:
                mark(x - 0.07, x + 0.07, z, min(z + step, self.crossing - 1))
                mark(x - 0.07, x + 0.07, max(z, self.beyond + 1), z + step)
                z += step + 4.5

        line(0.0, c.chance(0.6))
        for side in SIDES:
            if self.lanes == 2:
                line(side * self.lane, True)
            if self.parking[side] or c.chance(0.4):
                line(side * self.road, c.chance(0.2))
        if self.crossing < FAR and c.chance(0.75):  # stop line and zebra
            z = self.crossing - 3.2
            mark(0.1, self.kerb[1], z - 1, z - 0.6)
            for x in np.arange(-self.kerb[-1] + 0.3, self.kerb[1] - 0.4, 1.0).tolist():
                mark(x, x + 0.5, z, z + 2.6)

    def backdrop(self) -> None:
        """What closes the view at the end of the street, some of it too far to tell."""
        c, x = self.c, -110.0
        while x < 110:
            wide, what = c.uniform(8, 30), c.pick((BUILDING, BUILDING, VEGETATION, IGNORE))
            colour, windows = facade(c)
            if what == VEGETATION:
                for i in range(int(wide / 4)):
                    tall = c.uniform(4, 9)
                    c.disc(x + 4 * i, 3, FAR - 1, 5, tall, 10, c.tone(LEAF), VEGETATION, ragged=0.36, rough=0.4)
            elif what == BUILDING:
                c.upright(x, x + wide, 0, c.uniform(5, 22), FAR, colour, BUILDING, **windows)
            else:
                c.upright(x, x + wide, 0, 4, FAR, HAZE, IGNORE)
            x += wide

    def frontages(self) -> None:
        """Houses, walls, fences and gardens along both sides, and the gap for the side street."""
        for side in SIDES:
            z, tall = self.c.uniform(-6, 3), 4 + 14 * self.urban * self.c.uniform(0.5, 1.2)
            while z < FAR:
                end = z + self.c.uniform(7, 18)
                if z < self.beyond + 2 and end > self.crossing - 3:
                    if z > self.crossing - 9:
                        z = self.beyond + 3
                        continue
                    end = self.crossing - 3.5
                self.plot(side, z, end, tall * self.c.uniform(0.75, 1.25))
                z = end

    def plot(self, side: int, z: float, end: float, tall: float) -> None:
        c, x, built, pitched = (
            self.c,
            side * self.front[side],
            self.c.chance(0.4 + 0.6 * self.urban),
            self.c.chance(1 - self.urban),
        )
        if built:
            x, back = x + side * c.uniform(0, 5) * pitched, end - c.uniform(0.5, 3) * c.chance(1.1 - self.urban)
            c.shadow([(x, 0, z), (x, 0, back), (x + side * 10, 0, back), (x + side * 10, 0, z)], tall, 0)
            self.add(end, house, x, z, back, side, tall, pitched)
        else:
            for _ in c.count(2, 5):
                self.add(end - 0.1, tree, x + side * c.uniform(1, 12), c.uniform(max(z, 2), max(end, 3)))
        if built and self.front[side] == self.walk[side]:
            return
        edge, what = side * self.walk[side], c.pick((WALL, WALL, FENCE, FENCE, VEGETATION, TERRAIN))
        if what in (WALL, FENCE):
            self.add(end - 0.3, barrier, edge, z, end, what)
        elif what == VEGETATION:  # a hedge
            for spot in np.arange(max(z, 2), end, 1.2).tolist():
                self.add(end - 0.3 - 0.001 * spot, bush, edge, spot, 1.2)
        for _ in c.count(0, 3):
            self.add(
                end - 0.2, c.pick((tree, bush, bush)), edge + side * c.uniform(0.8, 2.5), max(c.uniform(z, end), 2.5)
            )

    def traffic(self) -> None:
        """Vehicles on the lanes and on the parking strips; keep to the right."""
        c = self.c
        if c.chance(0.2):
            away, z = self.lanes > 1 and c.chance(0.5), c.uniform(12, 40)
            x = self.lane * (0.5 if away else -0.5)
            self.free(x, z + 7, 1.5, 16)
            self.add(z - 6, coach, x, z, 0.0 if away else math.pi, TRAIN)
        for lane in range(-self.lanes, self.lanes):
            z = c.uniform(6, 35)
            while z < 95:
                x, roll = (lane + 0.5) * self.lane + c.uniform(-0.3, 0.3), c.uniform(0, 1)
                heading = (0.0 if lane >= 0 else math.pi) + c.uniform(-0.04, 0.04)
                if roll < 0.22 and self.free(x, z, 0.5, 1.2):
                    self.add(z, cycle, x + c.uniform(0, 0.8), z, c.pick((MOTORCYCLE, BICYCLE)), True)
                elif 0.22 < roll < 0.36 and self.free(x, z + 5, 1.4, 8):
                    self.add(z - 1, *c.pick(((coach, x, z + 5, heading, BUS), (truck, x, z + 5, heading))))
                elif self.free(x, z, 1.0, 3):
                    self.add(z - 2, car, x, z, heading, True)
                z += c.uniform(7, 40) / self.busy
        for side in SIDES:
            x, last = side * (self.kerb[side] - 1.1), 80 if self.parking[side] else 0
            for z in self.spots(c.uniform(3, 9), last, 5.4, 7 + 8 * (1 - self.busy)):
                heading, lorry = (0.0 if c.chance(0.5 + side * 0.4) else math.pi), c.chance(0.05)
                if lorry and self.free(x, z + 2, 1.1, 5):
                    self.add(z - 2, truck, x, z + 2, heading)
                elif not lorry and self.free(x, z, 0.9, 2.6):
                    self.add(z - 2, car, x, z, heading, c.chance(0.1))

    def kerbside(self) -> None:
        """Lamps, signs, trees, signals and cycles at the edge of the road."""
        c = self.c
        for side in SIDES:
            x = side * (self.kerb[side] + 0.45)
            trees = side * max((self.kerb[side] + self.verge[side]) / 2, self.kerb[side] + 0.7)
            rows = [(lamp_post, x, z) for z in self.spots(c.uniform(5, 16), 90, 20, 26)]
            rows += [(c.pick((traffic_sign, traffic_sign, clutter)), x, c.uniform(5, 45)) for _ in c.count(0, 5)]
            if self.verge[side] > self.kerb[side] or c.chance(0.2):
                rows += [(tree, trees, z) for z in self.spots(c.uniform(7, 16), 80, 7, 13)]
            for draw, at, z in rows:
                if self.free(at, z, 0.3, 0.3):
                    self.add(z, draw, at, z)
            if self.crossing < FAR and c.chance(0.8):
                z = self.crossing - c.uniform(4, 5) if side > 0 else self.beyond + 1
                self.add(z, traffic_light, x, z, -side * c.uniform(2, 4.5) * c.chance(0.5))
        for _ in c.count(0, 5):
            side, z, kind = c.pick(SIDES), c.uniform(5, 30), c.pick((BICYCLE, BICYCLE, MOTORCYCLE))
            for spot in (z + 0.6 * i for i in range(c.pick((1, 1, 2, 4)))):
                x = side * (self.kerb[side] + c.uniform(0.3, 0.9))
                if self.free(x, spot, 0.6, 0.25):
                    self.add(spot, cycle, x, spot, kind, False)

    def people(self) -> None:
        c = self.c
        for _ in c.count(1, 2 + 12 * self.busy):
            side, z = c.pick(SIDES), 4.0 + 46 * c.uniform(0, 1) ** 1.4
            x = side * c.uniform(self.verge[side] + 0.3, self.walk[side] - 0.3)
            for i in range(c.pick((1, 1, 1, 2, 3))):
                if self.free(x + 0.65 * i, z, 0.25, 0.3):
                    self.add(z, person, x + 0.65 * i, z)
        for _ in c.count(0, 4) if self.crossing < FAR else ():  # across the road
            x, z = c.uniform(-self.kerb[-1], self.kerb[1]), self.crossing - c.uniform(0.8, 3)
            if self.free(x, z, 0.3, 0.3):
                self.add(z, *c.pick(((person, x, z), (person, x, z), (cycle, x, z, BICYCLE, True))))


# --- shading ---------------------------------------------------------------------------------------------------------


@lru_cache
def noise_tile() -> np.ndarray:
    """(256 * 256) float32 fractal noise, flat, that repeats without a seam: mean 0, deviation 1."""
    rng, size = np.random.default_rng(2022), 256
    tile = np.zeros((size, size), np.float32)
    for octave in range(2, 9):
        coarse = Image.fromarray(np.tile(rng.standard_normal((2**octave, 2**octave), np.float32), (3, 3)))
        smooth = coarse.resize((3 * size, 3 * size), Image.Resampling.BICUBIC)
        tile += np.asarray(smooth)[size : 2 * size, size : 2 * size] * 0.75**octave
    return ((tile - tile.mean()) / tile.std()).ravel()


def as_image(colour: np.ndarray) -> Image.Image:
    return Image.fromarray((np.clip(colour, 0, 1) * 255).astype(np.uint8))


class Pixels:
    """Every pixel of a painted canvas: its face, where on it, its label, its colour so far. Arrays are (H, W)."""

    def __init__(self, c: Canvas):
        self.c, table = c, np.array(c.faces, np.float32)
        self.table = dict(zip(c.FIELDS, np.ascontiguousarray(table.T), strict=True))
        self.seconds, self.offset = table[:, 7:10], (c.rng.random(2) * 256).tolist()
        self.ids, veils = np.array(c.ids, np.intp), np.asarray(c.veils)
        height, width = self.ids.shape
        self.rx = ((np.arange(width, dtype=np.float32) + 0.5 - c.centre) / c.focal)[None]  # the rays, at z = 1
        self.ry = ((np.arange(height, dtype=np.float32) + 0.5 - c.horizon) / c.focal)[:, None]
        self.labels = self.table["label"].astype(np.uint8)[np.where(veils > 0, veils, self.ids)]
        self.see_through(veils)
        self.z, self.u, self.v = self.surface(self.rx, self.ry, self.ids)
        self.ground = (self.of("b") > 0.99) & (self.ids > 0)
        self.glow, self.pattern, grain = self.of("glow"), self.of("pattern"), self.of("grain")
        rough = self.texture(self.u * grain, self.v * grain) * 0.6 + self.texture(self.u * 0.7, self.v * 0.7) * 0.4
        self.colour = np.ascontiguousarray(table[:, 4:7]).take(self.ids, axis=0)  # (H, W, 3)
        self.colour *= (1 + self.of("rough") * rough / (1 + self.z * 0.02))[..., None]

    def of(self, field: str) -> np.ndarray:
        return self.table[field].take(self.ids)

    def surface(self, rx: np.ndarray, ry: np.ndarray, face: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Depth z and surface coordinates in metres: u along the face, v up it (on the ground: ahead)."""
        a, b, c, d = (self.table[name].take(face) for name in "abcd")
        slope, flat = a * rx + b * ry + c, np.abs(b)
        z = np.clip(d / np.where(np.abs(slope) < 1e-6, 1e-6, slope), NEAR, 1000)
        return z, z * (rx * (c + flat) - a), flat * z + (1 - flat) * (self.c.eye - ry * z)

    def texture(self, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        row = (v + self.offset[0]).astype(np.int32) & 255
        return noise_tile().take((row << 8) | ((u + self.offset[1]).astype(np.int32) & 255))

    def see_through(self, veils: np.ndarray) -> None:
        """Bars, leaves and spokes cover a part of their face; the label is theirs on all of it."""
        y, x = np.nonzero(veils)
        face = veils[y, x]
        pattern, p0, p1, p2, p3 = (self.table[name].take(face) for name in ("pattern", "p0", "p1", "p2", "p3"))
        _, u, v = self.surface(self.rx[0, x], self.ry[y, 0], face)
        safe = partial(np.maximum, 0.01)  # other patterns' parameters may be 0
        bars = (np.mod(u / safe(p0), 1) < p2) | (np.abs(v / safe(p1) - 0.5) > 0.42)
        leaves = self.texture(u * 14, v * 14) > -0.35
        radius = np.hypot(u - p0, v - p1) / safe(p2)
        spokes = (radius > p3) | (radius < 0.15) | (self.texture(u * 60, v * 60) > 0.9)
        solid = np.select([pattern == BARS, pattern == LEAVES], [bars, leaves], spokes)
        self.ids[y[solid], x[solid]] = face[solid]

    def patterns(self) -> None:
        """Windows with frames, at night some of them lit; stones and slabs with joints. No two are quite the same."""
        y, x = np.nonzero((self.pattern == FACADE) | (self.pattern == BLOCKS))
        face = self.ids[y, x]
        long, high, share, share_up = (self.table[name].take(face) for name in ("p0", "p1", "p2", "p3"))
        windows = self.pattern[y, x] == FACADE
        row = self.v[y, x] / high
        column = self.u[y, x] / long + np.where(windows, 0, 0.5 * np.mod(np.floor(row), 2))
        dice = self.texture(np.floor(column) * 37 + face * 11, np.floor(row) * 91 + face * 5)
        across, up = np.mod(column, 1), np.mod(row, 1)
        gap = ((up < 2 * share) | (across < share)) & (self.z[y, x] < 40)
        beside, above = np.abs(across - 0.5) - share / 2, np.abs(up - 0.52) - share_up / 2
        pane, frame = windows & (beside < 0) & (above < 0), windows & (beside < 0.05) & (above < 0.05)
        tint = np.where(windows, np.where(frame, 1.18, 1.0), 1 + 0.05 * dice)
        lit, second = pane & (dice > 0.3) & self.c.night, pane | (gap & ~windows)
        glass = self.seconds[face] * np.where(windows, 1 + 0.3 * dice, 1.0)[:, None]
        colour = np.where(second[:, None], glass, self.colour[y, x] * tint[:, None])
        self.colour[y, x] = np.where(lit[:, None], np.array(LAMP, np.float32), colour)
        self.glow[y, x] = np.where(lit, 0.35 + 0.12 * dice, self.glow[y, x])

    def snow(self) -> None:
        """White on the ground except where wheels go, on what faces up, and in the trees."""
        tracks = np.where(self.labels == ROAD, np.abs(np.sin(self.u * 1.7)) * 1.1 - 0.8, 0.3)
        lying = tracks + 0.28 * self.texture(self.u * 2.5, self.v * 1.2) + 0.5
        cover = np.where(self.ground, lying, self.of("b") ** 2 * 1.3)
        leaves = (self.labels == VEGETATION) & ~self.ground
        cover[leaves] = 0.35 + 0.3 * self.texture(self.u[leaves] * 5, self.v[leaves] * 5)
        cover = np.clip(cover, 0, 1) * self.c.snow * (self.ids > 0)
        self.colour += (np.array((0.93, 0.95, 0.98), np.float32) - self.colour) * cover[..., None]

    def light(self) -> np.ndarray:
        """(H, W, 3): sky and sun, less the shadows on the ground; at night street lamps and headlights."""
        c = self.c
        shadow = np.asarray(c.shadows.filter(ImageFilter.GaussianBlur(c.size[0] / 400)), np.float32) * self.ground
        sun = self.of("sun") * (1 - np.clip(shadow / 140, 0, 1))
        sky = self.of("open") * (1 - 0.65 * np.clip((shadow - 140) / 115, 0, 1))
        sky *= np.where(self.ground, 1, 0.8 + 0.2 * np.clip(self.v / 0.8, 0, 1))  # little of it low down on things
        light = sky[..., None] * c.ambient + sun[..., None] * c.sunlight
        if c.night:
            x, y, z = self.rx * self.z, self.ry * self.z, self.z
            beam = np.exp(-((z / 22) ** 1.5) - (x / (1.5 + 0.32 * z)) ** 2) * np.clip(0.9 + y * 0.5, 0.05, 1)
            lamps = np.zeros_like(z)
            for lx, ly, lz in sorted(c.lamps, key=lambda lamp: lamp[2])[:6]:
                lamps += 1 / (1 + ((x - lx) ** 2 + (y - ly) ** 2 * 0.5 + (z - lz) ** 2) / 16)
            for strength, colour in ((beam * 0.8, WHITE), (lamps * 0.45, LAMP)):
                light += strength[..., None] * np.array(colour, np.float32)
        return light

    def sky(self) -> None:
        """A gradient, and clouds on a plane above."""
        c, (y, x) = self.c, np.nonzero(self.ids == 0)
        up, across = -self.ry[y, 0], self.rx[0, x]
        steep, far = np.clip(up / 0.45, 0, 1)[:, None] ** 0.7, 1 / (np.maximum(0, up) + 0.06)
        billows = self.texture(across * far * 22, far * 22) * 0.5 + self.texture(across * far * 60, far * 60) * 0.25
        cloud = (np.clip(billows + c.clouds * 1.6 - 0.8, 0, 1) * 0.85)[:, None]
        clear = c.zenith * steep + c.air * (1 - steep)
        self.colour[y, x] = clear + (c.air * np.float32(0.96 if c.clouds < 0.8 else 0.85) - clear) * cloud

    def wet(self) -> None:
        """Mirror in the wet ground what stands on it: column by column, about the foot of what is above."""
        rows = np.arange(len(self.ids))[:, None]
        foot = np.maximum.accumulate(np.where(self.ground, 0, rows), axis=0)
        mirrored = np.take_along_axis(self.colour, np.maximum(2 * foot - rows, 0)[..., None], axis=0)
        blurred = np.asarray(as_image(mirrored).filter(ImageFilter.BoxBlur((1, 7))), np.float32) / 255
        puddles = np.clip(0.42 + 0.25 * self.texture(self.u * 1.3, self.v * 0.5), 0, 0.85)
        share = (puddles * self.c.wet * self.ground)[..., None]
        self.colour *= (1 - 0.3 * self.c.wet * self.ground[..., None]) * (1 - share)
        self.colour += blurred * share

    def halos(self, emitted: np.ndarray) -> None:
        small, width = as_image(emitted + self.colour * 0.03).reduce(4), self.c.size[0]
        for radius, strength in ((width / 200, 1.0), (width / 50, 1.2)):
            halo = small.filter(ImageFilter.GaussianBlur(radius)).resize(self.c.size)
            self.colour += np.asarray(halo, np.float32) * np.float32(strength / 255)

    def falling(self, rain: bool) -> None:
        """Rain streaks or snow flakes before the lens."""
        c, scale, layer = self.c, self.c.size[0] / 512, Image.new("L", self.c.size)
        draw, slant = ImageDraw.Draw(layer), c.uniform(-0.15, 0.15)
        for x, y, close in (c.rng.random((260 if rain else 360, 3)) * (*c.size, 1)).tolist():
            if rain:
                long = (6 + 30 * close**2) * scale
                draw.line((x, y, x + slant * long, y + long), int(15 + 35 * close), max(1, round(scale)))
            else:
                r = (0.5 + 2.2 * close**3) * scale
                draw.ellipse((x - r, y - r, x + r, y + r), int(65 + 65 * close))
        self.colour += np.asarray(layer.filter(ImageFilter.GaussianBlur(scale * 0.7)), np.float32)[..., None] / 255

    def bonnet(self) -> None:
        """The own car's, which counts for nothing."""
        c, (width, height) = self.c, self.c.size
        across = np.linspace(-1, 1, width, dtype=np.float32)
        top = height * (c.uniform(0.9, 0.98) - c.uniform(0.02, 0.06) * (1 - across**2))
        hidden = np.arange(height)[:, None] > top
        shine = 0.6 + 0.5 * np.abs(across - c.uniform(-0.5, 0.5))
        metal = np.array(c.tone(PAINTS), np.float32) * c.ambient * shine[:, None]
        np.copyto(self.colour, metal[None], where=hidden[..., None])
        self.labels[hidden] = IGNORE

    def shade(self) -> None:
        c = self.c
        self.patterns()
        if c.snow:
            self.snow()
        emitted = self.colour * self.glow[..., None]
        self.colour *= self.light()
        self.colour += emitted
        self.sky()
        self.colour += (c.air - self.colour) * (1 - np.exp(-c.fog * np.minimum(self.z, 260)))[..., None]
        if c.wet:
            self.wet()
        if c.wet or c.night:
            self.halos(emitted)
        if c.chance(0.6):
            self.bonnet()
        if c.weather in ("rain", "snow"):
            self.falling(c.weather == "rain")


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
    image = np.asarray(as_image(pixels.colour * np.float32(c.uniform(0.95, 1.2))).reduce(2), np.float32)
    image = image + rng.standard_normal((height, width, 1), np.float32) * c.uniform(1.5, 4.5)
    return np.clip(image, 0, 255).astype(np.uint8), np.ascontiguousarray(pixels.labels[::2, ::2])


# --- files -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """Draws a procedural road-scene data set in the layout of Cityscapes or ACDC."""

    output: Path
    """Root of the data set: new or empty, or drawn before with the same options (only what lacks is drawn)."""
    dataset: Literal["cityscapes", "ACDC"] = "cityscapes"
    """Whose folders and file names; ACDC comes in fog, night, rain and snow."""
    train: int = 64
    """Images in the train split (ACDC: of each condition)."""
    val: int = 16
    """Images in the val split (ACDC: of each condition)."""
    height: int = 128
    """Image height in pixels."""
    width: int = 256
    """Image width in pixels."""
    seed: int = 0
    """Images depend on the seed, their split, condition and number, and on nothing else."""
    label_ids: bool = False
    """Write *_labelIds.png, as the archives have, instead of *_labelTrainIds.png."""
    workers: int | None = None
    """Processes that draw; by default as many as there are cores."""


Scene = tuple[Path, Path, str, tuple[int, ...]]  # image file, label file, weather, random seed


def scenes(options: Options) -> list[Scene]:
    root, acdc, kind = options.output, options.dataset == "ACDC", "labelIds" if options.label_ids else "labelTrainIds"
    found: list[Scene] = []
    for split, count in (("train", options.train), ("val", options.val)):
        for weather, i in itertools.product(WEATHERS[1:] if acdc else WEATHERS[:1], range(count)):
            if acdc:
                drive = f"GOPR{i // 100 + (1 if split == 'train' else 501):04}"
                stem = f"{weather}/{split}/{drive}/{drive}_frame_{41 + i % 100 * 10:06}"
                image, label = root / f"rgb_anon/{stem}_rgb_anon.png", root / f"gt/{stem}_gt_{kind}.png"
            else:
                city = CITIES[split][i % len(CITIES[split])]
                stem = f"{split}/{city}/{city}_{i:06}_000019"
                image, label = root / f"leftImg8bit/{stem}_leftImg8bit.png", root / f"gtFine/{stem}_gtFine_{kind}.png"
            found.append((image, label, weather, (options.seed, int(split == "val"), WEATHERS.index(weather), i)))
    return found


def draw_files(scene: Scene, height: int, width: int, label_ids: bool) -> None:
    image_file, label_file, weather, seed = scene
    image, labels = draw_scene(np.random.default_rng(seed), height, width, weather)
    if label_ids:
        from datasets.classes import CITYSCAPES

        table = np.zeros(256, np.uint8)
        table[: CITYSCAPES.num_classes] = CITYSCAPES.label_ids[: CITYSCAPES.num_classes]
        labels = table[labels]
    for path, pixels in ((label_file, labels), (image_file, image)):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        Image.fromarray(pixels).save(part, format="PNG")
        part.replace(path)


def write_dataset(
    root: Path | str, dataset: Literal["cityscapes", "ACDC"] = "cityscapes", train: int = 64, val: int = 16,
    height: int = 128, width: int = 256, seed: int = 0, label_ids: bool = False, workers: int | None = None,
    progress: bool = False,
) -> Path:  # fmt: skip
    """Draw the data set that `Options` describes under `root`, and return `root`.

    Files that are there already stay. Raises `cli.UserError` if `root` holds anything but this very data set
    (whose settings stand in its `dataset.json`), and for counts and sizes that make no sense.
    """
    options = Options(Path(root), dataset, train, val, height, width, seed, label_ids, workers)
    if min(height, width) < 32 or min(train, val, seed) < 0 or (workers is not None and workers < 1):
        raise cli.UserError("height and width start at 32, train, val and seed at 0, workers at 1; choose larger ones")
    if dataset not in ("cityscapes", "ACDC"):
        raise cli.UserError(f"there is no data set {dataset!r}; choose cityscapes or ACDC")
    settings = {key: value for key, value in asdict(options).items() if key not in ("output", "workers")}
    text = json.dumps({"generator": GENERATOR, **settings}, indent=2) + "\n"
    note = options.output / "dataset.json"
    empty = not options.output.exists() or (options.output.is_dir() and not any(options.output.iterdir()))
    if not empty and not (note.is_file() and note.read_text() == text):
        raise cli.UserError(f"{root} holds something else than this data set; empty it or choose another folder")
    options.output.mkdir(parents=True, exist_ok=True)
    note.write_text(text)

    wanted = scenes(options)
    todo = [scene for scene in wanted if not (scene[0].exists() and scene[1].exists())]
    draw = partial(draw_files, height=height, width=width, label_ids=label_ids)
    start = time.perf_counter()

    def follow(done: Iterable[None]) -> None:
        for i, _ in enumerate(done, 1):
            if progress and (i == len(todo) or (i % 10 == 0 and sys.stderr.isatty())):
                rate, end = i / (time.perf_counter() - start), "\n" if i == len(todo) else ""
                print(f"\r{i} of {len(todo)} scenes drawn, {rate:.0f} a second ", end=end, file=sys.stderr, flush=True)

    processes = workers or min(os.cpu_count() or 1, 1 + len(todo) // 64)
    if processes == 1:
        follow(map(draw, todo))
    else:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            follow(pool.map(draw, todo, chunksize=8))
    if progress:
        print(f"{root}: {len(wanted)} scenes, {len(todo)} of them new")
    return options.output


def main(options: Options) -> None:
    settings = dict(vars(options))
    write_dataset(settings.pop("output"), **settings, progress=True)


if __name__ == "__main__":
    cli.run(main, Options)
