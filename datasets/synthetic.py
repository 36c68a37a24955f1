"""A small procedural road-scene data set in the layout of Cityscapes or ACDC; nothing to download.

    python -m datasets.synthetic --output data/synthetic --train 400 --val 80
    python -m datasets.synthetic --output data/weather --dataset ACDC

How a picture comes about: a street is laid out in metres (`Street`) and seen through a pinhole camera behind
a windscreen. Its polygons are painted far to near into one buffer of face numbers (`Canvas`). Then all pixels
are shaded at once (`shade`): the plane of a pixel's face gives its depth and its place on the surface, those
give texture, windows, light, shadow, fog and snow. Images are drawn at twice their size and averaged down,
labels are every other pixel. Colours are drawn anew for every object and shared between classes, so that
shape, place and texture tell classes apart and colour alone does not.
"""

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
CONDITIONS = WEATHERS[1:]  # of ACDC
CITIES = {"train": ("altstadt", "neustadt", "weststadt"), "val": ("hafen",)}
PLAIN, FACADE, BLOCKS, BARS, LEAVES, SPOKES = range(6)  # patterns; from BARS on, what is behind shows through
NEAR, FAR = 0.7, 130.0  # metres
SIDES = (-1, 1)  # left and right

Point = tuple[float, float, float]  # x to the right of the road's middle, y up from the ground, z ahead; metres
Outline = list[tuple[float, float]]
Colour = tuple[float, float, float]  # RGB in 0..1


def shades(text: str) -> tuple[Colour, ...]:
    """Colours from hexadecimal RGB."""
    return tuple((int(t[:2], 16) / 255, int(t[2:4], 16) / 255, int(t[4:], 16) / 255) for t in text.split())


PLASTER = shades("bfb399 99543f 9e9991 ccb880 736b66 d9d6cc 8c99a8 b8856b a86850 c9a88c 8f8a70")
ROOFS, GLASSES, METALS = shades("733d2e 4d4747 5c4d42"), shades("29303b 475461 66788a"), shades("6b7073 333b38 99998f")
PAINTS = shades("12131a 26282c 4d4f54 8a8d91 b0b2b5 dcdcd8 f0efea 8c1c1c 1d3a6e 2f5d8c 1f4a33 7a6a4f 5e1f2b b5651d")
CLOTHES = shades("1a1a20 2b3350 4a4a4a 7a6a58 8c2f2f 2f5a44 c8c4b8 3f5f8a b08040 6a4a6a d0d0d4 25303a")
LEAF = shades("385c24 4d6626 294721 3d5733 7a6121 6b3d21 46632f")
SKIN, GRASS = shades("d9a88c b38061 6b4733"), shades("4d662e 616b33 73664c 80735c")
SLABS, FENCES = shades("807d78 948070 6b6b6b 9e9989"), shades("333833 735438 999999 d9d9d1 244733")
WHITE, RED, BLUE, YELLOW, GREEN, BLACK = shades("eceae6 c21a1f 1a409e ebb81a 146640 17181a")
AMBER, LAMP, TYRE, GLASS = (1.0, 0.6, 0.1), (1.0, 0.85, 0.6), shades("121214")[0], shades("21282f")[0]


@dataclass(frozen=True)
class Weather:
    """Light and air. Colours are float32 RGB."""

    name: str
    sun: Point  # direction towards it in camera coordinates: x right, y down, z ahead
    sunlight: np.ndarray
    ambient: np.ndarray
    zenith: np.ndarray
    air: np.ndarray  # the sky at the horizon, and what far things fade into
    clouds: float
    fog: float  # extinction per metre
    wet: float = 0.0
    snow: float = 0.0

    @classmethod
    def draw(cls, rng: np.random.Generator, name: str) -> "Weather":
        def rgb(colour: Sequence[float], times: float = 1.0) -> np.ndarray:
            return np.array(colour, np.float32) * np.float32(times)

        azimuth, elevation, bright = rng.uniform(0, 2 * math.pi), rng.uniform(0.3, 1.1), rng.uniform(0.85, 1.15)
        level = math.cos(elevation)
        sun = (level * math.cos(azimuth), -math.sin(elevation), level * math.sin(azimuth))
        warm = rng.uniform(-0.08, 0.12) + 0.14 * (elevation < 0.5)
        tint = rgb((1 + warm, 1.0, 1 - warm))
        blue, share = rgb((0.30, 0.50, 0.82), rng.uniform(0.85, 1.15)), rng.uniform()
        if name == "night":
            dark = rgb((0.14, 0.15, 0.20), rng.uniform(0.7, 1.3))
            wet = 0.4 * (rng.random() < 0.4)
            return cls(name, sun, tint * 0, dark, dark * 0.25, dark * 0.7, 0.4 * share, 0.003, wet)
        if name == "fog":
            air = rgb((0.97, 1.0, 1.03), 0.74 * bright)
            return cls(name, sun, tint * 0.06, air * 0.95, air * 0.9, air * 1.08, 0.5, 0.018 + 0.037 * share)
        if name == "rain":
            air = rgb((0.97, 1.0, 1.03), 0.58 * bright)
            return cls(name, sun, tint * 0.04, air * 0.95, air * 0.9, air * 1.08, 0.5, 0.006 + 0.006 * share, wet=0.75)
        if name == "snow":
            air = rgb((0.97, 1.0, 1.03), 0.78 * bright)
            return cls(name, sun, tint * 0.1, air, air * 0.9, air * 1.08, 0.5, 0.004 + 0.01 * share, snow=bright * 0.85)
        haze = rgb((0.80, 0.84, 0.88), bright)
        if rng.random() < 0.35:  # overcast
            return cls(name, sun, tint * 0.15, rgb((0.82, 0.83, 0.84), bright), haze * 0.78, haze * 1.02, 0.9, 0.003)
        ambient = rgb((0.56, 0.60, 0.67), bright)
        return cls(name, sun, tint * (0.66 * bright), ambient, blue, haze * 1.05, 0.75 * share, 0.0015)


FIELDS = "a b c d red green blue red2 green2 blue2 p0 p1 p2 p3 sun open label pattern rough grain glow".split()


