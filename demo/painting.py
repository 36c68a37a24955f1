"""A picture of a street: polygons as a camera sees them, then light and weather on every pixel.

Points are (x, y, z) in metres: x to the right of the road's middle, y up from the ground, z ahead.
Polygons are painted from the far ones to the near. Each leaves its number on the pixels that it
covers, from which `shade` finds what they show, and its shadow on the ground.
"""

import math
from collections.abc import Sequence
from random import Random
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from datasets.classes import CITYSCAPES

Pair = tuple[float, float]  # from and to; or x and y
Triple = tuple[float, float, float]  # a point; or red, green and blue in 0..1

NEAR = 0.7  # metres; what is nearer to the camera is drawn as if it were here
# Colours of the horizon, of the zenith and of their light; the sun; fog per metre from, to.
SKIES = {
    "clear": ("d6dfe8", "4f82d1", "a6acb8", 0.8, 0.001, 0.004),
    "fog": ("c7cdd3", "aab0b5", "b6bbc1", 0.06, 0.02, 0.055),
    "night": ("14161e", "08090c", "1f212d", 0.0, 0.002, 0.004),
    "rain": ("9da2a7", "82868a", "8a8e92", 0.04, 0.006, 0.012),
    "snow": ("d0d7dd", "b0b5ba", "c2c8cd", 0.1, 0.004, 0.014),
}
# (256, 256) noise of deviation 1 or so, coarse and fine.
_rng = np.random.default_rng(0)
_coarse = Image.fromarray(_rng.standard_normal((64, 64), np.float32)).resize((256, 256))
NOISE = np.asarray(_coarse) + 0.6 * _rng.standard_normal((256, 256), np.float32)


class Paint(NamedTuple):
    """What a surface is made of."""

    label: int  # train id, 255 for what is none of the classes
    colour: Triple
    rough: float = 0.08  # strength of the texture
    glow: float = 0.0  # light of its own
    panes: Triple = (0, 0, 0)  # colour of windows or slabs in a grid on the surface
    grid: Triple = (1, 1, 0)  # width and height of a cell in metres, share of the pane in it


