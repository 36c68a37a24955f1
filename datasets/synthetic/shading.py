"""From faces to colours: texture, windows, light, weather and what the lens adds, all pixels at once."""

from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from datasets.synthetic.canvas import (
    BARS,
    BLOCKS,
    CAST,
    CONTACT,
    FACADE,
    LEAVES,
    NEAR,
    Canvas,
    Face,
)
from datasets.synthetic.palette import IGNORE, LAMP, PAINTS, ROAD, VEGETATION, WHITE

FRESH_SNOW = np.array((0.93, 0.95, 0.98), np.float32)


@lru_cache
def noise_tile() -> np.ndarray:
    """(256 * 256) float32 fractal noise, flat, that repeats without a seam: mean 0, deviation 1."""
    rng, size = np.random.default_rng(2022), 256
    tile = np.zeros((size, size), np.float32)
    for octave in range(2, 9):
        coarse = Image.fromarray(
            np.tile(rng.standard_normal((2**octave, 2**octave), np.float32), (3, 3))
        )
        smooth = coarse.resize((3 * size, 3 * size), Image.Resampling.BICUBIC)
        tile += np.asarray(smooth)[size : 2 * size, size : 2 * size] * 0.75**octave
    return ((tile - tile.mean()) / tile.std()).ravel()


def as_image(colour: np.ndarray) -> Image.Image:
    return Image.fromarray((np.clip(colour, 0, 1) * 255).astype(np.uint8))


