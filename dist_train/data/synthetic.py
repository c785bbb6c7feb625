"""Faces drawn from numbers: the data that comes with the package, for tests, demos and smoke runs.

Each expression is a set of action units after Ekman & Friesen's Facial Action Coding System (FACS, 1978) and
its guide to the emotions (EMFACS, 1983); a made-up person, a view, a light and a camera are added to it.
"""

from types import SimpleNamespace

import numpy as np
from numpy.typing import NDArray

from dist_train.config import CLASSES

Array = NDArray[np.floating]
Number = Array | float
Params = SimpleNamespace  # the numbers of a batch of faces: each attribute is float32 [n, 1, 1]

EXPRESSIONS: tuple[str, ...] = CLASSES

UNITS: dict[int, str] = {
    1: "inner brow raiser",
    2: "outer brow raiser",
    4: "brow lowerer",
    5: "upper lid raiser",
    6: "cheek raiser",
    7: "lid tightener",
    9: "nose wrinkler",
    10: "upper lip raiser",
    12: "lip corner puller",
    15: "lip corner depressor",
    16: "lower lip depressor",
    17: "chin raiser",
    20: "lip stretcher",
    22: "lip funneler",
    23: "lip tightener",
    24: "lip pressor",
    25: "lips part",
    26: "jaw drop",
    27: "mouth stretch",
    43: "lid droop",
}

# Action unit -> strength at full intensity. A face shows one of the variants of its expression.
ACTIONS: dict[str, tuple[dict[int, float], ...]] = {
    "angry": (
        {4: 1.0, 5: 0.2, 7: 0.8, 17: 0.5, 23: 1.0, 24: 1.0},
        {4: 1.0, 5: 0.4, 7: 0.7, 10: 0.4, 16: 0.8, 22: 0.5, 25: 1.0},
    ),
    "disgust": (
        {4: 0.4, 6: 0.3, 7: 0.5, 9: 1.0, 10: 0.8, 15: 0.4, 17: 0.7},
        {4: 0.3, 6: 0.3, 7: 0.6, 9: 1.0, 10: 1.0, 16: 0.5, 25: 0.5},
    ),
    "fear": (
        {1: 1.0, 2: 0.5, 4: 0.4, 5: 1.0, 20: 1.0, 25: 0.9},
        {1: 1.0, 2: 0.6, 4: 0.4, 5: 1.0, 20: 1.0, 25: 1.0, 26: 0.5},
    ),
    "happy": ({6: 0.8, 12: 1.0}, {6: 0.9, 12: 1.0, 25: 0.8}, {6: 1.0, 12: 1.0, 25: 1.0, 26: 0.5}),
    "neutral": ({},),
    "sad": ({1: 1.0, 4: 0.5, 15: 1.0, 17: 0.6, 43: 0.3}, {1: 0.9, 4: 0.6, 7: 0.3, 15: 1.0, 43: 0.5}),
    "surprise": ({1: 0.9, 2: 1.0, 5: 0.8, 25: 0.5, 26: 1.0}, {1: 1.0, 2: 1.0, 5: 1.0, 25: 0.5, 26: 0.5, 27: 1.0}),
}
INTENSITY = (0.75, 1.1)