class Canvas:
    """A camera, a buffer of face numbers, and a table (`FIELDS`) of what each face is made of."""

    def __init__(self, rng: np.random.Generator, height: int, width: int, weather: str):
        self.rng, self.weather, self.size = rng, Weather.draw(rng, weather), (width, height)
        self.night = weather == "night"
        self.sunshine = bool(self.weather.sunlight.max() > 0.3)
        self.focal, self.centre = width * self.uniform(0.68, 0.95), width * self.uniform(0.42, 0.58)
        self.horizon = height / 2 - width * self.uniform(0.0, 0.05)
        self.eye, self.at = self.uniform(1.25, 1.7), 0.0  # the camera's height, and its place across the road
        self.bend = self.chance(0.5) * rng.normal(0, 0.0009)  # of the road: x shifts by bend * z²
        self.ids, self.veils = Image.new("I", self.size), Image.new("I", self.size)
        self.shadows = Image.new("L", self.size)
        self.draw_ids, self.draw_veils, self.draw_shadows = map(ImageDraw.Draw, (self.ids, self.veils, self.shadows))
        self.faces: list[tuple[float, ...]] = [(0, 0, 1, 1000, *[0.0] * 12, SKY, PLAIN, 0, 1, 0)]
        self.lamps: list[Point] = []
        self.sunny, self.veiled = 1.0, False

    # Random numbers.

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self.rng.random()

    def count(self, low: float, high: float) -> range:
        return range(int(self.uniform(low, high)))

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def pick(self, options: Sequence[Any]) -> Any:
        return options[int(self.rng.random() * len(options))]

    def tone(self, colour: Colour, spread: float = 0.15) -> Colour:
        """The same colour, a little brighter or darker and a little off in hue."""
        k, red, blue = 1 + self.uniform(-spread, spread), self.uniform(-0.02, 0.02), self.uniform(-0.02, 0.02)
        return (colour[0] * k + red, colour[1] * k, colour[2] * k + blue)

    def shade(self, palette: Sequence[Colour]) -> Colour:
        """A colour like those of the palette; now and then any colour at all."""
        if self.chance(0.1):
            red, green, blue = (self.rng.random(3) * 0.6 + 0.1).tolist()
            return (red, green, blue)
        return self.tone(self.pick(palette), 0.25)

    # The camera.

    def view(self, p: Point) -> Point:
        """Street to camera coordinates: x right, y down, z ahead."""
        return (p[0] - self.at + self.bend * p[2] * p[2], self.eye - p[1], p[2])

    def outline(self, points: list[Point]) -> Outline:
        """Pixels of a polygon in camera coordinates, cut off at the near plane; empty if out of sight."""
        if min(points, key=lambda p: p[2])[2] < NEAR:
            kept = []
            for p, q in zip(points, points[1:] + points[:1], strict=True):
                if p[2] >= NEAR:
                    kept.append(p)
                if (p[2] >= NEAR) != (q[2] >= NEAR):
                    t = (NEAR - p[2]) / (q[2] - p[2])
                    kept.append((p[0] + t * (q[0] - p[0]), p[1] + t * (q[1] - p[1]), NEAR))
            points = kept
        f, cx, cy, width = self.focal, self.centre, self.horizon, self.size[0]
        flat = [(cx + f * x / z, cy + f * y / z) for x, y, z in points]
        seen = len(flat) > 2 and min(flat)[0] < width and max(flat)[0] > 0
        return flat if seen else []

    # Painting.

    def face(
        self, points: Sequence[Point], colour: Colour, label: int, *, pattern: int = PLAIN, second: Colour = BLACK,
        params: Sequence[float] = (0, 0, 0, 0), rough: float = 0.06, grain: float = 12.0, glow: float = 0.0,
        inside: Point | None = None,
    ) -> bool:  # fmt: skip
        """Paint a flat polygon over what is there; the keywords say how `shade` fills it.

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
        if flat := self.outline(seen):
            sx, sy, sz = self.weather.sun
            sun = self.sunny * max(0.0, -nx * sx - ny * sy - nz * sz)
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

    def rod(self, p: Point, q: Point, thick: float, *what, **kind) -> None:
        """A straight rod, as a rectangle that faces the camera."""
        dx, dy = q[0] - p[0], q[1] - p[1]
        k = thick / 2 / (math.hypot(dx, dy) or 1.0)
        ends = [(p[0] - dy * k, p[1] + dx * k, p[2]), (q[0] - dy * k, q[1] + dx * k, q[2])]
        ends += [(q[0] + dy * k, q[1] - dx * k, q[2]), (p[0] + dy * k, p[1] - dx * k, p[2])]
        self.face(ends, *what, **kind)

    def disc(
        self, x: float, y: float, z: float, rx: float, ry: float, *what, corners: int = 12, turn: float = 0, **kind
    ):
        angles = [turn + 2 * math.pi * i / corners for i in range(corners)]
        self.face([(x + rx * math.cos(a), y + ry * math.sin(a), z) for a in angles], *what, **kind)

    def blob(self, x: float, y: float, z: float, rx: float, ry: float, corners: int, *what, **kind) -> None:
        """A ragged disc."""
        radii, step = (0.78 + 0.34 * self.rng.random(corners)).tolist(), 2 * math.pi / corners
        ring = [(x + rx * r * math.cos(i * step), y + ry * r * math.sin(i * step), z) for i, r in enumerate(radii)]
        self.face(ring, *what, **kind)

    def strip(self, x0: float, x1: float, z0: float, z1: float, *what, **kind) -> None:
        """A piece of ground along the road, following its bend."""
        z0 = max(z0, NEAR)
        if z1 > z0:
            zs = np.geomspace(z0, z1, 12 if self.bend and z1 - z0 > 5 else 2).tolist()
            self.face([(x0, 0, z) for z in zs] + [(x1, 0, z) for z in reversed(zs)], *what, **kind)

    # Shadows.

    def shadow(self, foot: Sequence[Point], tall: float, contact: float = 0.25) -> None:
        """Darken the ground: away from the sun, and all around `foot`, the corners on which something stands."""
        if self.sunshine:
            sx, sy, sz = self.weather.sun
            k = min(-tall / sy, 40.0)
            cast = [(x - sx * k, 0.0, z - sz * k) for x, _, z in foot]
            for i in range(len(foot)):
                self._darken([foot[i - 1], cast[i - 1], cast[i], foot[i]], 140)
            self._darken(cast, 140)
        if contact:
            mx, mz = (sum(p[i] for p in foot) / len(foot) for i in (0, 2))
            grow = partial(math.copysign, contact)
            self._darken([(x + grow(x - mx), 0, z + grow(z - mz)) for x, _, z in foot], 255)

    def _darken(self, points: Sequence[Point], amount: int) -> None:
        if flat := self.outline([self.view(p) for p in points]):
            self.draw_shadows.polygon(flat, fill=amount)

    def stand(self, x: float, z: float, wide: float = 0.0, tall: float = 0.0, deep: float = 0.15) -> None:
        """What is painted next stands here, and gets no sun if that is in a building's shadow."""
        px, py, pz = self.view((x, 0, max(z, 1.0)))
        u, v = int(self.centre + self.focal * px / pz), int(self.horizon + self.focal * py / pz)
        seen = 0 <= u < self.size[0] and 0 <= v < self.size[1]
        self.sunny = 0.15 if seen and self.shadows.getpixel((u, v)) == 140 else 1.0
        if wide:
            corners = ((-wide, -deep), (wide, -deep), (wide, deep), (-wide, deep))
            self.shadow([(x + dx, 0, z + dz) for dx, dz in corners], tall, 0.05)


# --- upright things: people, cycles, plants, street furniture -----------------------------------------------------------


def person(c: Canvas, x: float, z: float, label: int = PERSON, saddle: float = 0.0) -> None:
    """A walker or, on a saddle of that height, a rider."""
    s = c.uniform(1.5, 1.9) * (0.68 if c.chance(0.1) and not saddle else 1.0)
    c.stand(x, z, 0.25, 0.8 * s)
    shirt, trousers = c.shade(CLOTHES), c.shade(CLOTHES)
    step, swing, wide = c.uniform(0.02, 0.22), c.uniform(-0.07, 0.07), s * c.uniform(0.115, 0.15)
    hips = saddle + 0.06 if saddle else 0.48 * s
    neck = hips + 0.36 * s
    for side in SIDES:
        foot = (x + side * step * (0.5 if saddle else 1), saddle * 0.35 + 0.04, z)
        c.rod((x + side * 0.05 * s, hips + 0.03, z), foot, 0.095 * s, trousers, label)
        c.rod(foot, (foot[0] + 0.07, foot[1], z), 0.08, BLACK, label)
    hem, top = hips - c.uniform(-0.08, 0.12) * s, neck - 0.06 * s
    body = [(-0.85, hem), (0.85, hem), (1.0, top), (0.5, neck), (-0.5, neck), (-1.0, top)]
    c.face([(x + wide * dx, y, z) for dx, y in body], shirt, label, rough=0.15)
    sleeve = c.tone(shirt, 0.25)
    for side in SIDES:
        hand = (x + side * (wide * 1.25 + swing), hips + (0.16 * s if saddle else 0.02), z)
        c.rod((x + side * wide * 0.98, top, z), hand, 0.07 * s, sleeve, label)
    if c.chance(0.35) and not saddle:  # a bag
        c.rod(
            (x + wide * c.pick(SIDES), hips, z), (x + wide * 0.6, hips + 0.28 * s, z), 0.18 * s, c.shade(PAINTS), label
        )
    c.disc(x, neck + 0.075 * s, z, 0.058 * s, 0.08 * s, c.tone(c.pick(SKIN)), label, corners=10)
    c.disc(x, neck + 0.11 * s, z, 0.064 * s, 0.055 * s, c.shade(PAINTS if saddle else CLOTHES), label, corners=10)


