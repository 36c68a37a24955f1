"""Upright things, painted as if cut from card: people, cycles, plants, street furniture."""

import math
from typing import Any

from datasets.synthetic.canvas import LEAVES, SIDES, SPOKES, Canvas, Flat
from datasets.synthetic.palette import (
    BARK,
    BLACK,
    BLUE,
    CLOTHES,
    GREEN,
    IGNORE,
    LAMP,
    LEAF,
    METALS,
    MOTORCYCLE,
    PAINTS,
    PERSON,
    POLE,
    RED,
    RIDER,
    SIGNALS,
    SKIN,
    STEEL,
    TRAFFIC_LIGHT,
    TRAFFIC_SIGN,
    TYRE,
    VEGETATION,
    WHITE,
    YELLOW,
    Colour,
    scaled,
)


def person(c: Canvas, x: float, z: float, label: int = PERSON, saddle: float = 0.0) -> None:
    """A walker or, on a saddle of that height, a rider."""
    tall = c.uniform(1.5, 1.9) * (0.68 if c.chance(0.1) and not saddle else 1.0)
    c.stand(x, z, 0.25, 0.8 * tall)
    shirt, trousers = c.tone(CLOTHES, odd=0.1), c.tone(CLOTHES, odd=0.1)
    step, swing, wide = c.uniform(0.02, 0.22), c.uniform(-0.07, 0.07), tall * c.uniform(0.115, 0.15)
    hips, foot = (saddle + 0.06, saddle * 0.35) if saddle else (0.48 * tall, 0.04)
    neck, hem, hand = (
        hips + 0.36 * tall,
        hips - c.uniform(-0.08, 0.12) * tall,
        hips + (0.16 * tall if saddle else 0.02),
    )
    shoulder, sleeve = neck - 0.06 * tall, c.tone([shirt])
    for side in SIDES:
        end = x + side * step
        c.rod((x + side * 0.05 * tall, hips + 0.03), (end, foot), z, 0.095 * tall, trousers, label)
        c.rod((end, foot), (end + 0.07, foot), z, 0.08, BLACK, label)
    coat = [(-0.85, hem), (0.85, hem), (1.0, shoulder), (0.5, neck), (-0.5, neck), (-1.0, shoulder)]
    c.face([(x + wide * dx, y, z) for dx, y in coat], shirt, label, rough=0.15)
    for side in SIDES:
        elbow = x + side * (wide * 1.25 + swing)
        c.rod((x + side * wide * 0.98, shoulder), (elbow, hand), z, 0.07 * tall, sleeve, label)
    if c.chance(0.35) and not saddle:  # a bag
        c.rod(
            (x + wide * c.pick(SIDES), hips),
            (x + wide * 0.6, hips + 0.28 * tall),
            z,
            0.18 * tall,
            c.paint(),
            label,
        )
    c.disc((x, neck + 0.075 * tall, z), (0.058 * tall, 0.08 * tall), 10, c.tone(SKIN), label)
    hair = c.tone(PAINTS if saddle else CLOTHES)  # or a helmet
    c.disc((x, neck + 0.11 * tall, z), (0.064 * tall, 0.055 * tall), 10, hair, label)


def cycle(c: Canvas, x: float, z: float, label: int, ridden: bool) -> None:
    """A bicycle or motorcycle, from the side or from behind."""
    paint, motor, way, sidelong = c.paint(), label == MOTORCYCLE, c.pick(SIDES), c.chance(0.45)
    half, saddle = (0.68, 0.78) if motor else (0.54, 0.92)
    c.stand(x, z, half if sidelong else 0.15, 0.7)
    if sidelong:
        cycle_from_the_side(c, x, z, label, way, half, saddle, paint)
        x -= way * 0.18
    else:
        cycle_from_behind(c, x, z, label, paint)
    if ridden:
        person(c, x, z - 0.02, RIDER, saddle)


