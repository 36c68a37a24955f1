"""A street at random: strips of ground, and rows of things, each painted at its near end (x, z)."""

from functools import partial
from typing import Any

from demo.painting import NEAR, Canvas, Pair

# Kinds of things share their colours: colour alone tells little.
PLASTER = "bfb399 99543f 9e9991 ccb880 736b66 d9d6cc 8c99a8 b8856b a86850 c9a88c 4d4747"
PAINTS = "16171e 4d4f54 8a8d91 f0efea 8c1c1c 1d3a6e 2f5d8c 1f4a33 7a6a4f b5651d c9a020 6a4a6a"
LEAVES = "42692b 58732d 325428 486440 8a702a 7c4a2a 50783a"
METALS = "6b7073 333b38 99998f 735438 d9d9d1 244733"
GLASS = "29303b 475461 66788a 21282f"
BLACK = "17181a"
# Length, width, height in metres; in shares of these the body's height, cabin and load from, to.
MODELS: dict[str, Any] = {
    "car": (4.3, 1.8, 1.5, 0.62, [(0.08, 0.8, GLASS)]),
    "truck": (8.0, 2.4, 3.3, 0.4, [(0.78, 1.0, GLASS), (0.0, 0.75, PAINTS)]),
    "bus": (12.0, 2.5, 3.0, 0.4, [(0.0, 1.0, GLASS)]),
    "train": (24.0, 2.5, 3.2, 0.4, [(0.0, 1.0, GLASS)]),
}


def person(canvas: Canvas, x: float, z: float, label: str = "person", saddle: float = 0) -> None:
    """Somebody who walks or, on a saddle of that height, rides."""
    tall = canvas.random.uniform(1.1, 1.9)
    hips = saddle or 0.48 * tall
    neck = hips + 0.36 * tall
    shirt = canvas.paint(label, PAINTS)
    trousers = canvas.paint(label, PAINTS)
    for side in (-1, 1):
        step = side * canvas.random.uniform(0.05, 0.25)
        canvas.rod((x, hips), (x + step, 0.4 * saddle), z, 0.1 * tall, trousers)
        canvas.rod((x + 0.15 * side, neck - 0.1), (x + 2 * step, hips), z, 0.07 * tall, shirt)
    canvas.rod((x, hips - 0.1), (x, neck), z, 0.24 * tall, shirt)
    skin = canvas.paint(label, "d9a88c b38061 6b4733")
    canvas.disc((x, neck + 0.07 * tall, z), (0.06 * tall, 0.08 * tall), skin)


def cycle(canvas: Canvas, x: float, z: float, label: str = "bicycle", ridden: bool = False) -> None:
    """A bicycle or motorcycle, from its side or turned away."""
    turn = canvas.random.uniform(-1, 1)
    corners = ((-0.54, 0.34), (-0.18, 0.85), (0.38, 1.0), (0.54, 0.34), (-0.05, 0.3))
    hub, seat, bars, fork, pedal = ((x + turn * along, up) for along, up in corners)
    paint = canvas.paint(label, PAINTS)
    for wheel in (hub, fork):
        canvas.disc((*wheel, z), (0.36 * abs(turn) + 0.03, 0.36), canvas.paint(label, BLACK))
        canvas.disc((*wheel, z), (0.26 * abs(turn), 0.26), canvas.paint(label, METALS))
    frame = ((hub, seat), (seat, pedal), (pedal, hub), (pedal, bars), (seat, bars), (bars, fork))
    for a, b in frame:
        canvas.rod(a, b, z, 0.05 if label == "bicycle" else 0.25, paint)
    if ridden:
        person(canvas, seat[0], z, "rider", saddle=0.85)