# Ranges of the uniform draws. Lengths are in half image widths, y points down, tones go from 0 (black) to 1.
PERSON = {
    "head_width": (0.68, 0.80),
    "head_height": (0.90, 1.02),
    "jaw": (0.05, 0.25),
    "square": (0.0, 0.45),
    "skin": (0.45, 0.86),
    "age": (0.0, 1.0),
    "beard": (0.0, 1.0),
    "glasses": (0.0, 1.0),
    "bald": (0.0, 1.0),
    "hair_tone": (0.05, 0.40),
    "fair": (0.0, 1.0),
    "hair_long": (0.0, 1.0),
    "hairline": (-0.80, -0.56),
    "parting": (-0.2, 0.2),
    "fringe": (0.0, 0.9),
    "volume": (0.04, 0.20),
    "curl": (0.05, 0.25),
    "eye_x": (0.31, 0.38),
    "eye_y": (-0.21, -0.13),
    "eye_width": (0.155, 0.20),
    "eye_open": (0.055, 0.08),
    "eye_tilt": (-0.10, 0.16),
    "iris": (0.06, 0.32),
    "brow_y": (-0.43, -0.37),
    "brow_arch": (0.0, 0.06),
    "brow_width": (0.020, 0.038),
    "nose_y": (0.16, 0.25),
    "nose_width": (0.11, 0.17),
    "mouth_y": (0.49, 0.57),
    "mouth_width": (0.24, 0.32),
    "lip": (0.045, 0.085),
    "lip_tone": (0.55, 0.85),
}
VIEW = {
    "turn": (-0.13, 0.13),
    "nod": (-0.08, 0.08),
    "roll": (-0.15, 0.15),
    "zoom": (1.06, 1.26),
    "shift_x": (-0.12, 0.12),
    "shift_y": (-0.12, 0.10),
    "gaze": (-0.04, 0.04),
    "skew": (-0.02, 0.02),
    "light_x": (-0.32, 0.32),
    "light_y": (-0.28, 0.08),
    "wall": (0.10, 0.95),
    "wall_slope": (-0.2, 0.2),
    "exposure": (-0.08, 0.08),
    "contrast": (0.85, 1.15),
    "blur": (0.0, 0.16),
    "noise": (0.005, 0.02),
}
CHUNK = 128  # faces drawn at a time: few enough for the arrays to stay in the processor's cache


def draw_faces(count: int, seed: int = 0, size: int = 48) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Draw `count` faces, the expressions in equal shares and in random order; another seed, other people.

    Returns images uint8 [count, 1, size, size] and labels int64 [count], indices into EXPRESSIONS.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, not {count}")
    if size < 16:
        raise ValueError(f"size must be at least 16 pixels for a face to be seen, not {size}")
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count, dtype=np.int64) % len(EXPRESSIONS))
    images = np.empty((count, 1, size, size), dtype=np.uint8)
    for start in range(0, count, CHUNK):
        chunk = labels[start : start + CHUNK]
        drawn = _sample_actions(rng, chunk)
        drawn |= {name: rng.uniform(*ends, (len(chunk), 1, 1)) for name, ends in (PERSON | VIEW).items()}
        params = Params(**{name: values.astype(np.float32) for name, values in drawn.items()})
        images[start : start + CHUNK, 0] = _photograph(rng, _draw(params, size), params)
    return images, labels


def _sample_actions(rng: np.random.Generator, labels: NDArray[np.int64]) -> dict[str, Array]:
    """Return the strength of each action unit, "au1", "au2", ...: uneven, as no two people frown alike."""
    column = {unit: i for i, unit in enumerate(UNITS)}
    strength = np.zeros((len(labels), len(UNITS)))
    for face, label in enumerate(labels):
        variants = ACTIONS[EXPRESSIONS[label]]
        for unit, full in variants[rng.integers(len(variants))].items():
            strength[face, column[unit]] = full
    strength *= rng.uniform(*INTENSITY, (len(labels), 1)) * rng.uniform(0.75, 1.2, strength.shape)
    strength += rng.uniform(0.0, 0.08, strength.shape)  # a face is never quite at rest
    return {f"au{unit}": strength[:, i, None, None] for unit, i in column.items()}


def _inside(distance: Array, soft: float) -> Array:
    """Turn a signed distance, negative inside, into a coverage from 0 to 1 with a soft edge."""
    return np.clip(0.5 - distance / soft, 0.0, 1.0)


def _blob(x: Array, y: Array, width: Number, height: Number) -> Array:
    """Return a smooth bump: 1 in the middle, 0 from the ellipse outwards."""
    bump = np.maximum(1.0 - (x / width) ** 2 - (y / height) ** 2, 0.0)
    return bump * bump