def cycle_from_the_side(
    c: Canvas, x: float, z: float, label: int, way: int, half: float, saddle: float, paint: Colour
) -> None:
    def rod(start: Flat, end: Flat, thick: float, colour: Colour, **kind: Any) -> None:
        (dx0, y0), (dx1, y1) = start, end
        c.rod((x + way * dx0, y0), (x + way * dx1, y1), z, thick, colour, label, **kind)

    motor = label == MOTORCYCLE
    radius, rim = (0.31, 0.55) if motor else (0.34, 0.8)
    hub, fork, seat, bars, pedal = (
        (-half, radius),
        (half, radius),
        (-0.18, saddle),
        (half - 0.16, 1.02),
        (-0.05, 0.3),
    )
    for dx, y in (hub, fork):
        u, _, _ = c.view((x + way * dx, y, z))
        c.disc(
            (x + way * dx, y, z),
            (radius, radius),
            14,
            TYRE,
            label,
            pattern=SPOKES,
            params=(u, y, radius, rim),
        )
    if motor:
        tank = [(-half, 0.72), seat, (0.35, 0.9), (0.45, 0.5), pedal, (-half, 0.5)]
        c.face([(x + way * dx, y, z) for dx, y in tank], paint, label, rough=0.15)
        rod((-0.3, 0.3), (0.3, 0.36), 0.32, STEEL, rough=0.3)
        rod((-half, 0.8), (0.05, 0.82), 0.13, BLACK)
    for start, end in (
        (hub, seat),
        (seat, pedal),
        (pedal, hub),
        (pedal, bars),
        (seat, bars),
        (bars, fork),
    ):
        rod(start, end, 0.07 if motor else 0.05, paint)
    middle = x - way * 0.18
    c.rod((middle - 0.13, saddle), (middle + 0.13, saddle), z, 0.07, BLACK, label)


def cycle_from_behind(c: Canvas, x: float, z: float, label: int, paint: Colour) -> None:
    c.upright(x - 0.06, x + 0.06, 0.02, 0.7, z, TYRE, label)
    c.disc((x, 0.72, z), (0.22 if label == MOTORCYCLE else 0.06, 0.3), 8, paint, label, rough=0.15)
    c.rod((x - 0.3, 1.0), (x + 0.3, 1.0), z, 0.06, BLACK, label)
    c.disc((x, 0.66, z), (0.05, 0.05), 6, RED, label, glow=0.6)


def tree(c: Canvas, x: float, z: float) -> None:
    tall = c.uniform(4, 11)
    bare, trunk, leaf = tall * c.uniform(0.2, 0.4), 0.025 * tall + 0.06, c.tone(LEAF, 0.25)
    rx, ry, middle = (tall - bare) * c.uniform(0.32, 0.55), (tall - bare) / 2, (tall + bare) / 2
    c.stand(x, z)
    c.shadow(
        [(x - rx * 0.8, 0, z), (x, 0, z - rx * 0.5), (x + rx * 0.8, 0, z), (x, 0, z + rx * 0.5)],
        tall * 0.8,
    )
    c.rod((x, 0), (x, tall * 0.6), z, 2 * trunk, c.tone(BARK), VEGETATION, rough=0.3)
    clumps, size, corners = (7, 0.5, 15) if c.pixels_tall(tall, z) > 60 else (3, 0.65, 9)
    c.disc(
        (x, middle, z),
        (rx * 1.15, ry * 1.15),
        corners + 8,
        leaf,
        VEGETATION,
        pattern=LEAVES,
        rough=0.45,
        grain=9,
    )
    for i in range(clumps):
        angle, out = i * 2.4 + c.uniform(0, 1), c.uniform(0.25, 0.62)
        dx, dy = rx * out * math.cos(angle), ry * out * math.sin(angle)
        colour = scaled(
            leaf, 1.0 + 0.5 * dy / ry + c.uniform(-0.08, 0.08)
        )  # brighter towards the top
        c.disc(
            (x + dx, middle + dy, z),
            (rx * size, ry * size),
            corners,
            colour,
            VEGETATION,
            rough=0.5,
            grain=9,
        )


def bush(c: Canvas, x: float, z: float, wide: float = 0.0) -> None:
    leaf, wide, tall = c.tone(LEAF, 0.3), wide or c.uniform(0.6, 1.8), c.uniform(0.6, 1.6)
    c.stand(x, z)
    for _ in range(3):
        middle, y = x + c.uniform(-0.4, 0.4) * wide, tall * c.uniform(0.35, 0.5)
        c.disc(
            (middle, y, z), (wide * 0.7, tall * 0.55), 12, c.tone([leaf]), VEGETATION, rough=0.45
        )