def cycle(c: Canvas, x: float, z: float, label: int, ridden: bool) -> None:
    """A bicycle or motorcycle, from the side or from behind."""
    paint, motor, way, sidelong = c.shade(PAINTS), label == MOTORCYCLE, c.pick(SIDES), c.chance(0.45)
    r, half = (0.31, 0.68) if motor else (0.34, 0.54)
    c.stand(x, z, half if sidelong else 0.15, 0.7)
    seat = (x - way * 0.18, 0.78 if motor else 0.92, z)
    if sidelong:
        hub, fork, bars, pedal = (
            (x + way * a, y, z) for a, y in ((-half, r), (half, r), (half - 0.16, 1.02), (-0.05, 0.3))
        )
        for wheel in (hub, fork):
            middle = c.view(wheel)[0]
            c.disc(*wheel, r, r, TYRE, label, corners=14, pattern=SPOKES, params=(middle, r, r, 0.55 if motor else 0.8))
        if motor:
            tank = [
                (hub[0], 0.72, z),
                seat,
                (x + way * 0.35, 0.9, z),
                (x + way * 0.45, 0.5, z),
                pedal,
                (hub[0], 0.5, z),
            ]
            c.face(tank, paint, label, rough=0.15)
            c.rod((x - way * 0.3, 0.3, z), (x + way * 0.3, 0.36, z), 0.32, (0.22, 0.22, 0.23), label, rough=0.3)
            c.rod((hub[0], 0.8, z), (x + way * 0.05, 0.82, z), 0.13, BLACK, label)
        for p, q in ((hub, seat), (seat, pedal), (pedal, hub), (pedal, bars), (seat, bars), (bars, fork)):
            c.rod(p, q, 0.07 if motor else 0.05, paint, label)
        c.rod((seat[0] - 0.13, seat[1], z), (seat[0] + 0.13, seat[1], z), 0.07, BLACK, label)
    else:
        wide = 0.1 if motor else 0.04
        c.upright(x - wide, x + wide, 0.02, 0.7, z, TYRE, label)
        if motor:
            c.disc(x, 0.72, z, 0.22, 0.3, paint, label, corners=8, rough=0.15)
        c.rod((x, 0.3, z), (x, 0.95, z), 2 * wide, paint, label)
        c.rod((x - 0.3, 1.0, z), (x + 0.3, 1.0, z), 0.06, BLACK, label)
        c.disc(x, 0.66, z, 0.05, 0.05, RED, label, corners=6, glow=0.6)
    if ridden:
        person(c, seat[0] if sidelong else x, z - 0.02, RIDER, 0.8 if motor else 0.92)


def tree(c: Canvas, x: float, z: float) -> None:
    tall = c.uniform(4, 11)
    bare, trunk, leaf = tall * c.uniform(0.2, 0.4), 0.025 * tall + 0.06, c.tone(c.pick(LEAF), 0.25)
    rx, ry, middle = (tall - bare) * c.uniform(0.32, 0.55), (tall - bare) / 2, (tall + bare) / 2
    c.stand(x, z)
    c.shadow([(x - rx * 0.8, 0, z), (x, 0, z - rx * 0.5), (x + rx * 0.8, 0, z), (x, 0, z + rx * 0.5)], tall * 0.8, 0)
    bole = [(x - trunk, 0, z), (x + trunk, 0, z), (x + trunk * 0.6, tall * 0.6, z), (x - trunk * 0.6, tall * 0.6, z)]
    c.face(bole, c.tone((0.3, 0.25, 0.2), 0.3), VEGETATION, rough=0.3)
    fine = c.focal * tall / max(z, 1) > 60  # pixels
    c.blob(
        x, middle, z, rx * 1.12, ry * 1.12, 24 if fine else 12, leaf, VEGETATION, pattern=LEAVES, rough=0.45, grain=9
    )
    for i in range(7 if fine else 3):
        angle, out = i * 2.4 + c.uniform(0, 1), c.uniform(0.25, 0.62)
        dx, dy = rx * out * math.cos(angle), ry * out * math.sin(angle)
        k = 1.0 + 0.5 * dy / ry + c.uniform(-0.08, 0.08)  # brighter towards the top
        size, corners = (0.5, 15) if fine else (0.65, 9)
        colour = (leaf[0] * k, leaf[1] * k, leaf[2] * k)
        c.blob(x + dx, middle + dy, z, rx * size, ry * size, corners, colour, VEGETATION, rough=0.5, grain=9)


def bush(c: Canvas, x: float, z: float, wide: float = 0.0) -> None:
    leaf, wide, tall = c.tone(c.pick(LEAF), 0.3), wide or c.uniform(0.6, 1.8), c.uniform(0.6, 1.6)
    c.stand(x, z)
    for _ in range(3):
        middle, y = x + c.uniform(-0.4, 0.4) * wide, tall * c.uniform(0.35, 0.5)
        c.blob(middle, y, z, wide * 0.7, tall * 0.55, 12, c.tone(leaf, 0.2), VEGETATION, rough=0.45)


def traffic_sign(c: Canvas, x: float, z: float) -> None:
    y, r = c.uniform(2.1, 3.0), c.uniform(0.3, 0.48)
    c.stand(x, z, 0.05, y)
    c.rod((x, 0, z), (x, y + r * 0.8, z), 0.09, c.tone(c.pick(METALS)), POLE)
    kind: dict[str, Any] = {"label": TRAFFIC_SIGN, "glow": 0.25 if c.night else 0.06, "rough": 0.02}
    shape = c.pick(("round", "round", "triangle", "square", "board", "back"))
    if shape == "round":
        rim, middle = c.pick(((RED, WHITE), (BLUE, BLUE), (RED, RED), (RED, BLUE)))
        c.disc(x, y, z, r, r, rim, corners=14, **kind)
        c.disc(x, y, z, r * 0.74, r * 0.74, middle, corners=14, **kind)
        c.rod((x - r * 0.4, y, z), (x + r * 0.4, y, z), r * 0.3, BLACK if middle == WHITE else WHITE, **kind)
    elif shape == "triangle":
        turn = c.pick(SIDES) * math.pi / 2
        c.disc(x, y, z, r * 1.15, r * 1.15, RED, corners=3, turn=turn, **kind)
        c.disc(x, y, z, r * 0.7, r * 0.7, WHITE, corners=3, turn=turn, **kind)
    elif shape == "back":
        c.disc(x, y, z, r, r, c.tone((0.5, 0.51, 0.53)), **kind)
    else:
        wide, ground = r * (2.4 if shape == "board" else 0.95), c.pick((BLUE, GREEN, WHITE, YELLOW))
        c.upright(x - wide, x + wide, y - r, y + r, z, ground, **kind)
        for row in (y - 0.4 * r, y + 0.3 * r):
            end = (x + wide * c.uniform(-0.1, 0.7), row, z)
            c.rod((x - wide * 0.7, row, z), end, r * 0.28, BLACK if ground in (WHITE, YELLOW) else WHITE, **kind)


def traffic_light(c: Canvas, x: float, z: float, reach: float) -> None:
    """Signals on a post and, if `reach` is not 0, on an arm over the road."""
    grey, lit = c.tone(c.pick(METALS)), c.pick((0, 0, 1, 2))
    heads = [(x, c.uniform(2.3, 2.9))]
    c.stand(x, z, 0.1, 5)
    c.rod((x, 0, z), (x, 5.6 if reach else 3.4, z), 0.16, grey, POLE)
    if reach:
        c.rod((x, 5.5, z), (x + reach, 5.7, z), 0.12, grey, POLE)
        heads.append((x + reach, 5.2))
    for hx, hy in heads:
        c.upright(hx - 0.24, hx + 0.24, hy - 0.6, hy + 0.6, z, c.tone(BLACK, 0.5), TRAFFIC_LIGHT)
        for i, bulb in enumerate(shades("ff1f1a ffb31a 26f273")):
            k = 1.0 if i == lit else 0.22
            colour = (bulb[0] * k, bulb[1] * k, bulb[2] * k)
            c.disc(hx, hy + 0.38 * (1 - i), z, 0.14, 0.14, colour, TRAFFIC_LIGHT, corners=8, glow=float(i == lit))


def lamp_post(c: Canvas, x: float, z: float, side: int) -> None:
    tall, thick, steel = c.uniform(5, 8.5), c.uniform(0.12, 0.2), c.tone(c.pick(METALS))
    head = (x - side * c.uniform(0.4, 2.2), tall, z)
    c.stand(x, z, 0.08, tall)
    c.rod((x, 0, z), (x, tall - 0.1, z), thick, steel, POLE)
    c.rod((x, tall - 0.15, z), head, thick * 0.6, steel, POLE)
    c.upright(
        head[0] - 0.3, head[0] + 0.3, tall - 0.08, tall + 0.08, z, LAMP if c.night else steel, POLE, glow=float(c.night)
    )
    c.lamps.append(c.view(head))