def _stroke(
    along: Array,
    across: Array,
    ends: tuple[Number, Number],
    bend: tuple[Number, Number, Number],
    width: Number,
    soft: float,
    blunt: float = 1.0,
) -> Array:
    """Return a tapered pen stroke on a parabola: from ends[0] to ends[1] through the heights of `bend`."""
    t = (along - ends[0]) / (ends[1] - ends[0])
    first, middle, last = bend
    curve = first + t * (4 * middle - 3 * first - last + t * (2 * first + 2 * last - 4 * middle))
    return _inside(np.abs(across - curve) - width * np.minimum(4 * blunt * t * (1 - t), 1.0), soft)


def _paint(image: Array, tone: Number, coverage: Array) -> None:
    image += coverage * (tone - image)


def _darken(image: Array, amount: Number, coverage: Array) -> None:
    image *= 1 - amount * coverage


def _draw(p: Params, size: int) -> Array:
    """Draw the faces from back to front; returns tones [n, size, size].

    x and y, of that shape too, say where on the face each pixel lies; |x| draws both halves at once.
    """
    soft = 2.4 / size  # edges a little over one pixel wide
    axis = ((np.arange(size) + 0.5) / size * 2 - 1).astype(np.float32)
    right, down = axis[None, None, :] - p.shift_x, axis[None, :, None] - p.shift_y
    cos, sin = np.cos(p.roll) / p.zoom, np.sin(p.roll) / p.zoom
    x, y = right * cos + down * sin, down * cos - right * sin
    hair = np.where(p.fair > 0.8, p.hair_tone + 0.4, p.hair_tone * np.minimum(1.0, p.skin + 0.2))

    image = p.wall + p.wall_slope * axis[None, :, None] + np.zeros_like(x)
    _draw_head(image, x, y, p, hair, soft)
    # What is nearest to us, the middle of the face, moves furthest when the head turns or nods.
    depth = np.maximum(1.0 - (x / p.head_width) ** 2 - (y / 1.1) ** 2, 0.0)
    x, y = x - p.turn * depth, y - p.nod * depth
    y = y + p.skew * np.clip(4 * x, -1.0, 1.0)
    _draw_folds(image, x, y, p, soft)
    _draw_nose(image, x, y, p, soft)
    _draw_mouth(image, x, y, p, hair, soft)
    _draw_eyes(image, x, y, p, soft)
    _draw_brows_and_glasses(image, x, y, p, hair, soft)
    return image


def _draw_head(image: Array, x: Array, y: Array, p: Params, hair: Array, soft: float) -> None:
    """Hair at the back, neck, ears, the shaded head, hair at the front."""
    bald, long, ax, low = p.bald > 0.92, p.hair_long > 0.5, np.abs(x), np.maximum(y, 0.0)
    chin = 1.0 + 0.06 * p.au26 + 0.08 * p.au27  # a dropped jaw makes the face longer
    across = (x * (1 + p.jaw * low * low) / p.head_width) ** 2
    up = (np.where(y > 0, y / chin, y) / p.head_height) ** 2
    radius = np.sqrt(np.maximum(across + up - p.square * across * up * (y > 0), 0.0))
    part = x - p.parting
    strands = p.curl * np.sin(part / (y + 1.7) * 45 + 3 * y) * np.sin(part * 5 + y * 4)
    crown = radius - 1 - p.volume - 0.2 * strands
    sides = np.maximum(ax - p.head_width - p.volume - 0.2 * strands, -0.25 - y)
    mane = np.where(long, np.minimum(sides, np.maximum(crown, y)), np.maximum(crown + 0.05, y))
    _paint(image, hair * (0.8 + strands), _inside(mane, soft) * ~bald)
    _paint(image, p.skin * 0.62, _inside(np.maximum(ax - 0.62 * p.head_width, 0.5 - y), soft))
    ear = _inside(np.hypot((ax - p.head_width) / 0.09, (y + 0.06) / 0.2) - 1, 4 * soft)
    _paint(image, p.skin * 0.8, ear * (~long | bald))

    toward_us = np.sqrt(np.maximum(1.0 - radius * radius, 0.0))
    light = 0.80 + 0.24 * toward_us + p.light_x * x / p.head_width + p.light_y * y / p.head_height
    _paint(image, p.skin * light, _inside(radius - 1, 1.6 * soft))
    bow = part * part
    line = p.hairline + p.fringe * bow + (1.3 - p.fringe) * bow * bow + 0.4 * p.parting * x
    front = _inside(np.maximum(y - line - 0.2 * strands, crown), 2 * soft) * ~bald
    gloss = 0.6 * _blob(x - p.light_x, y + 0.85, 0.7, 0.25)
    _paint(image, hair * (0.8 + gloss + strands), front)


