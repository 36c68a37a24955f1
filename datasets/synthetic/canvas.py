"""Painting polygons that a camera sees: which face covers each pixel, and where shadows lie."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from datasets.synthetic.dice import Dice
from datasets.synthetic.palette import BLACK, SKY, VEGETATION, Colour, rgb
from datasets.synthetic.weather import SKIES

NEAR, FAR = 0.7, 130.0  # metres
LEFT, RIGHT = SIDES = (-1, 1)
CAST, CONTACT = 140, 255  # how dark the sun's shadows are, and those under and close around things

Point = tuple[
    float, float, float
]  # x to the right of the road's middle, y up from the ground, z ahead; metres
Flat = tuple[float, float]
Outline = list[Flat]

# Patterns, and what their four parameters are; from BARS on, what is behind shows through.
PLAIN = 0
FACADE = 1  # width of a bay, height of a storey, the shares of both that are glass
BLOCKS = 2  # length and height of a block, share of the joints
BARS = 3  # distance between bars, height of the whole, share of the bars
LEAVES = 4
SPOKES = 5  # centre of the wheel (u, v), radius, share of it inside the tyre


class Face(NamedTuple):
    """A painted polygon: its plane in camera coordinates, and what its pixels are made of."""

    normal: Point  # of length 1, away from the camera
    distance: float  # from the camera to the plane
    sun: float  # how much of its light arrives
    open: float  # how much of the sky's light arrives
    colour: Colour
    label: int
    pattern: int = PLAIN
    params: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)  # of the pattern
    second: Colour = BLACK  # of panes and joints
    rough: float = 0.06  # strength of the texture
    grain: float = 12.0  # fineness of the texture
    glow: float = 0.0  # light of its own


EMPTY = Face((0, 0, 1), 1000, 0, 0, (0, 0, 0), SKY)


def plane(a: Point, b: Point, c: Point) -> tuple[Point, float]:
    """The plane through three points in camera coordinates: normal and distance, as in `Face`."""
    (x0, y0, z0), (x1, y1, z1), (x2, y2, z2) = a, b, c
    ax, ay, az, bx, by, bz = x1 - x0, y1 - y0, z1 - z0, x2 - x0, y2 - y0, z2 - z0
    nx, ny, nz = ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx
    length = math.copysign(
        math.sqrt(nx * nx + ny * ny + nz * nz) or 1.0, nx * x0 + ny * y0 + nz * z0
    )
    nx, ny, nz = nx / length, ny / length, nz / length
    return (nx, ny, nz), nx * x0 + ny * y0 + nz * z0


def clipped(points: Sequence[Point]) -> Sequence[Point]:
    """The part of a polygon in camera coordinates that lies beyond the near plane."""
    if all(z >= NEAR for _, _, z in points):
        return points
    kept: list[Point] = []
    for p, q in itertools.pairwise((*points, *points[:1])):
        (px, py, pz), (qx, qy, qz) = p, q
        if pz >= NEAR:
            kept.append(p)
        if (pz >= NEAR) != (qz >= NEAR):
            t = (NEAR - pz) / (qz - pz)
            kept.append((px + t * (qx - px), py + t * (qy - py), NEAR))
    return kept


class Canvas(Dice):
    """A camera in some weather, and what was painted so far.

    `ids` says for each pixel which of `faces` covers it, `veils` which of those that one sees through lies
    before it (0: none), `shadows` how dark the ground is, if it is ground.
    """

    def __init__(self, rng: np.random.Generator, height: int, width: int, weather: str):
        super().__init__(rng)
        self.height, self.width, self.size = height, width, (width, height)
        self.focal, self.centre = width * self.uniform(0.68, 0.95), width * self.uniform(0.42, 0.58)
        self.horizon = height / 2 - width * self.uniform(0.0, 0.05)
        self.eye, self.at = (
            self.uniform(1.25, 1.7),
            0.0,
        )  # the camera's height, and its place across the road
        self.bend = self.chance(0.5) * rng.normal(0, 0.0009)  # of the road: x shifts by bend * z²
        self.set_weather(weather)
        self.ids, self.veils, self.shadows = (Image.new(mode, self.size) for mode in "IIL")
        self.draw_ids, self.draw_veils, self.draw_shadows = map(
            ImageDraw.Draw, (self.ids, self.veils, self.shadows)
        )
        self.faces = [EMPTY]
        self.lamps: list[Point] = []  # in camera coordinates
        self.sunny = 1.0  # how much of the sun reaches what is painted next

    def set_weather(self, weather: str) -> None:
        self.weather, self.night = weather, weather == "night"
        fine = self.pick(("sunny", "sunny", "overcast"))
        name = fine if weather == "clear" else weather
        sky = SKIES[name]
        bright, azimuth, high = (
            self.uniform(0.85, 1.15),
            self.uniform(0, 2 * math.pi),
            self.uniform(0.3, 1.1),
        )
        self.air, self.zenith, self.ambient = np.array(rgb(sky.colours), np.float32) * np.float32(
            bright
        )
        warm = self.uniform(-0.08, 0.12) + 0.14 * (high < 0.5)
        self.sunlight = np.array((1 + warm, 1, 1 - warm), np.float32) * np.float32(sky.sun * bright)
        self.sun_casts_shadows = name == "sunny"
        # Towards the sun, in camera coordinates: x right, y down, z ahead.
        self.sun = (
            math.cos(high) * math.cos(azimuth),
            -math.sin(high),
            math.cos(high) * math.sin(azimuth),
        )
        self.clouds, self.fog = self.uniform(*sky.clouds), self.uniform(*sky.fog)
        damp = self.chance(0.4)
        self.wet = 0.75 if name == "rain" else 0.4 * (damp and self.night)
        self.snow = self.uniform(0.7, 1.0) * (name == "snow")

    # The camera.

    def view(self, point: Point) -> Point:
        """Street to camera coordinates: x right, y down, z ahead."""
        x, y, z = point
        return (x - self.at + self.bend * z * z, self.eye - y, z)

    def project(self, points: Sequence[Point]) -> Outline:
        """Pixels of a polygon in camera coordinates, cut off at the near plane; empty if out of sight."""
        points = clipped(points)
        across = [self.centre + self.focal * x / z for x, _, z in points]
        down = [self.horizon + self.focal * y / z for _, y, z in points]
        seen = len(points) > 2 and min(across) < self.width and max(across) > 0
        return list(zip(across, down, strict=True)) if seen else []

    def pixels_tall(self, metres: float, z: float) -> float:
        """How many pixels something of that height takes at that depth."""
        return self.focal * metres / max(z, 1)

    # Painting.

    def face(
        self,
        points: Sequence[Point],
        colour: Colour,
        label: int,
        *,
        inside: Point | None = None,
        **kind: Any,
    ) -> bool:
        """Paint a flat polygon over what is there; `kind` are fields of `Face`.

        `inside` is a point behind the surface: where the camera is on that side too, nothing is painted
        and the answer is False.
        """
        seen, n = [self.view(point) for point in points], len(points)
        normal, distance = plane(seen[0], seen[n // 3], seen[2 * n // 3])
        nx, ny, nz = normal
        if inside is not None:
            x, y, z = self.view(inside)
            if nx * x + ny * y + nz * z <= distance:
                return False
        if flat := self.project(seen):
            sun_x, sun_y, sun_z = self.sun
            sun = self.sunny * max(0.0, -nx * sun_x - ny * sun_y - nz * sun_z)
            sky = 0.78 + 0.22 * max(0.0, ny)
            number, face = len(self.faces), Face(normal, distance, sun, sky, colour, label, **kind)
            self.faces.append(face)
            if face.pattern >= BARS:
                self.draw_veils.polygon(flat, fill=number)
            else:
                self.draw_ids.polygon(flat, fill=number)
                self.draw_veils.polygon(flat, fill=0)
        return True

    def upright(
        self,
        x0: float,
        x1: float,
        y0: float,
        y1: float,
        z: float,
        colour: Colour,
        label: int,
        **kind: Any,
    ) -> None:
        """A rectangle that faces the camera."""
        self.face([(x0, y0, z), (x1, y0, z), (x1, y1, z), (x0, y1, z)], colour, label, **kind)

    def along(
        self,
        x: float,
        z0: float,
        z1: float,
        y0: float,
        y1: float,
        colour: Colour,
        label: int,
        **kind: Any,
    ) -> None:
        """An upright rectangle along the road."""
        self.face([(x, y0, z0), (x, y0, z1), (x, y1, z1), (x, y1, z0)], colour, label, **kind)

    def rod(
        self,
        start: Flat,
        end: Flat,
        z: float,
        thick: float,
        colour: Colour,
        label: int,
        **kind: Any,
    ) -> None:
        """A straight rod, as a rectangle that faces the camera."""
        (x0, y0), (x1, y1) = start, end
        k = thick / 2 / (math.hypot(x1 - x0, y1 - y0) or 1.0)
        dx, dy = (y0 - y1) * k, (x1 - x0) * k
        corners = [
            (x0 + dx, y0 + dy, z),
            (x1 + dx, y1 + dy, z),
            (x1 - dx, y1 - dy, z),
            (x0 - dx, y0 - dy, z),
        ]
        self.face(corners, colour, label, **kind)

    def disc(
        self,
        middle: Point,
        radii: Flat,
        corners: int,
        colour: Colour,
        label: int,
        turn: float = 0.0,
        **kind: Any,
    ) -> None:
        """A polygon with its corners on an ellipse, those of plants about it, that faces the camera."""
        (x, y, z), (rx, ry) = middle, radii
        ragged = label == VEGETATION
        factors = (
            (1 + 0.36 * (self.rng.random(corners) - 0.6)).tolist() if ragged else [1.0] * corners
        )
        angles = [turn + 2 * math.pi * i / corners for i in range(corners)]
        ring = [
            (x + rx * r * math.cos(t), y + ry * r * math.sin(t), z)
            for r, t in zip(factors, angles, strict=True)
        ]
        self.face(ring, colour, label, **kind)

    def strip(
        self, x0: float, x1: float, z0: float, z1: float, colour: Colour, label: int, **kind: Any
    ) -> None:
        """A piece of ground along the road, following its bend."""
        z0 = max(z0, NEAR)
        if z1 > z0:
            zs = np.geomspace(z0, z1, 12 if self.bend and z1 - z0 > 5 else 2).tolist()
            self.face(
                [(x0, 0, z) for z in zs] + [(x1, 0, z) for z in reversed(zs)], colour, label, **kind
            )

    # Shadows.

    def darken(self, points: Sequence[Point], dark: int) -> None:
        if flat := self.project([self.view(point) for point in points]):
            self.draw_shadows.polygon(flat, fill=dark)

    def shadow(self, foot: Sequence[Point], tall: float, contact: float = 0.0) -> None:
        """The shadow of what stands on the corners `foot`: away from the sun, and up to `contact` metres around it."""
        if self.sun_casts_shadows:
            sun_x, sun_y, sun_z = self.sun
            k = min(-tall / sun_y, 40.0)
            cast = [(x - sun_x * k, 0.0, z - sun_z * k) for x, _, z in foot]
            edges = list(zip(foot, cast, strict=True))
            for (foot0, cast0), (foot1, cast1) in itertools.pairwise((edges[-1], *edges)):
                self.darken([foot0, cast0, cast1, foot1], CAST)
            self.darken(cast, CAST)
        if contact:
            mx, mz = sum(x for x, _, _ in foot) / len(foot), sum(z for _, _, z in foot) / len(foot)
            close = [
                (x + math.copysign(contact, x - mx), 0.0, z + math.copysign(contact, z - mz))
                for x, _, z in foot
            ]
            self.darken(close, CONTACT)

    def stand(self, x: float, z: float, wide: float = 0.0, tall: float = 0.0) -> None:
        """What is painted next stands here: it gets no sun if this is in a shadow, and if `wide` it casts one."""
        px, py, pz = self.view((x, 0, max(z, 1.0)))
        u, v = int(self.centre + self.focal * px / pz), int(self.horizon + self.focal * py / pz)
        seen = 0 <= u < self.width and 0 <= v < self.height
        self.sunny = 0.15 if seen and self.shadows.getpixel((u, v)) == CAST else 1.0
        if wide:
            x0, x1, z0, z1 = x - wide, x + wide, z - 0.15, z + 0.15
            self.shadow([(x0, 0, z0), (x1, 0, z0), (x1, 0, z1), (x0, 0, z1)], tall, 0.05)