def clutter(c: Canvas, x: float, z: float) -> None:
    """Bins, cabinets and the like, which are none of the 19 classes."""
    wide, tall, colour = c.uniform(0.2, 0.6), c.uniform(0.5, 1.3), c.shade(PAINTS)
    c.stand(x, z, wide, tall)
    c.upright(x - wide, x + wide, 0, tall, z, colour, IGNORE)
    c.upright(x - wide, x + wide, tall * 0.85, tall, z, c.tone(colour, 0.5), IGNORE)


# --- vehicles: the outline of a side, drawn out across the width --------------------------------------------------------

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

    def __init__(
        self, c: Canvas, x: float, z: float, heading: float, label: int, length: float, half: float, tall: float
    ):
        self.c, self.x, self.z, self.label = c, x, z, label
        self.sin, self.cos = math.sin(heading), math.cos(heading)  # heading 0 drives away from the camera
        self.length, self.half, self.tall = length, half, tall
        self.belt, self.narrow = math.inf, 1.0  # above the belt the body is narrower
        c.stand(x, z)
        c.shadow([self.at(a * length / 2, b * half, 0) for a, b in ((-1, -1), (-1, 1), (1, 1), (1, -1))], tall * 0.8)

    def at(self, along: float, across: float, up: float) -> Point:
        return (self.x + along * self.sin + across * self.cos, up, self.z + along * self.cos - across * self.sin)

    def width(self, up: float) -> float:
        return self.half * (self.narrow if up > self.belt else 1.0)

    def sides(self, outline: Outline, colour: Colour, out: float = 0.0, **kind) -> None:
        """The same polygon on both flanks, `out` metres off them."""
        for side in SIDES:
            points = [self.at(a, side * (self.width(y) + out), y) for a, y in outline]
            self.c.face(points, colour, self.label, inside=self.at(0, 0, self.tall / 2), **kind)

    def body(self, outline: Outline, paint: Colour, special: dict[int, Colour]) -> None:
        """What lies between the flanks' outlines, far parts first. `special` has edges of another colour."""
        edges = list(zip(outline, outline[1:], strict=False))
        middle = self.at(*(sum(p[0] for p in outline) / len(outline), 0), sum(p[1] for p in outline) / len(outline))
        for i in sorted(range(len(edges)), key=lambda i: -self.cos * (edges[i][0][0] + edges[i][1][0])):
            (a, y), (b, v) = edges[i]
            w, u = self.width(y), self.width(v)
            points = [self.at(a, -w, y), self.at(a, w, y), self.at(b, u, v), self.at(b, -u, v)]
            self.c.face(points, special.get(i, paint), self.label, inside=middle, rough=0.03, grain=4)

    def panel(self, along: float, left: float, right: float, low: float, high: float, *what, **kind) -> bool:
        """A rectangle on the front or the back."""
        points = [self.at(along, a, y) for a, y in ((left, low), (right, low), (right, high), (left, high))]
        return self.c.face(points, *what, self.label, inside=self.at(0, 0, low), **kind)

    def ends(self, low: float, high: float, lit: bool) -> None:
        """Lamps, number plates and bumpers."""
        for nose, lamp, glow in ((False, RED, 0.25), (True, WHITE, 0.5)):
            along = (self.length / 2 + 0.01) * (1 if nose else -1)
            if self.panel(along, -self.half, self.half, low * 0.5, low * 0.8, (0.14, 0.14, 0.15)):
                for side in SIDES:
                    shine = glow * lit * (2.2 if self.c.night else 1.0)
                    self.panel(along, side * self.half * 0.66, side * self.half * 0.96, low, high, lamp, glow=shine)
                self.panel(along, -0.26, 0.26, low * 0.86, low * 0.86 + 0.13, WHITE)

    def wheels(self, spots: Iterable[float], radius: float) -> None:
        angles = np.linspace(0, 2 * math.pi, 12, endpoint=False).tolist()
        for spot in spots:
            for r, colour in ((radius, TYRE), (radius * 0.62, (0.42, 0.43, 0.44))):
                self.sides([(spot + r * math.cos(t), radius + r * math.sin(t)) for t in angles], colour, 0.01)


def car(c: Canvas, x: float, z: float, heading: float, lit: bool) -> None:
    name = c.pick(("saloon", "hatchback", "hatchback", "van"))
    shape, cabin, rear = CARS[name]
    tall = c.uniform(1.38, 1.62) + 0.35 * (name == "van")
    v = Vehicle(c, x, z, heading, CAR, c.uniform(3.7, 4.9), c.uniform(0.84, 0.95), tall)
    v.belt, v.narrow, paint = 0.74 * tall, 0.84, c.shade(PAINTS)
    outline = [(a * v.length, y * tall) for a, y in shape]
    v.body(outline, paint, {rear: GLASS, 5: GLASS})
    v.sides(outline[cabin], paint)
    v.sides([(a, min(y, 0.7 * tall)) for a, y in outline], paint, rough=0.03)
    window = outline[cabin]
    ma, my = (sum(p[i] for p in window) / len(window) for i in (0, 1))
    v.sides([(ma + (a - ma) * 0.86, my + (y - my) * 0.72) for a, y in window], GLASS, 0.01)
    if c.focal * tall / max(z, 1) > 14:  # pixels
        v.sides(
            [(ma - 0.04, my - 0.2), (ma + 0.06, my - 0.2), (ma + 0.06, tall * 0.96), (ma - 0.04, tall * 0.96)],
            paint,
            0.02,
        )
        v.wheels((-0.31 * v.length, 0.31 * v.length), c.uniform(0.29, 0.35))
        v.ends(0.42 * tall, 0.53 * tall, lit)