def _draw_folds(image: Array, x: Array, y: Array, p: Params, soft: float) -> None:
    """Cheeks, and the lines of moved skin: forehead, frown, pouches, crow's feet, nose to lips, chin."""
    ax, raised = np.abs(x), np.maximum(np.maximum(p.au1, p.au2) - 0.6 * p.au4, 0.0)
    for above in (0.15, 0.26):
        row = p.brow_y - above - 0.06 * p.au1
        line = _stroke(x, y, (-0.42, 0.42), (row + 0.03, row, row + 0.03), 0.022, soft)
        _darken(image, (0.10 + 0.12 * p.age) * raised, line)
    frown = _stroke(y, ax, (p.brow_y - 0.12, p.eye_y), (0.07, 0.055, 0.075), 0.022, soft)
    _darken(image, 0.42 * np.minimum(p.au4 + 0.4 * p.au9, 1.0), frown)
    cheek = p.au6 + 0.5 * p.au12 + 0.5 * p.au9
    _darken(image, -0.11 * cheek, _blob(ax - 0.40, y - p.eye_y - 0.32, 0.24, 0.17))
    row = p.eye_y + 0.15 - 0.03 * p.au6
    pouch = _stroke(ax, y, (p.eye_x - 0.2, p.eye_x + 0.2), (row - 0.04, row, row - 0.06), 0.03, soft)
    _darken(image, 0.06 + 0.18 * p.au6 + 0.1 * p.au7, pouch)
    feet = _blob(ax - p.eye_x - 0.27, y - p.eye_y, 0.09, 0.11) * np.abs(np.sin((y - p.eye_y) * 40))
    _darken(image, 0.4 * p.au6, feet)
    deep = 0.03 + 0.08 * p.age + 0.22 * p.au12 + 0.3 * p.au10 + 0.25 * p.au9
    out = p.mouth_width + 0.10 + 0.08 * p.au12 + 0.06 * p.au20
    bend = (p.nose_width + 0.02, 0.45 * out + 0.16, out)
    furrow = _stroke(y, ax, (p.nose_y - 0.04 - 0.05 * p.au9, p.mouth_y + 0.1), bend, 0.03, soft)
    _darken(image, np.minimum(deep, 0.55), furrow)
    _darken(image, 0.22 * p.au17 + 0.07 * p.au15, _blob(x, y - p.mouth_y - 0.19, 0.22, 0.07))
    _darken(image, -0.12 * p.au17, _blob(x, y - p.mouth_y - 0.31, 0.18, 0.10))


def _draw_nose(image: Array, x: Array, y: Array, p: Params, soft: float) -> None:
    ax, lit, width = np.abs(x), x - 0.3 * p.light_x, p.nose_width + 0.025 * p.au9
    tip = p.nose_y - 0.05 * p.au9
    _darken(image, -0.12, _blob(lit, y - tip + 0.06, 0.10, 0.12))
    _darken(image, -0.08, _blob(lit, y + 0.08, 0.07, 0.3))
    _darken(image, 0.16, _stroke(y, ax, (p.eye_y - 0.12, tip + 0.02), (0.10, 0.07, width), 0.035, 1.5 * soft))
    wing = (width - 0.03, width + 0.02, width - 0.02)
    _darken(image, 0.30, _stroke(y, ax, (tip - 0.12, tip + 0.07), wing, 0.025, soft))
    _paint(image, 0.25 * p.skin, 0.8 * _blob(ax - 0.5 * width, y - tip - 0.04, 0.075, 0.05))
    for below in (0.02, 0.11):  # the gathered bridge
        row = p.eye_y + below
        fold = _stroke(ax, y, (-0.02, 0.17), (row, row + 0.01, row - 0.04), 0.026, soft)
        _darken(image, 0.45 * p.au9, fold)


