"""What stands where in a street: along a straight or slightly bent road, perhaps with a crossing."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from datasets.synthetic.canvas import BLOCKS, FAR, LEFT, NEAR, RIGHT, SIDES, Canvas
from datasets.synthetic.houses import facade, fence, house, wall
from datasets.synthetic.palette import (
    BICYCLE,
    BUILDING,
    BUS,
    FENCE,
    GRASS,
    HAZE,
    IGNORE,
    LEAF,
    MOTORCYCLE,
    PERSON,
    ROAD,
    SIDEWALK,
    SLABS,
    TERRAIN,
    TRAIN,
    TRUCK,
    VEGETATION,
    WALL,
    WHITE,
)
from datasets.synthetic.things import (
    bush,
    clutter,
    cycle,
    lamp_post,
    person,
    traffic_light,
    traffic_sign,
    tree,
)
from datasets.synthetic.vehicles import car, coach, truck


class Street:
    """Lays out one scene: the ground is painted at once, the rest becomes a list of things ordered by depth."""

    def __init__(self, c: Canvas):
        self.c = c
        self.things: list[tuple[float, Callable[[], None]]] = []  # depth, and what draws it
        self.taken: list[
            tuple[float, float, float, float]
        ] = []  # pieces of ground: left, right, near, far
        self.urban, self.busy = c.uniform(0, 1) ** 0.7, c.uniform(0.3, 1.0)
        self.lanes, green, self.lane = (
            c.pick((1, 1, 1, 2)),
            1 - self.urban,
            c.uniform(2.9, 3.7),
        )  # lanes each way
        # Left and right, how far from the middle of the road its lanes end, the strip for parking, the green verge,
        # the sidewalk, and the front gardens.
        self.road = self.lane * self.lanes
        self.parking = {side: c.chance(0.5 - 0.1 * side) for side in SIDES}
        self.kerb = {side: self.road + 2.2 * self.parking[side] for side in SIDES}
        self.verge = {
            side: self.kerb[side] + c.uniform(1.2, 3.0) * c.chance(0.15 + 0.5 * green)
            for side in SIDES
        }
        self.walk = {side: self.verge[side] + c.uniform(1.8, 4.5) for side in SIDES}
        self.front = {
            side: self.walk[side] + c.uniform(2, 8) * c.chance(0.1 + green) for side in SIDES
        }
        self.crossed = c.chance(0.6)
        self.crossing = c.uniform(12, 50) if self.crossed else 999.0  # from here to `beyond`
        self.beyond = self.crossing + c.uniform(7, 12)
        c.at = self.road - self.lane / 2 + c.uniform(-0.3, 0.3)

    def paint(self) -> None:
        self.ground()
        self.markings()
        self.backdrop()
        self.frontages()
        self.traffic()
        self.parked()
        self.kerbside()
        self.cycles()
        self.people()
        for _, draw in sorted(self.things, key=lambda thing: -thing[0]):
            draw()

    def add(self, depth: float, draw: Callable[..., None], *args: Any) -> None:
        self.things.append((depth, partial(draw, self.c, *args)))

    def free(self, x: float, z: float, half: float, deep: float) -> bool:
        """Claim a piece of ground, unless something stands there."""
        left, right, near, far = x - half, x + half, z - deep, z + deep
        if any(
            left < x1 and x0 < right and near < z1 and z0 < far for x0, x1, z0, z1 in self.taken
        ):
            return False
        self.taken.append((left, right, near, far))
        return True

    def spots(self, first: float, last: float, low: float, high: float) -> list[float]:
        """Depths along the road, `low` to `high` metres apart, none of them at the crossing."""
        found, z = [], first
        while z < last:
            if not self.crossing - 6 < z < self.beyond + 3:
                found.append(z)
            z += self.c.uniform(low, high)
        return found

    # What is painted at once.

    def ground(self) -> None:
        c = self.c
        grass, slab, grey = c.tone(GRASS), c.tone(SLABS), c.uniform(0.3, 0.5)
        turf: dict[str, Any] = {"label": TERRAIN, "rough": 0.3, "grain": 6}
        tar: dict[str, Any] = {
            "label": ROAD,
            "rough": c.uniform(0.05, 0.14),
            "grain": c.pick((5.0, 20.0)),
        }
        slabs: dict[str, Any] = {
            "label": SIDEWALK,
            "rough": 0.1,
            "pattern": BLOCKS,
            "second": c.tone([slab], 0.3),
        }
        slabs["params"] = (c.uniform(0.3, 1.0), c.uniform(0.3, 1.0), 0.06, 0)
        c.strip(-400, 400, NEAR, 400, grass, **turf)
        for side in SIDES:
            kerb = side * self.kerb[side]
            c.strip(kerb, side * self.walk[side], NEAR, 200, slab, **slabs)
            c.strip(kerb, side * self.verge[side], NEAR, 200, c.tone([grass]), **turf)
            c.strip(kerb, kerb + side * 0.2, NEAR, 200, c.tone([slab], 0.3), SIDEWALK, rough=0.1)
        asphalt = (grey, grey, grey * 1.02)
        c.strip(-self.kerb[LEFT], self.kerb[RIGHT], NEAR, 200, asphalt, **tar)
        c.strip(-90, 90, self.crossing, min(self.beyond, FAR), c.tone([asphalt], 0.05), **tar)
        for _ in c.times(0, 7):  # patches
            x, z = c.uniform(-self.kerb[LEFT], self.kerb[RIGHT] - 2), c.uniform(3, 30)
            c.strip(x, x + c.uniform(0.5, 2), z, z + c.uniform(0.5, 6), c.tone([asphalt]), **tar)

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
        if self.crossed and c.chance(0.75):  # stop line and zebra
            z = self.crossing - 3.2
            mark(0.1, self.kerb[RIGHT], z - 1, z - 0.6)
            for x in np.arange(-self.kerb[LEFT] + 0.3, self.kerb[RIGHT] - 0.4, 1.0).tolist():
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
                    c.disc(
                        (x + 4 * i, 3, FAR - 1), (5, tall), 10, c.tone(LEAF), VEGETATION, rough=0.4
                    )
            elif what == BUILDING:
                c.upright(x, x + wide, 0, c.uniform(5, 22), FAR, colour, BUILDING, **windows)
            else:
                c.upright(x, x + wide, 0, 4, FAR, HAZE, IGNORE)
            x += wide

    # What becomes a list.

    def frontages(self) -> None:
        """What lies along both sides, and the gap for the side street."""
        for side in SIDES:
            z, tall = self.c.uniform(-6, 3), 4 + 14 * self.urban * self.c.uniform(0.5, 1.2)
            while z < FAR:
                end = z + self.c.uniform(7, 18)
                if z < self.beyond + 2 and end > self.crossing - 3:
                    if z > self.crossing - 9:
                        z = self.beyond + 3
                        continue
                    end = self.crossing - 3.5
                self.frontage(side, z, end, tall * self.c.uniform(0.75, 1.25))
                z = end

    def frontage(self, side: int, z: float, end: float, tall: float) -> None:
        """A house or trees; perhaps a wall, fence or hedge before it; plants in between."""
        c, x, edge = self.c, side * self.front[side], side * self.walk[side]
        built, pitched = c.chance(0.4 + 0.6 * self.urban), c.chance(1 - self.urban)
        if built:
            x, back = (
                x + side * c.uniform(0, 5) * pitched,
                end - c.uniform(0.5, 3) * c.chance(1.1 - self.urban),
            )
            c.shadow(
                [(x, 0, z), (x, 0, back), (x + side * 10, 0, back), (x + side * 10, 0, z)], tall
            )
            self.add(end, house, x, z, back, side, tall, pitched)
        else:
            for _ in c.times(2, 5):
                self.add(
                    end - 0.1, tree, x + side * c.uniform(1, 12), c.uniform(max(z, 2), max(end, 3))
                )
        if built and self.front[side] == self.walk[side]:
            return
        what = c.pick((WALL, WALL, FENCE, FENCE, VEGETATION, TERRAIN))
        if what == WALL:
            self.add(end - 0.3, wall, edge, z, end)
        elif what == FENCE:
            self.add(end - 0.3, fence, edge, z, end)
        elif what == VEGETATION:  # a hedge
            for spot in np.arange(max(z, 2), end, 1.2).tolist():
                self.add(end - 0.3 - 0.001 * spot, bush, edge, spot, 1.2)
        for _ in c.times(0, 3):
            plant, x = c.pick((tree, bush, bush)), edge + side * c.uniform(0.8, 2.5)
            self.add(end - 0.2, plant, x, max(c.uniform(z, end), 2.5))

    def traffic(self) -> None:
        """A tram and what drives on the lanes, keeping to the right."""
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
                    self.add(
                        z, cycle, x + c.uniform(0, 0.8), z, c.pick((MOTORCYCLE, BICYCLE)), True
                    )
                elif 0.22 < roll < 0.36 and self.free(x, z + 5, 1.4, 8):
                    if c.pick((BUS, TRUCK)) == BUS:
                        self.add(z - 1, coach, x, z + 5, heading, BUS)
                    else:
                        self.add(z - 1, truck, x, z + 5, heading)
                elif self.free(x, z, 1.0, 3):
                    self.add(z - 2, car, x, z, heading, True)
                z += c.uniform(7, 40) / self.busy

    def parked(self) -> None:
        c = self.c
        for side in SIDES:
            x, last = side * (self.kerb[side] - 1.1), 80 if self.parking[side] else 0
            for z in self.spots(c.uniform(3, 9), last, 5.4, 7 + 8 * (1 - self.busy)):
                heading, lorry = (0.0 if c.chance(0.5 + side * 0.4) else math.pi), c.chance(0.05)
                if lorry and self.free(x, z + 2, 1.1, 5):
                    self.add(z - 2, truck, x, z + 2, heading)
                elif not lorry and self.free(x, z, 0.9, 2.6):
                    self.add(z - 2, car, x, z, heading, c.chance(0.1))

    def kerbside(self) -> None:
        """Lamps, signs, trees and signals at the edge of the road."""
        c = self.c
        for side in SIDES:
            x = side * (self.kerb[side] + 0.45)
            trees = side * max((self.kerb[side] + self.verge[side]) / 2, self.kerb[side] + 0.7)
            row = [(lamp_post, x, z) for z in self.spots(c.uniform(5, 16), 90, 20, 26)]
            row += [
                (c.pick((traffic_sign, traffic_sign, clutter)), x, c.uniform(5, 45))
                for _ in c.times(0, 5)
            ]
            if self.verge[side] > self.kerb[side] or c.chance(0.2):
                row += [(tree, trees, z) for z in self.spots(c.uniform(7, 16), 80, 7, 13)]
            for draw, at, z in row:
                if self.free(at, z, 0.3, 0.3):
                    self.add(z, draw, at, z)
            if self.crossed and c.chance(0.8):
                z = self.crossing - c.uniform(4, 5) if side == RIGHT else self.beyond + 1
                self.add(z, traffic_light, x, z, -side * c.uniform(2, 4.5) * c.chance(0.5))

    def cycles(self) -> None:
        """Cycles left at the kerb, alone or several side by side."""
        c = self.c
        for _ in c.times(0, 5):
            side, z, kind = c.pick(SIDES), c.uniform(5, 30), c.pick((BICYCLE, BICYCLE, MOTORCYCLE))
            for i in range(c.pick((1, 1, 2, 4))):
                x, spot = side * (self.kerb[side] + c.uniform(0.3, 0.9)), z + 0.6 * i
                if self.free(x, spot, 0.6, 0.25):
                    self.add(spot, cycle, x, spot, kind, False)

    def people(self) -> None:
        """Groups on the sidewalks, and a few who cross the road."""
        c = self.c
        for _ in c.times(1, 2 + 12 * self.busy):
            side, z = c.pick(SIDES), 4.0 + 46 * c.uniform(0, 1) ** 1.4
            x = side * c.uniform(self.verge[side] + 0.3, self.walk[side] - 0.3)
            for i in range(c.pick((1, 1, 1, 2, 3))):
                if self.free(x + 0.65 * i, z, 0.25, 0.3):
                    self.add(z, person, x + 0.65 * i, z)
        for _ in c.times(0, 4) if self.crossed else ():
            x, z = c.uniform(-self.kerb[LEFT], self.kerb[RIGHT]), self.crossing - c.uniform(0.8, 3)
            if self.free(x, z, 0.3, 0.3):
                if c.pick((PERSON, PERSON, BICYCLE)) == PERSON:
                    self.add(z, person, x, z)
                else:
                    self.add(z, cycle, x, z, BICYCLE, True)