def coach(c: Canvas, x: float, z: float, heading: float, label: int) -> None:
    """A bus, or a tram of two cars: long boxes with a band of windows."""
    tram = label == TRAIN
    length, half, tall, paint = (
        c.uniform(10, 14),
        c.uniform(1.2, 1.3),
        c.uniform(2.9, 3.4) + 0.2 * tram,
        c.shade(PAINTS),
    )
    lower, panes, pane = c.pick((paint, c.shade(PAINTS))), int(length / c.uniform(1.2, 1.9)), LAMP if c.night else GLASS
    h, n, roof, sill = length / 2, 0.9 if tram else 0.25, tall - 0.5, 1.2
    outline = [
        (-h, 0.3),
        (-h, sill),
        (-h + n * 0.4, roof),
        (-h + n, tall),
        (h - n, tall),
        (h - n * 0.4, roof),
        (h, sill),
        (h, 0.3),
    ]
    for part in (1, 0) if tram else (0,):  # the far car first
        v = Vehicle(c, x, z + part * (length + 0.4), heading, label, length, half, tall)
        v.body(outline, paint, {0: lower, 1: GLASS, 5: GLASS, 6: lower})
        v.sides(outline, paint, rough=0.03)
        v.sides([(-h, 0.3), (-h, sill), (h, sill), (h, 0.3)], lower, rough=0.03)
        for i in range(panes):
            a, b = (-h + n * 0.6 + (length - 1.2 * n) * (i + t) / panes for t in (0.06, 0.94))
            low = 0.45 if not tram and i in (panes - 1, panes // 2) else 1.3  # doors
            v.sides([(a, low), (a, tall - 0.55), (b, tall - 0.55), (b, low)], pane, 0.01, glow=0.55 * c.night)
        for end in SIDES:  # where it goes
            v.panel(end * (h - n * 0.3 + 0.05), -0.5, 0.5, tall - 0.42, tall - 0.2, AMBER, glow=0.5)
        if not tram:
            v.wheels((-0.3 * length, 0.33 * length), 0.48)
        v.ends(0.62, 0.82, True)


def truck(c: Canvas, x: float, z: float, heading: float) -> None:
    tall = c.uniform(2.7, 3.7)
    v = Vehicle(c, x, z, heading, TRUCK, c.uniform(6, 10.5), c.uniform(1.1, 1.27), tall)
    h, cab, load, top = v.length / 2, c.shade(PAINTS), c.shade(PAINTS), min(tall - 0.1, c.uniform(2.3, 2.8))
    front = [(h - 1.9, 0.45), (h - 1.9, top), (h - 0.5, top), (h - 0.12, top * 0.58), (h, top * 0.52), (h, 0.35)]

    def draw_cab() -> None:
        v.body(front, cab, {2: GLASS})
        v.sides(front, cab)
        v.sides([(h - 1.5, top * 0.6), (h - 1.5, top * 0.92), (h - 0.6, top * 0.92), (h - 0.3, top * 0.6)], GLASS, 0.01)

    def draw_load() -> None:
        for low, high, end, colour in ((0.5, 0.9, h - 0.1, (0.13, 0.13, 0.14)), (0.85, tall, h - 2.1, load)):
            box = [(-h, low), (-h, high), (end, high), (end, low)]
            v.body(box, colour, {})
            v.sides(box, colour, rough=0.08, grain=3)
        if c.chance(0.5):  # lettering
            low, high = sorted((c.uniform(1.2, tall), c.uniform(1.2, tall)))
            v.sides([(-h * 0.8, low), (-h * 0.8, high), (h * 0.3, high), (h * 0.3, low)], c.shade(PAINTS), 0.01)
        v.panel(-h - 0.01, -0.03, 0.03, 0.9, tall, BLACK)  # between the doors

    for draw in (draw_cab, draw_load) if v.cos > 0 else (draw_load, draw_cab):
        draw()
    v.wheels((-0.32 * v.length, -0.2 * v.length, h - 1.0), 0.48)
    v.ends(0.6, 0.76, True)


# --- what lines the road ------------------------------------------------------------------------------------------------


def facade(c: Canvas) -> tuple[Colour, dict[str, Any]]:
    """Colour and windows of a house: bay width, storey height, and the share of each that is glass."""
    params = (c.uniform(1.8, 3.8), c.uniform(2.8, 3.6), c.uniform(0.35, 0.75), c.uniform(0.45, 0.7))
    rough, grain = c.uniform(0.05, 0.16), c.pick((3.0, 8.0, 16.0))
    kind = {"pattern": FACADE, "params": params, "second": c.tone(c.pick(GLASSES)), "rough": rough, "grain": grain}
    return c.shade(PLASTER), kind


def house(c: Canvas, x: float, z0: float, z1: float, side: int, tall: float, pitched: bool) -> None:
    c.sunny = 1.0
    colour, windows = facade(c)
    deep, out = c.uniform(8, 14) * side, 0.25 * side
    if pitched:
        ridge, top, roof = x + deep / 2, tall + abs(deep) * 0.35, c.shade(ROOFS)
        slope = [(x - out, tall - 0.1, z0), (x - out, tall - 0.1, z1), (ridge, top, z1), (ridge, top, z0)]
        c.face(slope, roof, BUILDING, rough=0.15)
        c.face([(x, tall, z0), (x + deep, tall, z0), (ridge, top, z0)], colour, BUILDING, rough=0.1)
    c.upright(x, x + deep, 0, tall, z0, colour, BUILDING, **windows)
    c.along(x, z0, z1, 0, tall, colour, BUILDING, **windows)
    if not pitched:
        c.along(x - out, z0, z1, tall - 0.5, tall, c.tone(colour, 0.25), BUILDING)  # the cornice
    if c.chance(0.5):  # shops
        y, params = c.uniform(2.6, 3.3), (c.uniform(2, 4), 3.3, 0.8, 0.68)
        c.along(x, z0, z1, 0, y, c.shade(PLASTER), BUILDING, pattern=FACADE, params=params, second=c.pick(GLASSES))
        if c.chance(0.5):
            c.along(x - out / 2, z0, z1, y, y + 0.6, c.shade(PAINTS), BUILDING, glow=0.3 * c.night)


def wall(c: Canvas, x: float, z0: float, z1: float) -> None:
    stone, tall = c.shade(PLASTER), c.uniform(0.7, 2.6)
    c.stand(x, (z0 + z1) / 2)
    params = (c.uniform(0.5, 2.5), c.uniform(0.25, 0.9), 0.05, 0)
    joints = c.tone(stone, 0.4)
    c.along(x, z0, z1, 0, tall, stone, WALL, pattern=BLOCKS, params=params, second=joints, rough=0.14, grain=8)
    c.along(x, z0, z1, tall, tall + 0.12, c.tone(stone, 0.3), WALL)


def fence(c: Canvas, x: float, z0: float, z1: float) -> None:
    tall = c.uniform(0.9, 2.0)
    c.stand(x, (z0 + z1) / 2)
    params = (c.uniform(0.13, 0.3), tall, c.pick((0.3, 0.45, 0.75)), 0)
    c.along(x, z0, z1, 0.05, tall, c.shade(FENCES), FENCE, pattern=BARS, params=params, rough=0.15)


class Street:
    """Lays out one scene: the ground is painted at once, the rest becomes a list of things ordered by depth."""

    def __init__(self, c: Canvas):
        self.c = c
        self.things: list[tuple[float, Callable[[], None]]] = []
        self.taken: list[tuple[float, float, float, float]] = []
        self.kind = c.pick(("city", "city", "suburb", "avenue"))
        city = self.kind == "city"
        self.lane, self.lanes, self.busy = c.uniform(2.9, 3.7), c.pick((1, 1, 1, 2)), c.uniform(0.3, 1.0)
        self.road = self.lane * self.lanes  # half of its width, without parking
        self.parking = {side: c.chance(0.6) for side in SIDES}
        self.kerb = {side: self.road + 2.2 * self.parking[side] for side in SIDES}
        self.verge = {side: self.kerb[side] + c.uniform(1.2, 3.0) * c.chance(0.3 if city else 0.7) for side in SIDES}
        self.walk = {side: self.verge[side] + c.uniform(1.8, 4.5) for side in SIDES}  # the outer edges, from the middle
        self.front = {side: self.walk[side] + c.uniform(2, 8) * c.chance(0.15 if city else 0.9) for side in SIDES}
        self.crossing = c.uniform(12, 50) if c.chance(0.6) else 999.0
        self.beyond = self.crossing + c.uniform(7, 12)
        self.tram = c.chance(0.2)
        c.at = self.road - self.lane / 2 + c.uniform(-0.3, 0.3)

    def paint(self) -> None:
        for part in (self.ground, self.markings, self.backdrop, self.frontages):
            part()
        for part in (self.traffic, self.parked, self.furniture, self.people):
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

    def clear_of_crossing(self, z: float, before: float, after: float) -> bool:
        return not self.crossing - before < z < self.beyond + after

    def ground(self) -> None:
        c = self.c
        grass, slab, grey = c.tone(c.pick(GRASS), 0.2), c.tone(c.pick(SLABS)), c.uniform(0.28, 0.5)
        asphalt = c.tone((grey, grey, grey * 1.02), 0.06)
        turf: dict[str, Any] = {"label": TERRAIN, "rough": 0.3, "grain": 6}
        tar: dict[str, Any] = {"label": ROAD, "rough": c.uniform(0.05, 0.14), "grain": c.pick((5.0, 20.0))}
        slabs: dict[str, Any] = {"label": SIDEWALK, "rough": 0.1, "pattern": BLOCKS, "second": c.tone(slab, 0.3)}
        slabs["params"] = (c.uniform(0.3, 1.0), c.uniform(0.3, 1.0), 0.06, 0)
        c.face([(-400, 0, NEAR), (400, 0, NEAR), (400, 0, 400), (-400, 0, 400)], grass, **turf)
        for side in SIDES:
            kerb, verge = side * self.kerb[side], side * self.verge[side]
            c.strip(kerb, side * self.walk[side], NEAR, 200, slab, **slabs)
            if verge != kerb:
                c.strip(kerb, verge, NEAR, 200, c.tone(grass), **turf)
            c.strip(kerb, kerb + side * 0.2, NEAR, 200, c.tone(slab, 0.3), SIDEWALK, rough=0.1)
        c.strip(-self.kerb[-1], self.kerb[1], NEAR, 200, asphalt, **tar)
        if self.crossing < FAR:
            c.strip(-90, 90, self.crossing, self.beyond, c.tone(asphalt, 0.05), **tar)
        for _ in c.count(0, 7):  # patches of other tar
            x, z = c.uniform(-self.kerb[-1], self.kerb[1] - 2), c.uniform(3, 30)
            c.strip(x, x + c.uniform(0.5, 2), z, z + c.uniform(0.5, 6), c.tone(asphalt, 0.2), **tar)
        for rail in (-1.22, 0.22, 1.22, 2.66) if self.tram else ():
            x = rail - 0.72 - self.lane / 2 + (self.lane if rail > 0.5 else 0)
            c.strip(x - 0.05, x + 0.05, NEAR, 150, (0.55, 0.54, 0.53), ROAD, rough=0.02)

    def markings(self) -> None:
        c = self.c
        kind = partial(c.strip, colour=c.tone(WHITE), label=ROAD, rough=0.16, grain=10)

        def line(x: float, dashed: bool) -> None:
            z = NEAR + c.uniform(0, 4)
            while z < 90:
                end = z + 3 if dashed else 90.0
                for a, b in ((z, min(end, self.crossing - 1)), (max(z, self.beyond + 1), end)):
                    kind(x - 0.07, x + 0.07, a, b)
                z = end + 4.5

        line(0.0, c.chance(0.6))
        for side in SIDES:
            if self.lanes == 2:
                line(side * self.lane, True)
            if self.parking[side] or c.chance(0.4):
                line(side * self.road, c.chance(0.2))
        if self.crossing < FAR and c.chance(0.75):  # stop line and zebra
            z = self.crossing - 3.2
            kind(0.1, self.kerb[1], z - 1, z - 0.6)
            for x in np.arange(-self.kerb[-1] + 0.3, self.kerb[1] - 0.4, 1.0).tolist():
                kind(x, x + 0.5, z, z + 2.6)

    def backdrop(self) -> None:
        """What closes the view at the end of the street, some of it too far to tell."""
        c, x = self.c, -150.0
        while x < 150:
            wide, what = c.uniform(8, 30), c.pick(("houses", "houses", "trees", "haze"))
            if what == "houses":
                colour, windows = facade(c)
                c.upright(x, x + wide, 0, c.uniform(5, 22), FAR, colour, BUILDING, **windows)
            elif what == "trees":
                for i in range(int(wide / 4)):
                    colour, tall = c.tone(c.pick(LEAF)), c.uniform(4, 9)
                    c.blob(x + 4 * i, 3, FAR - 1, 5, tall, 10, colour, VEGETATION, rough=0.4)
            else:
                c.upright(x, x + wide, 0, 4, FAR, c.tone((0.5, 0.52, 0.55)), IGNORE)
            x += wide

    def frontages(self) -> None:
        """Houses, walls, fences and gardens along both sides."""
        for side in SIDES:
            z, tall = self.c.uniform(-6, 3), self.c.uniform(7, 20)
            while z < FAR:
                end = z + self.c.uniform(7, 18)
                if z < self.beyond + 2 and end > self.crossing - 3:  # leave the side street open
                    if z > self.crossing - 9:
                        z = self.beyond + 3
                        continue
                    end = self.crossing - 3.5
                self.plot(side, z, end, tall)
                z = end

    def plot(self, side: int, z: float, end: float, tall: float) -> None:
        c, x = self.c, side * self.front[side]
        built = c.chance({"city": 0.93, "suburb": 0.62, "avenue": 0.4}[self.kind])
        if built:
            low, high = {"city": (max(6, tall - 4), max(6, tall + 4)), "suburb": (4, 8), "avenue": (5, 16)}[self.kind]
            height, city = c.uniform(low, high), self.kind == "city"
            x += side * (0 if city else c.uniform(0, 5))
            back = end - (0 if city and c.chance(0.8) else c.uniform(0.5, 3))
            if c.sunshine:
                c.shadow([(x, 0, z), (x, 0, back), (x + side * 10, 0, back), (x + side * 10, 0, z)], height, 0)
            self.add(end, house, x, z, back, side, height, not city or c.chance(0.2))
        else:
            for _ in c.count(2, 5):
                self.add(end - 0.1, tree, x + side * c.uniform(1, 12), c.uniform(max(z, 2), max(end, 3)))
        if built and self.front[side] - self.walk[side] < 1.5:
            return
        edge, what = side * self.walk[side], c.pick((wall, fence, fence, bush, None))
        if what in (wall, fence):
            self.add(end - 0.3, what, edge, z, end)
        elif what is bush:  # a hedge
            for spot in np.arange(max(z, 2), end, 1.2).tolist():
                self.add(end - 0.3 - 0.001 * spot, bush, edge, spot, 1.2)
        for _ in c.count(0, 3):
            self.add(
                end - 0.2, c.pick((tree, bush, bush)), edge + side * c.uniform(0.8, 2.5), max(c.uniform(z, end), 2.5)
            )

    def traffic(self) -> None:
        c = self.c
        if self.tram:
            away, z = self.lanes > 1 and c.chance(0.5), c.uniform(12, 40)
            x = self.lane * (0.5 if away else -0.5)
            self.free(x, z + 7, 1.5, 16)
            self.add(z - 6, coach, x, z, 0.0 if away else math.pi, TRAIN)
        for lane in range(-self.lanes, self.lanes):
            z = c.uniform(6, 35)
            while z < 95:
                x = (lane + 0.5) * self.lane + c.uniform(-0.3, 0.3)
                heading, roll = (0.0 if lane >= 0 else math.pi) + c.uniform(-0.04, 0.04), c.uniform(0, 1)
                if roll < 0.22 and self.free(x, z, 0.5, 1.2):
                    self.add(z, cycle, x + c.uniform(0, 0.8), z, c.pick((MOTORCYCLE, BICYCLE)), True)
                elif 0.22 < roll < 0.3 and self.free(x, z + 5, 1.4, 8):
                    self.add(z - 1, coach, x, z + 5, heading, BUS)
                elif 0.3 < roll < 0.36 and self.free(x, z + 5, 1.4, 8):
                    self.add(z - 1, truck, x, z + 5, heading)
                elif self.free(x, z, 1.0, 3):
                    self.add(z - 2, car, x, z, heading, True)
                z += c.uniform(7, 40) / self.busy
        if self.crossing < FAR and c.chance(0.4):
            z, x = (self.crossing + self.beyond) / 2, c.uniform(-9, 9)
            if self.free(x, z, 3, 1.2):
                self.add(z - 1, car, x, z, c.pick(SIDES) * math.pi / 2, True)

    def parked(self) -> None:
        c = self.c
        for side in SIDES:
            z, x = c.uniform(3, 9), side * (self.kerb[side] - 1.1)
            while self.parking[side] and z < 80:
                heading = 0.0 if c.chance(0.5 + side * 0.4) else math.pi
                if c.chance(0.35 + 0.5 * self.busy) and self.clear_of_crossing(z, 8, 4):
                    if c.chance(0.05) and self.free(x, z + 2, 1.1, 5):
                        self.add(z - 2, truck, x, z + 2, heading)
                    elif self.free(x, z, 0.9, 2.6):
                        self.add(z - 2, car, x, z, heading, c.chance(0.1))
                z += c.uniform(5.4, 7)
        for _ in c.count(0, 5):
            side, z, kind = c.pick(SIDES), c.uniform(5, 30), c.pick((BICYCLE, BICYCLE, MOTORCYCLE))
            for i in range(c.pick((1, 1, 2, 4))):
                x, spot = side * (self.kerb[side] + c.uniform(0.3, 0.9)), z + 0.6 * i
                if self.free(x, spot, 0.6, 0.25):
                    self.add(spot, cycle, x, spot, kind, False)

    def furniture(self) -> None:
        c = self.c
        for side in SIDES:
            x = side * (self.kerb[side] + 0.45)
            for z in np.arange(c.uniform(5, 16), 90, c.uniform(14, 30)).tolist():
                if self.clear_of_crossing(z, 2, 2) and self.free(x, z, 0.2, 0.2):
                    self.add(z, lamp_post, x, z, side)
            for _ in c.count(0, 5):
                z = c.uniform(5, 45)
                if self.free(x, z, 0.4, 0.3):
                    self.add(z, c.pick((traffic_sign, traffic_sign, clutter)), x, z)
            if self.verge[side] > self.kerb[side] or c.chance(0.25):
                trees = side * max((self.kerb[side] + self.verge[side]) / 2, self.kerb[side] + 0.7)
                for z in np.arange(c.uniform(4, 14), 80, c.uniform(6, 14)).tolist():
                    if self.clear_of_crossing(z, 4, 3) and self.free(trees, z, 0.4, 0.4):
                        self.add(z, tree, trees, z)
            if self.crossing < FAR and c.chance(0.8):
                z = self.crossing - c.uniform(4, 5) if side > 0 else self.beyond + 1
                self.add(z, traffic_light, x, z, -side * c.uniform(2, 4.5) * c.chance(0.5))
                if c.chance(0.4):
                    self.add(z + 0.5, traffic_sign, x + side * 0.4, z + 0.5)

    def people(self) -> None:
        c = self.c
        for _ in c.count(1, 2 + 12 * self.busy):
            side, z = c.pick(SIDES), 4.0 + 46 * c.uniform(0, 1) ** 1.4
            x = side * c.uniform(self.verge[side] + 0.3, self.walk[side] - 0.3)
            for i in range(c.pick((1, 1, 1, 2, 3))):
                if self.free(x + 0.65 * i, z, 0.25, 0.3):
                    self.add(z, person, x + 0.65 * i, z)
        if self.crossing < FAR and c.chance(0.5):
            for _ in range(c.pick((1, 2, 4))):
                x, z = c.uniform(-self.kerb[-1], self.kerb[1]), self.crossing - c.uniform(0.8, 3)
                if self.free(x, z, 0.3, 0.3):
                    self.add(z, *c.pick(((person, x, z), (person, x, z), (cycle, x, z, BICYCLE, True))))


# --- shading ------------------------------------------------------------------------------------------------------------


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


class Pixels:
    """Every pixel of a painted canvas: its face, where on it, and its colour so far. Arrays are (H, W)."""

    def __init__(self, c: Canvas):
        self.c, table = c, np.array(c.faces, np.float32)
        self.table = dict(zip(FIELDS, np.ascontiguousarray(table.T), strict=True))
        self.colours, self.seconds = np.ascontiguousarray(table[:, 4:7]), np.ascontiguousarray(table[:, 7:10])
        self.offset = (c.rng.random(2) * 256).tolist()
        self.ids, veils = np.array(c.ids, np.intp), np.asarray(c.veils)
        height, width = self.ids.shape
        self.rx = ((np.arange(width, dtype=np.float32) + 0.5 - c.centre) / c.focal)[None]  # the rays, at z = 1
        self.ry = ((np.arange(height, dtype=np.float32) + 0.5 - c.horizon) / c.focal)[:, None]
        self.labels = self.table["label"].astype(np.uint8)[np.where(veils > 0, veils, self.ids)]
        self.see_through(veils)
        self.z, self.u, self.v = self.surface(self.rx, self.ry, self.ids)
        self.ground = (self.of("b") > 0.99) & (self.ids > 0)
        self.glow, self.pattern = self.of("glow"), self.of("pattern")
        grain = self.of("grain")
        rough = self.texture(self.u * grain, self.v * grain) * 0.6 + self.texture(self.u * 0.7, self.v * 0.7) * 0.4
        self.colour = self.colours.take(self.ids, axis=0)
        self.colour *= (1 + self.of("rough") * rough / (1 + self.z * 0.02))[..., None]

    def of(self, field: str) -> np.ndarray:
        return self.table[field].take(self.ids)

    def surface(self, rx: np.ndarray, ry: np.ndarray, face: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Depth z and surface coordinates in metres: u along the face, v up it (on the ground: ahead)."""
        a, b, c, d = (self.table[name].take(face) for name in "abcd")
        slope = a * rx + b * ry + c
        z = np.clip(d / np.where(np.abs(slope) < 1e-6, 1e-6, slope), NEAR, 1000)
        flat = np.abs(b)
        return z, z * (rx * (c + flat) - a), flat * z + (1 - flat) * (self.c.eye - ry * z)

    def texture(self, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        row = (v + self.offset[0]).astype(np.int32) & 255
        return noise_tile().take((row << 8) | ((u + self.offset[1]).astype(np.int32) & 255))

    def select(self, where: np.ndarray) -> tuple[np.ndarray, ...]:
        """Rows, columns, faces and the faces' four parameters of the pixels that are meant."""
        y, x = np.nonzero(where)
        face = self.ids[y, x]
        return y, x, face, *(self.table[name].take(face) for name in ("p0", "p1", "p2", "p3"))

    def see_through(self, veils: np.ndarray) -> None:
        """Bars, leaves and spokes cover a part of their face; the label is theirs on all of it."""
        y, x = np.nonzero(veils)
        face = veils[y, x]
        pattern, p0, p1, p2, p3 = (self.table[name].take(face) for name in ("pattern", "p0", "p1", "p2", "p3"))
        _, u, v = self.surface(self.rx[0, x], self.ry[y, 0], face)
        one, two, three = np.maximum(p0, 0.01), np.maximum(p1, 0.01), np.maximum(p2, 0.01)
        bars = (np.mod(u / one, 1) < p2) | (np.abs(v / two - 0.5) > 0.42)
        leaves = self.texture(u * 14, v * 14) > -0.35
        radius = np.hypot(u - p0, v - p1) / three
        spokes = (radius > p3) | (radius < 0.15) | (self.texture(u * 60, v * 60) > 0.9)
        solid = np.select([pattern == BARS, pattern == LEAVES], [bars, leaves], spokes)
        self.ids[y[solid], x[solid]] = face[solid]

    def facades(self) -> None:
        """Rows of windows with frames; at night some are lit."""
        y, x, face, bay, storey, wide, high = self.select(self.pattern == FACADE)
        column, row = self.u[y, x] / bay, self.v[y, x] / storey
        across, up = np.abs(np.mod(column, 1) - 0.5) - wide / 2, np.abs(np.mod(row, 1) - 0.52) - high / 2
        dice = self.texture(np.floor(column) * 37 + face * 11, np.floor(row) * 91 + face * 5)  # one throw a window
        pane, frame = (across < 0) & (up < 0), (across < 0.05) & (up < 0.05)
        lit = pane & (dice > 0.3) & self.c.night
        house = self.colour[y, x] * np.where(frame, 1.18, 1.0)[:, None]
        glass = self.seconds[face] * (1 + 0.3 * dice)[:, None]
        self.colour[y, x] = np.where(lit[:, None], np.float32(LAMP), np.where(pane[:, None], glass, house))
        self.glow[y, x] = np.where(lit, 0.35 + 0.12 * dice, self.glow[y, x])

    def blocks(self) -> None:
        """Stones and slabs with joints, each a little different."""
        y, x, face, long, high, joint, _ = self.select((self.pattern == BLOCKS) & (self.z < 40))
        row = self.v[y, x] / high
        column = self.u[y, x] / long + 0.5 * np.mod(np.floor(row), 2)
        tint = 1 + 0.05 * self.texture(np.floor(column) * 37, np.floor(row) * 91)
        gap = ((np.mod(row, 1) < joint * 2) | (np.mod(column, 1) < joint))[:, None]
        self.colour[y, x] = np.where(gap, self.seconds[face], self.colour[y, x] * tint[:, None])

    def snow(self, amount: float) -> None:
        """White on the ground except where wheels go, on what faces up, and in the trees."""
        tracks = np.where(self.labels == ROAD, np.abs(np.sin(self.u * 1.7)) * 1.1 - 0.8, 0.3)
        lying = tracks + 0.28 * self.texture(self.u * 2.5, self.v * 1.2) + 0.5
        cover = np.where(self.ground, lying, self.of("b") ** 2 * 1.3)
        leaves = 0.35 + 0.3 * self.texture(self.u * 5, self.v * 5)
        cover = np.where((self.labels == VEGETATION) & ~self.ground, leaves, cover)
        cover = (np.clip(cover, 0, 1) * amount * (self.ids > 0))[..., None]
        self.colour += (np.float32([0.93, 0.95, 0.98]) - self.colour) * cover

    def light(self) -> np.ndarray:
        """(H, W, 3): sky and sun, less the shadows on the ground; at night street lamps and headlights."""
        c, w = self.c, self.c.weather
        shadow = np.asarray(c.shadows.filter(ImageFilter.GaussianBlur(c.size[0] / 400)), np.float32) * self.ground
        sun = self.of("sun") * (1 - np.clip(shadow / 140, 0, 1))
        sky = self.of("open") * (1 - 0.65 * np.clip((shadow - 140) / 115, 0, 1))
        sky *= np.where(self.ground, 1, 0.8 + 0.2 * np.clip(self.v / 0.8, 0, 1))  # little of it low down on things
        light = sky[..., None] * w.ambient + sun[..., None] * w.sunlight
        if c.night:
            x, y, z = self.rx * self.z, self.ry * self.z, self.z
            beam = np.exp(-((z / 22) ** 1.5) - (x / (1.5 + 0.32 * z)) ** 2) * np.clip(0.9 + y * 0.5, 0.05, 1)
            lamps = np.zeros_like(z)
            for lx, ly, lz in sorted(c.lamps, key=lambda lamp: lamp[2])[:8]:
                lamps += 1 / (1 + ((x - lx) ** 2 + (y - ly) ** 2 * 0.5 + (z - lz) ** 2) / 16)
            light += (beam * 1.1)[..., None] * np.float32([1, 0.97, 0.9]) + (lamps * 0.55)[..., None] * np.float32(LAMP)
        return light

    def sky(self) -> None:
        """A gradient, and clouds on a plane above."""
        w, (y, x) = self.c.weather, np.nonzero(self.ids == 0)
        up, across = -self.ry[y, 0], self.rx[0, x]
        steep = np.clip(up / 0.45, 0, 1)[:, None] ** 0.7
        far = 1 / (np.maximum(0, up) + 0.06)
        billows = self.texture(across * far * 22, far * 22) * 0.5 + self.texture(across * far * 60, far * 60) * 0.25
        cloud = (np.clip(billows + w.clouds * 1.6 - 0.8, 0, 1) * 0.85)[:, None]
        tops = w.air * np.float32(0.96 if w.clouds < 0.8 else 0.85)
        self.colour[y, x] = (w.zenith * steep + w.air * (1 - steep)) * (1 - cloud) + tops * cloud

    def wet(self, amount: float) -> None:
        """Mirror in the wet ground what stands on it: column by column, about the foot of what is above."""
        height = len(self.ids)
        rows = np.arange(height)[:, None]
        foot = np.maximum.accumulate(np.where(self.ground, 0, rows), axis=0)
        mirrored = np.take_along_axis(self.colour, np.clip(2 * foot - rows, 0, height - 1)[..., None], axis=0)
        blurred = as_image(mirrored).filter(ImageFilter.BoxBlur((1, 7)))
        share = np.clip(0.42 + 0.25 * self.texture(self.u * 1.3, self.v * 0.5), 0, 0.85) * amount * self.ground
        self.colour *= ((1 - 0.3 * amount * self.ground) * (1 - share))[..., None]
        self.colour += np.asarray(blurred, np.float32) / 255 * share[..., None]

    def halos(self, emitted: np.ndarray) -> None:
        width, height = self.c.size
        small = as_image(emitted + self.colour * 0.03).reduce(4)
        for radius, strength in ((width / 200, 1.0), (width / 50, 1.2)):
            halo = small.filter(ImageFilter.GaussianBlur(radius)).resize((width, height))
            self.colour += np.asarray(halo, np.float32) * np.float32(strength / 255)


def as_image(colour: np.ndarray) -> Image.Image:
    return Image.fromarray((np.clip(colour, 0, 1) * 255).astype(np.uint8))


def shade(c: Canvas) -> tuple[np.ndarray, np.ndarray]:
    """(H, W, 3) float32 colours and (H, W) uint8 train ids of a painted canvas."""
    p, w = Pixels(c), c.weather
    p.facades()
    p.blocks()
    if w.snow:
        p.snow(w.snow)
    emitted = p.colour * p.glow[..., None]
    p.colour *= p.light()
    p.colour += emitted
    p.sky()
    veil = 1 - np.exp(-w.fog * np.minimum(p.z, 260))
    p.colour += (w.air - p.colour) * veil[..., None]
    if w.wet:
        p.wet(w.wet)
    if w.wet or c.night:
        p.halos(emitted)
    if w.name in ("rain", "snow"):
        p.colour += falling(c)
    if c.chance(0.6):
        bonnet(c, p.colour, p.labels)
    return p.colour, p.labels


def falling(c: Canvas) -> np.ndarray:
    """Rain streaks or snow flakes before the lens, (H, W, 1)."""
    width, layer, slant = c.size[0] / 512, Image.new("L", c.size), c.uniform(-0.15, 0.15)
    draw, rain = ImageDraw.Draw(layer), c.weather.name == "rain"
    for x, y, close in (c.rng.random((260 if rain else 360, 3)) * (*c.size, 1)).tolist():
        if rain:
            long = (6 + 30 * close**2) * width
            draw.line((x, y, x + slant * long, y + long), fill=int(15 + 35 * close), width=max(1, round(width)))
        else:
            r = (0.5 + 2.2 * close**3) * width
            draw.ellipse((x - r, y - r, x + r, y + r), fill=int(65 + 65 * close))
    return np.asarray(layer.filter(ImageFilter.GaussianBlur(width * 0.7)), np.float32)[..., None] / 255


def bonnet(c: Canvas, colour: np.ndarray, labels: np.ndarray) -> None:
    """The own car's, which counts for nothing."""
    width, height = c.size
    across = np.linspace(-1, 1, width, dtype=np.float32)
    top = height * (c.uniform(0.9, 0.98) - c.uniform(0.02, 0.06) * (1 - across**2))
    hidden = np.arange(height)[:, None] > top
    shine = 0.6 + 0.5 * np.abs(across - c.uniform(-0.5, 0.5))
    metal = np.float32(c.shade(PAINTS)) * c.weather.ambient * shine[:, None]
    np.copyto(colour, metal[None], where=hidden[..., None])
    labels[hidden] = IGNORE


def draw_scene(
    rng: np.random.Generator, height: int, width: int, weather: str = "clear"
) -> tuple[np.ndarray, np.ndarray]:
    """One scene: image uint8 (height, width, 3) RGB and labels uint8 (height, width), train ids, 255 ignored.

    A function of the state of `rng` and of the other arguments alone. `weather` is one of `WEATHERS`.
    """
    c = Canvas(rng, 2 * height, 2 * width, weather)
    Street(c).paint()
    colour, labels = shade(c)
    image = np.asarray(as_image(colour * np.float32(c.uniform(0.9, 1.12))).reduce(2), np.float32)
    image = image + rng.standard_normal((height, width, 1), np.float32) * c.uniform(1.5, 4.5)
    return np.clip(image, 0, 255).astype(np.uint8), np.ascontiguousarray(labels[::2, ::2])


# --- files --------------------------------------------------------------------------------------------------------------


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


@dataclass(frozen=True)
class Scene:
    """One image to draw, and where its two files go."""

    image: Path
    label: Path
    weather: str
    key: tuple[int, ...]


def scenes(options: Options) -> list[Scene]:
    kind = "labelIds" if options.label_ids else "labelTrainIds"
    found = []
    for split, count in (("train", options.train), ("val", options.val)):
        for weather in CONDITIONS if options.dataset == "ACDC" else ("clear",):
            for i in range(count):
                if options.dataset == "ACDC":
                    drive = f"GOPR{i // 100 + (1 if split == 'train' else 501):04}"
                    stem = f"{weather}/{split}/{drive}/{drive}_frame_{41 + i % 100 * 10:06}"
                    image, label = f"rgb_anon/{stem}_rgb_anon.png", f"gt/{stem}_gt_{kind}.png"
                else:
                    city = CITIES[split][i % len(CITIES[split])]
                    stem = f"{split}/{city}/{city}_{i:06}_000019"
                    image, label = f"leftImg8bit/{stem}_leftImg8bit.png", f"gtFine/{stem}_gtFine_{kind}.png"
                key = (options.seed, ("train", "val").index(split), WEATHERS.index(weather), i)
                found.append(Scene(options.output / image, options.output / label, weather, key))
    return found


def draw_files(scene: Scene, height: int, width: int, label_ids: bool) -> None:
    image, labels = draw_scene(np.random.default_rng(scene.key), height, width, scene.weather)
    if label_ids:
        from datasets.classes import CITYSCAPES

        table = np.zeros(256, np.uint8)
        table[: CITYSCAPES.num_classes] = CITYSCAPES.label_ids[: CITYSCAPES.num_classes]
        labels = table[labels]
    for path, pixels in ((scene.label, labels), (scene.image, image)):
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
    todo = [scene for scene in wanted if not (scene.image.exists() and scene.label.exists())]
    draw = partial(draw_files, height=height, width=width, label_ids=label_ids)
    start = time.perf_counter()

    def follow(done: Iterable[None]) -> None:
        for i, _ in enumerate(done, 1):
            if progress and (i % 10 == 0 or i == len(todo)):
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