class Pixels:
    """Every pixel of a painted canvas: its face, where on it, its label, its colour so far.

    Arrays are (H, W), and (H, W, 3) for colours. `faces` has a float32 array for each field of `Face`.
    """

    def __init__(self, c: Canvas):
        self.c = c
        columns = zip(Face._fields, zip(*c.faces, strict=True), strict=True)
        self.faces = {field: np.array(column, np.float32) for field, column in columns}
        self.shift_v, self.shift_u = (c.rng.random(2) * 256).tolist()
        self.ids, veils = np.array(c.ids, np.intp), np.asarray(c.veils)
        self.rx = ((np.arange(c.width, dtype=np.float32) + 0.5 - c.centre) / c.focal)[
            None
        ]  # the rays, at z = 1
        self.ry = ((np.arange(c.height, dtype=np.float32) + 0.5 - c.horizon) / c.focal)[:, None]
        self.labels = self.faces["label"].astype(np.uint8)[np.where(veils > 0, veils, self.ids)]
        self.see_through(veils)
        self.z, self.u, self.v = self.surface(self.rx, self.ry, self.ids)
        _, upward, _ = self.faces["normal"].T
        self.upward = upward.take(self.ids)  # 1: a surface seen straight from above
        self.ground = (self.upward > 0.99) & (self.ids > 0)
        self.glow, self.pattern, grain = self.of("glow"), self.of("pattern"), self.of("grain")
        rough = (
            self.texture(self.u * grain, self.v * grain) * 0.6
            + self.texture(self.u * 0.7, self.v * 0.7) * 0.4
        )
        self.colour = self.of("colour")
        self.colour *= (1 + self.of("rough") * rough / (1 + self.z * 0.02))[..., None]

    def of(self, field: str) -> np.ndarray:
        return self.faces[field].take(self.ids, axis=0)

    def surface(
        self, rx: np.ndarray, ry: np.ndarray, face: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Depth z and surface coordinates in metres: u along the face, v up it (on the ground: ahead)."""
        nx, ny, nz = (component.take(face) for component in self.faces["normal"].T)
        slope, flat = nx * rx + ny * ry + nz, np.abs(ny)
        z = np.clip(
            self.faces["distance"].take(face) / np.where(np.abs(slope) < 1e-6, 1e-6, slope),
            NEAR,
            1000,
        )
        return z, z * (rx * (nz + flat) - nx), flat * z + (1 - flat) * (self.c.eye - ry * z)

    def texture(self, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        row = (v + self.shift_v).astype(np.int32) & 255
        column = (u + self.shift_u).astype(np.int32) & 255
        return noise_tile().take((row << 8) | column)

    # Patterns.

    def see_through(self, veils: np.ndarray) -> None:
        """Bars, leaves and spokes cover a part of their face; the label is theirs on all of it."""
        y, x = np.nonzero(veils)
        face = veils[y, x]
        p0, p1, p2, p3 = self.faces["params"].take(face, axis=0).T
        size0, size1, size2 = (
            np.maximum(p, 0.01) for p in (p0, p1, p2)
        )  # of another pattern they may be 0
        _, u, v = self.surface(self.rx[0, x], self.ry[y, 0], face)
        bars = (np.mod(u / size0, 1) < p2) | (np.abs(v / size1 - 0.5) > 0.42)
        leaves = self.texture(u * 14, v * 14) > -0.35
        radius = np.hypot(u - p0, v - p1) / size2
        spokes = (radius > p3) | (radius < 0.15) | (self.texture(u * 60, v * 60) > 0.9)
        pattern = self.faces["pattern"].take(face)
        solid = np.select([pattern == BARS, pattern == LEAVES], [bars, leaves], spokes)
        self.ids[y[solid], x[solid]] = face[solid]

    def dice(self, column: np.ndarray, row: np.ndarray, face: np.ndarray) -> np.ndarray:
        """A random number for each window or block."""
        return self.texture(np.floor(column) * 37 + face * 11, np.floor(row) * 91 + face * 5)

    def windows(self) -> None:
        """Panes in frames, no two of quite the same colour, at night some of them lit."""
        y, x = np.nonzero(self.pattern == FACADE)
        face = self.ids[y, x]
        bay, storey, wide, high = self.faces["params"].take(face, axis=0).T
        column, row = self.u[y, x] / bay, self.v[y, x] / storey
        dice = self.dice(column, row, face)
        beside, above = (
            np.abs(np.mod(column, 1) - 0.5) - wide / 2,
            np.abs(np.mod(row, 1) - 0.52) - high / 2,
        )
        pane, frame = (beside < 0) & (above < 0), (beside < 0.05) & (above < 0.05)
        lit = pane & (dice > 0.3) & self.c.night
        wall = self.colour[y, x] * np.where(frame, 1.18, 1.0)[:, None]
        glass = self.faces["second"][face] * (1 + 0.3 * dice)[:, None]
        colour = np.where(pane[:, None], glass, wall)
        self.colour[y, x] = np.where(lit[:, None], np.array(LAMP, np.float32), colour)
        self.glow[y, x] = np.where(lit, 0.35 + 0.12 * dice, self.glow[y, x])

    def blocks(self) -> None:
        """Stones and slabs, no two of quite the same colour, with joints where they are near enough to see."""
        y, x = np.nonzero(self.pattern == BLOCKS)
        face = self.ids[y, x]
        long, high, joint, _ = self.faces["params"].take(face, axis=0).T
        row = self.v[y, x] / high
        column = self.u[y, x] / long + 0.5 * np.mod(np.floor(row), 2)
        gap = ((np.mod(row, 1) < 2 * joint) | (np.mod(column, 1) < joint)) & (self.z[y, x] < 40)
        stone = self.colour[y, x] * (1 + 0.05 * self.dice(column, row, face))[:, None]
        self.colour[y, x] = np.where(gap[:, None], self.faces["second"][face], stone)

    # Light and weather.

    def snow(self) -> None:
        """White on the ground except where wheels go, on what faces up, and in the trees."""
        tracks = np.where(self.labels == ROAD, np.abs(np.sin(self.u * 1.7)) * 1.1 - 0.8, 0.3)
        lying = tracks + 0.28 * self.texture(self.u * 2.5, self.v * 1.2) + 0.5
        cover = np.where(self.ground, lying, self.upward**2 * 1.3)
        leaves = (self.labels == VEGETATION) & ~self.ground
        cover[leaves] = 0.35 + 0.3 * self.texture(self.u[leaves] * 5, self.v[leaves] * 5)
        cover = np.clip(cover, 0, 1) * self.c.snow * (self.ids > 0)
        self.colour += (FRESH_SNOW - self.colour) * cover[..., None]

    def light(self) -> np.ndarray:
        """(H, W, 3): sky and sun, less the shadows on the ground; at night street lamps and headlights."""
        c = self.c
        shadow = (
            np.asarray(c.shadows.filter(ImageFilter.GaussianBlur(c.width / 400)), np.float32)
            * self.ground
        )
        sun = self.of("sun") * (1 - np.clip(shadow / CAST, 0, 1))
        sky = self.of("open") * (1 - 0.65 * np.clip((shadow - CAST) / (CONTACT - CAST), 0, 1))
        sky *= np.where(
            self.ground, 1, 0.8 + 0.2 * np.clip(self.v / 0.8, 0, 1)
        )  # little of it low down on things
        light = sky[..., None] * c.ambient + sun[..., None] * c.sunlight
        if c.night:
            x, y, z = self.rx * self.z, self.ry * self.z, self.z
            beam = np.exp(-((z / 22) ** 1.5) - (x / (1.5 + 0.32 * z)) ** 2) * np.clip(
                0.9 + y * 0.5, 0.05, 1
            )
            lamps = np.zeros_like(z)
            for depth, right, down in sorted((lz, lx, ly) for lx, ly, lz in c.lamps)[
                :6
            ]:  # the nearest
                lamps += 1 / (
                    1 + ((x - right) ** 2 + (y - down) ** 2 * 0.5 + (z - depth) ** 2) / 16
                )
            for strength, colour in ((beam * 0.8, WHITE), (lamps * 0.45, LAMP)):
                light += strength[..., None] * np.array(colour, np.float32)
        return light

    def sky(self) -> None:
        """A gradient, and clouds on a plane above."""
        c, (y, x) = self.c, np.nonzero(self.ids == 0)
        up, across = -self.ry[y, 0], self.rx[0, x]
        steep, far = np.clip(up / 0.45, 0, 1)[:, None] ** 0.7, 1 / (np.maximum(0, up) + 0.06)
        billows = (
            self.texture(across * far * 22, far * 22) * 0.5
            + self.texture(across * far * 60, far * 60) * 0.25
        )
        cloud = (np.clip(billows + c.clouds * 1.6 - 0.8, 0, 1) * 0.85)[:, None]
        clear = c.zenith * steep + c.air * (1 - steep)
        self.colour[y, x] = (
            clear + (c.air * np.float32(0.96 if c.clouds < 0.8 else 0.85) - clear) * cloud
        )

    def fog(self) -> None:
        thick = 1 - np.exp(-self.c.fog * np.minimum(self.z, 260))
        self.colour += (self.c.air - self.colour) * thick[..., None]

    def wet(self) -> None:
        """Mirror in the wet ground what stands on it: column by column, about the foot of what is above."""
        rows = np.arange(self.c.height)[:, None]
        foot = np.maximum.accumulate(np.where(self.ground, 0, rows), axis=0)
        mirrored = np.take_along_axis(
            self.colour, np.maximum(2 * foot - rows, 0)[..., None], axis=0
        )
        blurred = (
            np.asarray(as_image(mirrored).filter(ImageFilter.BoxBlur((1, 7))), np.float32) / 255
        )
        puddles = np.clip(0.42 + 0.25 * self.texture(self.u * 1.3, self.v * 0.5), 0, 0.85)
        share = (puddles * self.c.wet * self.ground)[..., None]
        self.colour *= (1 - 0.3 * self.c.wet * self.ground[..., None]) * (1 - share)
        self.colour += blurred * share

    def halos(self, emitted: np.ndarray) -> None:
        """Around what gives light."""
        small, width = as_image(emitted + self.colour * 0.03).reduce(4), self.c.width
        for radius, strength in ((width / 200, 1.0), (width / 50, 1.2)):
            halo = small.filter(ImageFilter.GaussianBlur(radius)).resize(self.c.size)
            self.colour += np.asarray(halo, np.float32) * np.float32(strength / 255)

    def bonnet(self) -> None:
        """The own car's, which counts for nothing."""
        c = self.c
        across = np.linspace(-1, 1, c.width, dtype=np.float32)
        top = c.height * (c.uniform(0.9, 0.98) - c.uniform(0.02, 0.06) * (1 - across**2))
        hidden = np.arange(c.height)[:, None] > top
        shine = 0.6 + 0.5 * np.abs(across - c.uniform(-0.5, 0.5))
        metal = np.array(c.tone(PAINTS), np.float32) * c.ambient * shine[:, None]
        np.copyto(self.colour, metal[None], where=hidden[..., None])
        self.labels[hidden] = IGNORE

    def falling(self) -> None:
        """Rain streaks or snow flakes before the lens."""
        c, scale, layer, rain = (
            self.c,
            self.c.width / 512,
            Image.new("L", self.c.size),
            self.c.weather == "rain",
        )
        draw, slant = ImageDraw.Draw(layer), c.uniform(-0.15, 0.15)
        for x, y, close in (c.rng.random((260 if rain else 360, 3)) * (*c.size, 1)).tolist():
            if rain:
                long = (6 + 30 * close**2) * scale
                draw.line(
                    (x, y, x + slant * long, y + long), int(15 + 35 * close), max(1, round(scale))
                )
            else:
                r = (0.5 + 2.2 * close**3) * scale
                draw.ellipse((x - r, y - r, x + r, y + r), int(65 + 65 * close))
        self.colour += (
            np.asarray(layer.filter(ImageFilter.GaussianBlur(scale * 0.7)), np.float32)[..., None]
            / 255
        )

    def shade(self) -> None:
        c = self.c
        self.windows()
        self.blocks()
        if c.snow:
            self.snow()
        emitted = self.colour * self.glow[..., None]
        self.colour *= self.light()
        self.colour += emitted
        self.sky()
        self.fog()
        if c.wet:
            self.wet()
        if c.wet or c.night:
            self.halos(emitted)
        if c.chance(0.6):
            self.bonnet()
        if c.weather in ("rain", "snow"):
            self.falling()