def _draw_mouth(image: Array, x: Array, y: Array, p: Params, hair: Array, soft: float) -> None:
    """Beard, lips, and the teeth between them."""
    bearded = (p.beard > 0.82) & (p.hair_long < 0.5)
    whiskers = np.maximum(_blob(x, y - 0.86, 0.75, 0.42), 0.8 * _blob(x, y - p.nose_y - 0.15, 0.42, 0.11))
    _paint(image, hair, 0.75 * np.minimum(3 * whiskers, 1.0) * bearded)

    rounded = np.minimum(p.au27 + 0.4 * p.au26 * (1 - p.au12), 1.0)
    width = p.mouth_width * (1 + 0.30 * p.au12 + 0.42 * p.au20 + 0.1 * p.au16 - 0.12 * p.au24)
    width = width * (1 - 0.22 * p.au22) * (1 - 0.24 * rounded)
    lift = 0.012 + 0.13 * p.au12 - 0.12 * p.au15 - 0.04 * p.au20 - 0.03 * p.au10
    part = np.minimum(p.au25, 1.0)
    rise = part * (0.045 + 0.05 * p.au10 + 0.05 * p.au26) + 0.07 * p.au27
    drop = part * (0.065 + 0.07 * p.au16 + 0.03 * p.au12) + 0.08 * p.au26 + 0.16 * p.au27
    thick = p.lip * (1 - 0.5 * p.au24 - 0.3 * p.au23 - 0.2 * p.au12 - 0.15 * p.au20)

    across = (x / width) ** 2
    arch = np.maximum(1 - across, 0.0)  # pointed corners; its root has round ones
    full = np.sqrt(arch)
    boxy = np.minimum(0.7 * (p.au16 + p.au20 + p.au22) + 0.6 * rounded, 1.2)
    opening = arch + boxy * (full - arch)
    middle = p.mouth_y - 0.03 * p.au10 - 0.035 * p.au17 + 0.02 * p.au26
    line = middle + lift * (0.35 - across)
    top, bottom = line - rise * opening, line + drop * opening
    lips = np.maximum(top - 0.8 * thick * full - y, y - bottom - 1.15 * thick * full)
    _paint(image, p.skin * p.lip_tone, _inside(lips, soft) * (across < 1.1))
    _darken(image, -0.12, _blob(x, y - bottom - 0.6 * thick, 0.5 * width, 0.05))
    _darken(image, 0.18, _blob(x, y - bottom - 1.7 * thick, 0.8 * width, 0.05))
    _darken(image, 0.3, _blob(np.abs(x) - width, y - line, 0.06, 0.06))

    gap = _inside(np.maximum(top - y, y - bottom), soft) * (across < 1)
    seam = _inside(np.abs(y - line) - 0.012, soft) * (across < 1) * (0.75 + 0.2 * p.au24)
    _paint(image, 0.12 * p.skin, np.maximum(gap, seam * (1 - part)))
    shown = np.minimum(np.maximum(np.maximum(p.au12, p.au16), 0.7 * p.au20) + 0.6 * p.au10, 1.0)
    height = 0.08 * np.minimum(p.au10 + p.au12 + p.au16 + p.au20 + p.au26, 1.6)
    upper = _inside(np.maximum(top + 0.012 - y, y - top - height), soft)
    lower = _inside(np.maximum(bottom - 0.05 - y, y - bottom + 0.01), soft)
    _paint(image, 0.5 + 0.45 * p.skin, shown * upper * gap * (arch > 0.06))
    _paint(image, 0.45 + 0.45 * p.skin, np.minimum(p.au16, 1.0) * lower * gap * (arch > 0.06))