def traffic_sign(c: Canvas, x: float, z: float) -> None:
    y, r, turn = c.uniform(2.1, 3.0), c.uniform(0.3, 0.48), c.pick(SIDES) * math.pi / 2
    c.stand(x, z, 0.05, y)
    c.rod((x, 0), (x, y + r * 0.8), z, 0.09, c.tone(METALS), POLE)
    kind: dict[str, Any] = {"label": TRAFFIC_SIGN, "glow": 0.25 if c.night else 0.06, "rough": 0.02}
    shape = c.pick(("round", "round", "triangle", "board", "back"))
    if shape == "board":
        ground, ink = c.pick(((BLUE, WHITE), (GREEN, WHITE), (WHITE, BLACK), (YELLOW, BLACK)))
        wide = r * c.uniform(0.9, 2.5)
        c.upright(x - wide, x + wide, y - r, y + r, z, ground, **kind)
        for row in (y - 0.4 * r, y + 0.3 * r):
            c.rod(
                (x - wide * 0.7, row),
                (x + wide * c.uniform(-0.1, 0.7), row),
                z,
                r * 0.28,
                ink,
                **kind,
            )
        return
    of_round = c.pick(((RED, WHITE), (BLUE, BLUE), (RED, RED), (RED, BLUE)))
    rim, middle = {"round": of_round, "triangle": (RED, WHITE), "back": (STEEL, STEEL)}[shape]
    corners = 3 if shape == "triangle" else 14
    c.disc((x, y, z), (r, r), corners, rim, turn=turn, **kind)
    c.disc((x, y, z), (r * 0.7, r * 0.7), corners, middle, turn=turn, **kind)
    if shape == "round":
        c.rod(
            (x - r * 0.4, y),
            (x + r * 0.4, y),
            z,
            r * 0.3,
            BLACK if middle == WHITE else WHITE,
            **kind,
        )


def traffic_light(c: Canvas, x: float, z: float, reach: float) -> None:
    """Signals on a post and, if `reach` is not 0, on an arm over the road."""
    grey, lit, heads = c.tone(METALS), c.pick((0, 0, 1, 2)), [(x, c.uniform(2.3, 2.9))]
    c.stand(x, z, 0.1, 5)
    c.rod((x, 0), (x, 5.6 if reach else 3.4), z, 0.16, grey, POLE)
    if reach:
        c.rod((x, 5.5), (x + reach, 5.7), z, 0.12, grey, POLE)
        heads.append((x + reach, 5.2))
    for hx, hy in heads:
        c.upright(hx - 0.24, hx + 0.24, hy - 0.6, hy + 0.6, z, c.tone([BLACK], 0.5), TRAFFIC_LIGHT)
        for i, signal in enumerate(SIGNALS):
            bulb = scaled(signal, 1.0 if i == lit else 0.22)
            c.disc(
                (hx, hy + 0.38 * (1 - i), z),
                (0.14, 0.14),
                8,
                bulb,
                TRAFFIC_LIGHT,
                glow=float(i == lit),
            )


def lamp_post(c: Canvas, x: float, z: float) -> None:
    tall, thick, steel = c.uniform(5, 8.5), c.uniform(0.12, 0.2), c.tone(METALS)
    head = x - math.copysign(c.uniform(0.4, 2.2), x)
    c.stand(x, z, 0.08, tall)
    c.rod((x, 0), (x, tall - 0.1), z, thick, steel, POLE)
    c.rod((x, tall - 0.15), (head, tall), z, thick * 0.6, steel, POLE)
    c.rod(
        (head - 0.3, tall),
        (head + 0.3, tall),
        z,
        0.16,
        LAMP if c.night else steel,
        POLE,
        glow=float(c.night),
    )
    c.lamps.append(c.view((head, tall, z)))


def clutter(c: Canvas, x: float, z: float) -> None:
    """Bins, cabinets and the like, which are none of the 19 classes."""
    wide, tall, colour = c.uniform(0.2, 0.6), c.uniform(0.5, 1.3), c.paint()
    c.stand(x, z, wide, tall)
    c.upright(x - wide, x + wide, 0, tall, z, colour, IGNORE)
    c.upright(x - wide, x + wide, tall * 0.85, tall, z, c.tone([colour], 0.5), IGNORE)