def vehicle(canvas: Canvas, x: float, z: float, label: str = "car", oncoming: bool = False) -> None:
    """A car, truck, bus or tram: wheels, a body, and on it a cabin of glass, perhaps a load."""
    random = canvas.random
    length, width, tall, low, parts = MODELS[label]
    tall *= random.uniform(0.9, 1.1)
    sides = (x - width / 2, x + width / 2)
    taper = (0.14, random.uniform(0.2, 0.6)) if label == "car" else (0, 0)
    body = canvas.paint(label, PAINTS, rough=0.04)
    for axle in (0.8, 0.2):
        for side in sides:
            wheel = (0.9 * side + 0.1 * x, 0.33, z + axle * length)
            canvas.disc(wheel, (0.2, 0.33), canvas.paint(label, BLACK))
    canvas.box(sides, (0.2 * tall, low * tall), (z, z + length), body)
    for start, end, palette in reversed(parts) if oncoming else parts:
        near = z + length * (1 - end if oncoming else start)
        ends = (near, near + length * (end - start))
        canvas.box(sides, (low * tall, tall), ends, body, taper)
        canvas.box(sides, (low * tall, 0.9 * tall), ends, canvas.paint(label, palette), taper)
    lamps = canvas.paint(label, "f5f2e0" if oncoming else "d01a1a", glow=0.8)
    for middle in (x - 0.38 * width, x + 0.38 * width):
        canvas.rod((middle - 0.15, 0.4 * tall), (middle + 0.15, 0.4 * tall), z, 0.15, lamps)


def plant(canvas: Canvas, x: float, z: float, trunk: float = 0) -> None:
    """A tree, or without a trunk a bush."""
    random = canvas.random
    size = random.uniform(1.5, 3) if trunk else random.uniform(0.4, 0.9)
    colour = random.choice(LEAVES.split())
    canvas.rod((x, 0), (x, trunk + size), z, 0.1 * size, canvas.paint("vegetation", METALS))
    for i in range(7 if z < 40 else 3):
        radius = 0.55 * size if i else size
        middle = (x + random.uniform(-1, 1) * (size - radius), trunk + size * (0.5 + 0.15 * i), z)
        canvas.disc(middle, (radius, radius), canvas.paint("vegetation", colour, rough=0.4), 9)


def post(canvas: Canvas, x: float, z: float) -> None:
    """A street lamp, a traffic light or a sign."""
    random = canvas.random
    kind = random.choice(("lamp", "light", "sign"))
    tall = random.uniform(5, 8) if kind == "lamp" else random.uniform(2.1, 3)
    canvas.rod((x, 0), (x, tall), z, 0.12, canvas.paint("pole", METALS))
    if kind == "lamp":
        canvas.rod((x, tall), (0.7 * x, tall), z, 0.15, canvas.paint("pole", "ffd999", glow=1))
    elif kind == "light":
        canvas.rod((x, tall), (x, tall + 1.1), z, 0.45, canvas.paint("traffic light", BLACK))
        up, colour = random.choice(((0.2, "26f273"), (0.55, "ffb31a"), (0.9, "ff1f1a")))
        canvas.disc((x, tall + up, z), (0.15, 0.15), canvas.paint("traffic light", colour, glow=1))
    else:
        corners = random.choice((3, 4, 12, 12))
        for radius, colours in ((0.42, "c21a1f 1a409e ebb81a 6b6e70"), (0.28, "eceae6 1a409e")):
            board = canvas.paint("traffic sign", colours)
            canvas.disc((x, tall, z), (radius, radius), board, corners)


def house(canvas: Canvas, x: float, z: float, urban: float) -> None:
    """A house; the less `urban` the street, the lower, and the sooner with a pitched roof."""
    random = canvas.random
    tall = (4 + 12 * urban) * random.uniform(0.7, 1.3)
    sides = (x, x + 10) if x > 0 else (x - 10, x)
    grid = (random.uniform(1.8, 3.8), random.uniform(2.8, 3.6), random.uniform(0.45, 0.75))
    walls = canvas.paint("building", PLASTER, grid=grid, panes=canvas.tint(GLASS))
    canvas.box(sides, (0, tall), (z, z + 10), walls)
    top = tall + max(0, random.uniform(0, 5) - 6 * urban)
    canvas.box(sides, (tall, top), (z, z + 10), canvas.paint("building", PLASTER), (5, 2))


def barrier(canvas: Canvas, x: float, z: float) -> None:
    """Eight metres of a wall of stones, or of a fence of bars."""
    label, *grid = canvas.random.choice((("wall", 1.5, 0.5, 0.94), ("fence", 0.3, 4.5, 0.7)))
    paint = canvas.paint(label, METALS, rough=0.15, panes=canvas.tint(PLASTER), grid=grid)
    canvas.box((x, x), (0, canvas.random.uniform(0.8, 2.2)), (z, z + 8), paint)