def _draw_eyes(image: Array, x: Array, y: Array, p: Params, soft: float) -> None:
    """Sockets, and eyeballs behind their lids."""
    right, side = np.abs(x) - p.eye_x, np.sign(x)
    down = y - p.eye_y + p.eye_tilt * right
    _darken(image, 0.20, _blob(right + 0.05, down + 0.05, 0.30, 0.20))
    arch = np.maximum(1 - (right / p.eye_width) ** 2, -0.3)
    squint = 0.3 * p.au6 + 0.3 * p.au7 + 0.25 * p.au9
    upper = -p.eye_open * arch * np.maximum(1 + p.au5 - squint - 0.45 * p.au43, 0.25)
    lower = 0.75 * p.eye_open * arch * np.maximum(1 + 0.35 * p.au5 - 2 * squint, 0.0)
    open_ = _inside(np.maximum(upper - down, down - lower), soft) * np.clip(5 * arch, 0.0, 1.0)
    _paint(image, 0.45 + 0.5 * p.skin, open_)
    from_pupil = np.hypot(right - p.gaze * side, down)
    _paint(image, p.iris, open_ * _inside(from_pupil - 0.075, soft))
    _paint(image, 0.04, open_ * _inside(from_pupil - 0.035, soft))
    _paint(image, 0.95, 0.7 * open_ * _inside(np.hypot(right - 0.03 * side, down + 0.03) - 0.018, soft))
    _darken(image, 0.75, _inside(np.abs(down - upper) - 0.016, soft) * (arch > -0.1))
    _darken(image, 0.25, _inside(np.abs(down - lower) - 0.008, soft) * (arch > 0))
    _darken(image, 0.18, _inside(np.abs(down - upper + 0.06) - 0.008, soft) * (arch > 0))


def _draw_brows_and_glasses(image: Array, x: Array, y: Array, p: Params, hair: Array, soft: float) -> None:
    ax = np.abs(x)
    inner = p.brow_y - 0.15 * p.au1 + 0.13 * p.au4 + 0.04 * p.au9
    middle = p.brow_y - p.brow_arch - 0.06 * p.au1 - 0.12 * p.au2 + 0.06 * p.au4 + 0.03 * p.au9
    outer = p.brow_y + 0.05 - 0.10 * p.au2 + 0.01 * p.au4 + 0.02 * p.au1
    ends = (p.eye_x - 0.21 - 0.05 * p.au4, p.eye_x + 0.25)
    brow = _stroke(ax, y, ends, (inner, middle, outer), p.brow_width, soft, blunt=2.0)
    _paint(image, np.minimum(0.9 * hair, 0.7 * p.skin), 0.9 * brow)
    rim = np.abs(np.hypot((ax - p.eye_x) / 1.1, y - p.eye_y - 0.02) - 0.22) - 0.01
    bridge = np.maximum(np.abs(y - p.eye_y + 0.02) - 0.012, ax - p.eye_x + 0.22)
    _paint(image, 0.12, 0.85 * _inside(np.minimum(rim, bridge), soft) * (p.glasses > 0.86))


def _photograph(rng: np.random.Generator, image: Array, p: Params) -> NDArray[np.uint8]:
    """Blur, expose and grain the drawings as a small cheap camera would; returns uint8 [n, size, size]."""
    rows = np.pad(image, ((0, 0), (1, 1), (1, 1)), mode="edge")
    columns = (1 - 2 * p.blur) * rows[:, 1:-1] + p.blur * (rows[:, :-2] + rows[:, 2:])
    image = (1 - 2 * p.blur) * columns[:, :, 1:-1] + p.blur * (columns[:, :, :-2] + columns[:, :, 2:])
    image = 0.5 + p.contrast * (image - 0.5) + p.exposure
    image += p.noise * rng.standard_normal(image.shape, dtype=np.float32)
    return (np.clip(image, 0.0, 1.0) * 255 + 0.5).astype(np.uint8)