class Canvas:
    """A pinhole camera, the sun, and the polygons that were painted so far."""

    def __init__(self, random: Random, height: int, width: int):
        self.random = random
        self.focal = width * random.uniform(0.65, 1.0)  # pixels
        self.centre = (width * random.uniform(0.4, 0.6), height * random.uniform(0.38, 0.5))
        self.eye = (0.0, random.uniform(1.25, 1.8))  # x and y
        self.sun = (random.gauss(0, 1.2), 1.0, random.gauss(0, 1.2))  # direction towards it
        # Of each polygon three corners in camera coordinates, and its paint; the sky comes first.
        self.corners: list[Sequence[Triple]] = [((0, 0, 999), (1, 0, 999), (0, 1, 999))]
        self.paints = [self.paint("sky", "000000")]
        self.numbers = Image.new("I", (width, height))  # which polygon is seen
        self.shadows = Image.new("L", (width, height))  # 1: the sun is hidden, 2: most of the sky
        self.draw_numbers = ImageDraw.Draw(self.numbers)
        self.draw_shadows = ImageDraw.Draw(self.shadows)

    def tint(self, palette: str) -> Triple:
        """One of the palette's hexadecimal colours, up to a quarter brighter or darker."""
        red, green, blue = bytes.fromhex(self.random.choice(palette.split()))
        factor = self.random.uniform(0.75, 1.25) / 255
        return (red * factor, green * factor, blue * factor)

    def paint(self, label: str, palette: str, **surface: Any) -> Paint:
        number = CITYSCAPES.names.index(label) if label in CITYSCAPES.names else 255
        return Paint(number, self.tint(palette), **surface)

    def fill(self, draw: ImageDraw.ImageDraw, points: Sequence[Triple], value: int) -> Any:
        """Fill a polygon with a value, and return its corners in camera coordinates."""
        seen = [(x - self.eye[0], y - self.eye[1], max(z, NEAR)) for x, y, z in points]
        column, row = self.centre
        pixels = [(column + self.focal * x / z, row - self.focal * y / z) for x, y, z in seen]
        draw.polygon(pixels, fill=value)
        return seen

    def face(self, points: Sequence[Triple], paint: Paint) -> None:
        """Paint a flat polygon over what is there."""
        seen = self.fill(self.draw_numbers, points, len(self.paints))
        self.corners.append(seen[:: len(seen) // 3][:3])
        self.paints.append(paint)
        if points[0][2] < 50 and any(y > 0 for _, y, _ in points):  # a shadow on the ground
            cast = [(x - y * self.sun[0], 0.0, z - y * self.sun[2]) for x, y, z in points]
            self.fill(self.draw_shadows, cast, 1)

    def box(self, x: Pair, y: Pair, z: Pair, paint: Paint, taper: Pair = (0, 0)) -> None:
        """Paint a box, whose top begins farther in by `taper`; a flat one lies on the ground."""
        inset, slope = taper
        ways = ((0, 0), (1, 0), (1, 1), (0, 1))  # left near, right near, right far, left far
        low = [(x[i], y[0], z[j]) for i, j in ways]
        top = [(x[i] + inset * (1 - 2 * i), y[1], z[j] + slope * (1 - 2 * j)) for i, j in ways]
        if y[1] < self.eye[1]:
            self.face(top, paint)
        if y[1] > y[0]:
            if not x[0] < self.eye[0] < x[1]:
                a, b = (0, 3) if self.eye[0] < x[0] else (1, 2)
                self.face([low[a], low[b], top[b], top[a]], paint)
            self.face([low[0], low[1], top[1], top[0]], paint)
            self.fill(self.draw_shadows, [(px, 0, pz) for px, _, pz in low], 2)

    def rod(self, a: Pair, b: Pair, z: float, thick: float, paint: Paint) -> None:
        """Paint a straight rod between two points, (x, y) at the depth z."""
        scale = thick / 2 / (math.dist(a, b) or 1)
        dx = (a[1] - b[1]) * scale
        dy = (b[0] - a[0]) * scale
        ends = ((a, 1), (b, 1), (b, -1), (a, -1))
        self.face([(x + k * dx, y + k * dy, z) for (x, y), k in ends], paint)

    def disc(self, middle: Triple, radii: Pair, paint: Paint, corners: int = 12) -> None:
        """Paint an ellipse of two radii, or a polygon with its corners there."""
        x, y, z = middle
        turns = [2 * math.pi * (i / corners + 0.25) for i in range(corners)]
        ring = [(x + radii[0] * math.cos(t), y + radii[1] * math.sin(t), z) for t in turns]
        self.face(ring, paint)


def noise(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return NOISE.take((v.astype(np.int32) & 255) << 8 | (u.astype(np.int32) & 255))


def blur(image: np.ndarray, radius: float | Pair) -> np.ndarray:
    """Blur a picture with values in 0..1; a pair of radii is across and down."""
    picture = Image.fromarray((np.clip(image, 0, 1) * 255).astype(np.uint8))
    return np.asarray(picture.filter(ImageFilter.BoxBlur(radius)), np.float32) / 255


def shade(canvas: Canvas, weather: str) -> np.ndarray:
    """The picture of a painted canvas: (height, width, 3) float32, RGB in 0..1."""
    random = canvas.random
    night = weather == "night"
    *colours, sun, thin, thick = SKIES[weather]
    air, zenith, ambient = (np.array(canvas.tint(colour), np.float32) for colour in colours)

    # The plane of a pixel's polygon gives its depth z, its height over the ground, and its place on
    # the surface, in metres: u along it, v up (on the ground: ahead).
    ids = np.asarray(canvas.numbers, np.intp)
    columns = [np.array(column, np.float32) for column in zip(*canvas.paints, strict=True)]
    _, flat, rough, glow, panes, grid = (column.take(ids, axis=0) for column in columns)
    a, b, c = np.array(canvas.corners, np.float32).transpose(1, 0, 2)
    normal = np.cross(b - a, c - a)
    normal /= np.linalg.norm(normal, axis=1, keepdims=True) + 1e-9
    normal *= np.sign((normal * a).sum(1, keepdims=True))  # away from the camera
    distance = (normal * a).sum(1).take(ids)
    row, column = np.indices(ids.shape, np.float32)
    rx = (column - canvas.centre[0]) / canvas.focal
    ry = (canvas.centre[1] - row) / canvas.focal
    nx, ny, nz = normal.T.take(ids, axis=1)
    z = np.clip(distance / np.maximum(nx * rx + ny * ry + nz, 1e-6), NEAR, 999)
    height = ry * z + canvas.eye[1]
    level = np.abs(ny)  # 1 on the ground, 0 on walls
    u = z * (rx * (nz + level) - nx)
    v = level * z + (1 - level) * height
    ground = (level > 0.99) & (height < 0.1)

    # Texture, then windows and slabs: no two of quite the same colour, at night some windows lit.
    texture = rough * (0.6 * noise(u * 20, v * 20) + 0.4 * noise(u, v)) / (1 + z * 0.02)
    colour = flat * (1 + texture)[..., None]
    wide, tall, share = grid.transpose(2, 0, 1)
    across, i = np.modf(u / wide)
    up, j = np.modf(v / tall)
    pane = np.maximum(np.abs(np.abs(across) - 0.5), np.abs(np.abs(up) - 0.5)) < share / 2
    number = noise(i * 37 + ids * 11, j * 91)
    colour[pane] = panes[pane] * (1 + 0.12 * number[pane])[:, None]
    emitted = colour * glow[..., None]
    emitted[pane & (number > 0.3) & ~ground & night] = (0.5, 0.4, 0.25)
    if weather == "snow":  # it lies on the ground, less in the tracks of wheels, and on leaves
        cover = np.where(ground, 0.6 + 0.4 * np.sin(1.7 * u) + 0.3 * noise(2 * u, v), rough - 0.1)
        colour += (0.95 - colour) * np.clip(cover, 0, 0.95)[..., None]

    # Light of the sky and the sun, less the shadows on the ground; at night, of the headlights.
    shadow = blur(np.asarray(canvas.shadows) / 2, 1) * ground
    facing = np.maximum(-normal @ np.array(canvas.sun, np.float32), 0).take(ids)
    light = ambient * (0.75 + 0.25 * np.clip(height, level, 1) - 0.55 * shadow**2)[..., None]
    sun *= random.uniform(0.3, 1.2) / math.hypot(*canvas.sun)
    light += sun * (facing * np.maximum(1 - 2 * shadow, 0))[..., None]
    if night:
        light += 0.8 * np.exp(-((z / 22) ** 1.5) - (rx * z / (1.5 + 0.32 * z)) ** 2)[..., None]
    colour = colour * light + emitted * (1 if night else 0.4)

    # The air before everything, and the sky with its clouds.
    colour += (air - colour) * (1 - np.exp(-random.uniform(thin, thick) * z))[..., None]
    far = 30 / (np.maximum(ry, 0) + 0.06)
    clear = np.clip(2.5 * ry, 0, 1) * np.clip(0.4 * noise(rx * far, far) + random.random(), 0, 1)
    colour[ids == 0] = air + (zenith - air) * clear[ids == 0][:, None]
    if weather == "rain":  # the wet ground mirrors what stands on it
        colour += (0.9 * blur(colour, (1, ids.shape[0] / 8)) - 0.7 * colour) * ground[..., None]
    if night:  # halos
        colour += 2 * blur(blur(emitted, ids.shape[1] / 60), ids.shape[1] / 60)
    if weather in ("rain", "snow"):  # streaks or flakes before the lens
        drops = np.random.default_rng(random.getrandbits(32)).random(ids.shape) > 0.997
        colour += 2 * blur(drops, (0, 7) if weather == "rain" else 1)[..., None]
    return colour