def paint_street(canvas: Canvas) -> None:
    """Lay out a street, then paint the ground, the houses, the edges of gardens, all the rest."""
    random = canvas.random
    urban = random.random() ** 0.7  # from a suburb (0) to a city (1)
    lane = random.uniform(2.9, 4)
    crossing = random.choice((999, random.uniform(12, 50)))  # where a side street begins, or none
    canvas.eye = (lane / 2 + random.uniform(-0.3, 0.3), canvas.eye[1])
    slabs = canvas.paint("sidewalk", METALS, panes=canvas.tint(PLASTER), grid=(0.7, 0.5, 0.92))
    asphalt = canvas.paint("road", "4d4d4f 66666a 80807f", rough=random.uniform(0.05, 0.15))
    white = canvas.paint("road", "eceae6", rough=0.16)
    grass = canvas.paint("terrain", "4d662e 616b33 73664c 80735c", rough=0.3)
    things: list[Any] = []  # layer, -z, x, what paints it; painted in this order

    def row(layer: int, x: Pair, gap: Pair, end: float, *kinds: Any) -> None:
        """Things at x, `gap` metres from one to the next; kinds are a painter and a length."""
        z = random.uniform(-8, 0) if layer == 0 else random.uniform(5, 14)
        while z < end:
            draw, length = random.choice(kinds)
            # The crossing stays free.
            if not crossing - 3 - length < z < crossing + 11:
                things.append((layer, -z, random.uniform(*x), draw))
            z += length + random.uniform(*gap)

    canvas.box((-400, 400), (0, 0), (NEAR, 400), grass)
    for side in (-1, 1):
        parking = random.random() < 0.5
        kerb = side * (lane + 2.2 * parking)  # x where the road ends
        verge = kerb + side * max(0, random.uniform(-3, 4) - 2 * urban)  # the green beside it
        walk = verge + side * random.uniform(1.8, 4.5)  # the sidewalk
        front = walk + side * random.uniform(2, 8) * (random.random() > urban)  # the gardens
        canvas.box((verge, walk), (0, 0), (NEAR, 200), slabs)
        canvas.box((0, kerb), (0, 0), (NEAR, 200), asphalt)
        for line in (0, side * lane):
            dash = random.choice((3, 3, 90))
            for z in range(1, 90, dash + 4):
                canvas.box((line - 0.07, line + 0.07), (0, 0), (z, z + dash), white)
        for x in range(0, int(kerb), side):  # stripes of a zebra crossing
            canvas.box((x + 0.2, x + 0.7), (0, 0), (crossing - 3, crossing - 1), white)
        drive = partial(vehicle, oncoming=side < 0)
        vehicles = [(partial(drive, label=label), MODELS[label][0]) for label in MODELS]
        cycles: list[Any] = [(cycle, 1), (partial(cycle, label="motorcycle"), 1)]
        riders = [(partial(draw, ridden=True), 2) for draw, _ in cycles]
        tree = (partial(plant, trunk=random.uniform(1, 4)), 2)
        row(0, (front, front), (0, 8 - 8 * urban), 130, (partial(house, urban=urban), 10))
        row(0, (front, front + 9 * side), (2, 20 + 40 * urban), 130, tree)
        row(1, (walk, walk), (0, 3 + 20 * urban), 90, (barrier, 8), (plant, 1))
        # Few trees where there is no green strip; posts three times as often as either cycle.
        row(2, (kerb + 0.7 * side, verge), (4, 99 if verge == kerb else 12), 80, tree)
        row(2, (kerb + 0.3 * side, kerb + 0.8 * side), (0, 15), 80, *3 * [(post, 0)], *cycles)
        row(2, (verge, walk), (0, 16), 60, (person, 0.5))
        row(2, (kerb - 1.1 * side, kerb - side), (1, 9), 80 * parking, vehicles[0])
        traffic = 4 * vehicles[:1] + vehicles[1:] + riders
        row(2, (side * lane * 0.4, side * lane * 0.6), (2, 30), 90, *traffic)

    canvas.box((-90, 90), (0, 0), (crossing, crossing + 9), asphalt)
    for left in range(-110, 110, 12):  # what closes the view, some of it too far to tell
        end = canvas.paint(random.choice(("building", "vegetation", "ignored")), PLASTER)
        canvas.box((left, left + 12), (0, random.uniform(3, 20)), (130, 130), end)
    for _, depth, x, draw in sorted(things, key=lambda thing: thing[:2]):
        draw(canvas, x, -depth)
    bonnet = (canvas.eye[0], canvas.eye[1] - random.uniform(0.5, 0.75), 0.8)  # of the own car
    canvas.disc(bonnet, (1.2, 0.26), canvas.paint("ignored", PAINTS), corners=24)
