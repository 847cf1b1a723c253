"""Synthetic lips: a drawn mouth that says given phones, grey 96x96 at 25 fps, for lip-to-speech without video.

What is drawn knows viseme classes alone: phones of one class give the same pixels, voicing is invisible, and
neighbours of one class melt together.  Co-articulation follows Cohen and Massaro (1993): every segment pulls the
articulators to its target with a dominance that falls off in time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from metis_lib.config import FRAME_RATE
from metis_lib.data.align import Timed
from metis_lib.data.video import CROP, VIDEO_RATE
from metis_lib.errors import MetisError

VISEMES = {
    "silence": "_ , . ? ! ; : ' …",
    "bilabial": "p b m",
    "labiodental": "f v",
    "dental": "θ ð",
    "alveolar": "t d n l ɾ",
    "sibilant": "s z ts dz",
    "postalveolar": "ʃ ʒ tʃ dʒ",
    "velar": "k ɡ ŋ h",
    "rhotic": "ɹ r tɹ dɹ ɚ ɜː",
    "glide": "w uː u ʊ ʊɹ",
    "spread": "i iː iːː ɪ iə ɪɹ j eɪ",
    "mid": "ə ɛ ɛɹ æ ææ ʌ ɐɐ",
    "open": "ɑː ɑːɹ ɑ̃ aɪ aɪə aɪɚ",
    "round": "ɔ ɔː ɔːɹ ɔ̃ ɔɪ oː oːɹ oʊ aʊ",
}
"""Class to its phones: every phone of nano's table, in 14 classes."""
NAMES = tuple(VISEMES)
CLASS_OF = {phone: number for number, phones in enumerate(VISEMES.values()) for phone in phones.split()}

# Targets in 0..1: jaw (opening), width, pout (protrusion), press (lips closed), tuck (lower lip under the teeth),
# teeth (upper teeth seen), tongue; then how strongly the class holds jaw and lips, and for how long (s).
_TARGETS = np.array([
    # jaw  width pout press tuck teeth tongue | hold, reach
    [0.02, 0.50, 0.10, 0.55, 0.0, 0.0, 0.0, 0.6, 0.09],  # silence
    [0.10, 0.48, 0.15, 1.00, 0.0, 0.0, 0.0, 9.0, 0.022],  # bilabial
    [0.16, 0.55, 0.05, 0.00, 1.0, 0.9, 0.0, 6.0, 0.026],  # labiodental
    [0.26, 0.55, 0.05, 0.00, 0.0, 0.6, 1.0, 2.5, 0.035],  # dental
    [0.26, 0.58, 0.05, 0.00, 0.0, 0.7, 0.6, 1.0, 0.040],  # alveolar
    [0.14, 0.66, 0.05, 0.00, 0.0, 1.0, 0.0, 1.8, 0.045],  # sibilant
    [0.18, 0.34, 0.75, 0.00, 0.0, 0.9, 0.0, 2.4, 0.055],  # postalveolar
    [0.34, 0.52, 0.10, 0.00, 0.0, 0.4, 0.1, 0.4, 0.040],  # velar
    [0.24, 0.38, 0.55, 0.00, 0.0, 0.5, 0.2, 1.3, 0.055],  # rhotic
    [0.14, 0.10, 1.00, 0.10, 0.0, 0.0, 0.0, 2.6, 0.065],  # glide
    [0.26, 0.88, 0.00, 0.00, 0.0, 0.8, 0.2, 1.3, 0.055],  # spread
    [0.52, 0.64, 0.00, 0.00, 0.0, 0.6, 0.3, 1.1, 0.055],  # mid
    [0.95, 0.56, 0.05, 0.00, 0.0, 0.5, 0.3, 1.6, 0.060],  # open
    [0.58, 0.26, 0.70, 0.00, 0.0, 0.1, 0.1, 1.7, 0.065],  # round
])  # fmt: skip
_SCALE = 2  # the face is drawn this many times larger than it is shown
_SIZE = CROP * _SCALE


def visemes(phones: Sequence[str]) -> list[int]:
    """The class of each phone, as a number into :data:`NAMES`; MetisError names a phone without one."""
    unknown = sorted(set(phones) - set(CLASS_OF))
    if unknown:
        raise MetisError(f"no viseme for the phones {' '.join(unknown)}; phones are those of phones_nano.json")
    return [CLASS_OF[phone] for phone in phones]


def articulate(phones: Sequence[Timed], frames: int) -> np.ndarray:
    """Articulators [N, 7] in 0..1 (columns of the table above) in the middle of each of ``frames`` video frames.

    Where nobody speaks the mouth rests; neighbours of one class are one segment.  MetisError: phones without a
    class, not in order, or of no length.
    """
    segments: list[list[float]] = []  # class, start, end
    for number, (_, start, end) in zip(visemes([p[0] for p in phones]), phones, strict=True):
        last = segments[-1][2] if segments else -1.0
        if not last - 1e-6 <= start < end:
            raise MetisError(f"phones must follow each other in time; one lies at {start:.3f} to {end:.3f} s")
        if start - last > 1e-3:
            segments.append([0, last, start])
        if number == segments[-1][0]:
            segments[-1][2] = end
        else:
            segments.append([number, start, end])
    segments.append([0, segments[-1][2] if segments else -1.0, frames / VIDEO_RATE + 1.0])
    number, start, end = np.array(segments).T
    target = _TARGETS[number.astype(int)]  # [segments, 9]
    # a closure shorter than a frame would fall between two frames
    short = np.maximum(0.044 - (end - start), 0) / 2 * (target[:, 7] > 5)
    time = (np.arange(frames) + 0.5)[:, None] / VIDEO_RATE
    outside = np.maximum(np.maximum(start - short - time, time - end - short), 0)
    weight = target[:, 7] * np.exp(-outside / target[:, 8])  # [N, segments]
    return weight @ target[:, :7] / weight.sum(axis=1, keepdims=True)


@dataclass(frozen=True)
class FaceStyle:
    """A synthetic face and camera: greys in 0..255, lengths in pixels of the 96x96 picture, angles in degrees."""

    skin: float = 150.0
    lip: float = 0.8  # grey of the lips, as a part of the skin's
    lip_upper: float = 6.5  # thickness
    lip_lower: float = 8.5
    width: float = 22.0  # half of the mouth at rest
    effort: float = 1.0  # how far the mouth opens
    jaw: float = 46.0  # half the width of the face
    nose: float = 12.0
    beard: float = 0.0  # 0..1, moustache likewise
    moustache: float = 0.0
    texture: int = 0  # seed of the skin's unevenness
    scale: float = 1.0
    turn: float = 0.0
    motion: float = 1.0  # of the head, in pixels
    gradient: float = 0.0  # how far the light falls off across the picture, as a part, and in which direction
    light: float = 0.0
    blur: float = 0.5
    noise: float = 2.0
    background: float = 60.0

    @staticmethod
    def sample(generator: np.random.Generator) -> FaceStyle:
        """A random face; the same state of the generator, the same face."""
        u, bearded = generator.uniform, generator.random() < 0.25
        return FaceStyle(
            skin=u(60, 195), lip=u(0.64, 0.88), lip_upper=u(4.5, 8.5), lip_lower=u(6, 10.5), width=u(19, 25),
            effort=u(0.75, 1.15), jaw=u(42, 53), nose=u(9, 15), beard=u(0.4, 1) * bearded,
            moustache=u(0.3, 1) * bearded, texture=int(generator.integers(2**31)), scale=u(0.92, 1.08), turn=u(-4, 4),
            motion=u(0.3, 2), gradient=u(0, 0.35), light=u(0, 360), blur=u(0.2, 1.1), noise=u(0.5, 5),
            background=u(10, 220),
        )  # fmt: skip


@lru_cache(maxsize=8)
def _face(style: FaceStyle) -> np.ndarray:
    """The face without its lips, uint8 [192, 192]; the mouth's middle lies in the picture's."""
    import cv2

    y, x = np.mgrid[:_SIZE, :_SIZE] / _SCALE - CROP / 2  # pixels from the mouth's middle
    random = np.random.default_rng(style.texture)
    coarse, fine, hairs = (cv2.resize(random.standard_normal((n, n)), (_SIZE, _SIZE)) for n in (6, 24, _SIZE))

    def spot(cx: float, cy: float, sx: float, sy: float) -> np.ndarray:
        return np.exp(-(((x - cx) / sx) ** 2) - ((y - cy) / sy) ** 2)

    n, side = style.nose, np.abs(x)
    shade = 1 - 0.35 * (x / style.jaw) ** 2 + 0.10 * spot(0, 32, 12, 7) + 0.012 * coarse + 0.008 * fine
    shade += 0.12 * spot(0, -40, n * 0.6, 16) - 0.2 * spot(0, -26, n, 4) - 0.14 * spot(0, 17, 13, 4)  # nose, under lip
    for sign in (-1, 1):
        shade -= 0.45 * spot(sign * n * 0.45, -28, 2.8, 1.8)  # nostril
        shade += 0.07 * spot(sign * 30, -18, 12, 14) - 0.04 * spot(sign * 2.5, -16, 1.2, 5)  # cheek, philtrum
    shade -= 0.09 * np.exp(-(((side - 21 - 0.3 * (y + 22)) / 4) ** 2) - ((y + 14) / 16) ** 2)  # nasolabial folds
    hair = 0.55 * style.moustache * spot(0, -15, 20, 5) + 0.5 * style.beard / (1 + np.exp((26 - y - 0.9 * side) / 3))
    face = style.skin * shade * (1 - hair * np.clip(0.8 + 0.35 * hairs, 0, 1.6))
    edge = style.jaw * np.sqrt(np.clip(1 - ((y + 20) / 68) ** 2, 0.01, None))  # the jaw line
    inside = 1 / (1 + np.exp((side - edge) / 1.2))
    neck = 1 / (1 + np.exp((side - 0.72 * style.jaw) / 1.2))
    behind = 0.55 * style.skin * neck + style.background * (1 - neck)
    return np.clip(cv2.GaussianBlur(face * inside + behind * (1 - inside), (0, 0), 1.0), 0, 255).astype(np.uint8)


def _draw(pose: np.ndarray, style: FaceStyle) -> np.ndarray:
    """One frame of the face, uint8 [192, 192], before head motion and camera."""
    import cv2

    jaw, width, pout, press, tuck, teeth, tongue = pose.tolist()
    gap = 25.0 * style.effort * jaw * (1 - min(1.0, 1.15 * press)) ** 0.7
    thick = 1 + 0.3 * pout - 0.25 * max(0.0, press - 0.5)
    half = style.width * (0.62 + 0.62 * width) * (1 - 0.16 * pout)
    rows = np.arange(_SIZE, dtype=np.float32)
    pull = 9.0 * style.effort * jaw / (1 + np.exp((CROP / 2 + 6 - rows / _SCALE) / 4)) * _SCALE  # chin follows jaw
    x, y = np.meshgrid(rows, (rows - pull).astype(np.float32))
    face = cv2.remap(_face(style), x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)

    u = np.linspace(-1, 1, 41)  # from corner to corner
    arch, seam = (1 - u**2) ** 0.75, 0.9 * (u**2 - 0.4)
    bow = arch * (1 - 0.22 * np.exp(-((u / 0.16) ** 2)) + 0.08 * np.exp(-(((np.abs(u) - 0.3) / 0.2) ** 2)))
    top, bottom = seam - 0.28 * gap * arch, seam + 0.72 * gap * (1 - 0.75 * tuck) * arch
    lower = style.lip_lower * thick * (1 - 0.45 * tuck)

    def area(grey: float, wide: float, above: np.ndarray, below: np.ndarray) -> None:
        line = np.stack([np.append(u, u[::-1]) * half * wide, np.append(above, below[::-1])], 1) + CROP / 2
        cv2.fillPoly(face, [np.round(line * _SCALE * 16).astype(np.int32)], grey, cv2.LINE_AA, 4)

    skin, lip = style.skin, style.skin * style.lip
    area(lip * 0.86, 1.0, top - style.lip_upper * thick * bow, seam)
    area(lip, 1.0, seam, bottom + lower * (1 - np.abs(u) ** 2.4))
    area(lip * 1.1, 0.5, bottom + lower * (0.45 - 0.12 * arch), bottom + lower * (0.45 + 0.16 * arch))  # shine
    if gap > 0.4:
        area(0.14 * skin, 0.88, top, bottom)
        bite, reach = teeth * (2.2 + 0.22 * gap) * arch**0.5, (0.15 + 0.6 * tongue) * gap * arch
        area(0.46 * skin, 0.7, np.maximum(bottom - reach, top), bottom)
        area((0.45 * skin + 110) * (0.7 + 0.3 * teeth), 0.85, top, np.minimum(top + bite, bottom))
    else:
        dark = (0.6 + 0.25 * press) * arch
        area(lip * 0.45, 0.93, seam - dark, seam + dark)
    return face


def render(phones: Sequence[Timed], frames_50hz: int, style: FaceStyle, generator: np.random.Generator) -> np.ndarray:
    """Synthetic lips saying ``phones`` (:mod:`metis_lib.data.align`) over T frames of tokens.

    ``generator`` draws head motion and sensor noise.

    Returns:
        uint8 [N, 96, 96] grey at 25 fps, N = T / 2 rounded up.

    Raises:
        MetisError: no frames; phones as in :func:`articulate`.
    """
    import cv2

    if frames_50hz < 1:
        raise MetisError(f"a lip video has at least one frame, not {frames_50hz}")
    count = -(-frames_50hz * VIDEO_RATE // FRAME_RATE)
    poses = articulate(phones, count)
    time = np.arange(count)[:, None] / VIDEO_RATE
    # four slow swings each for x, y, turn and scale
    speed, phase, size = generator.uniform([[[0.1]], [[0.0]], [[0.2]]], [[[0.7]], [[1.0]], [[0.6]]], (3, 4, 4))
    swing = np.stack([(size[k] * np.sin(2 * np.pi * (time * speed[k] + phase[k]))).sum(axis=1) for k in range(4)], 1)
    across = (np.arange(CROP) + 0.5) / CROP - 0.5
    slope = np.cos(np.deg2rad(style.light)) * across + np.sin(np.deg2rad(style.light)) * across[:, None]
    light, middle = 1 + 2 * style.gradient * slope, _SIZE / 2
    out = np.empty((count, CROP, CROP), np.uint8)
    for n, (pose, (dx, dy, turn, zoom)) in enumerate(zip(poses, swing * style.motion, strict=True)):
        face = cv2.GaussianBlur(_draw(pose, style), (0, 0), _SCALE * float(np.hypot(0.35, style.blur)))
        matrix = cv2.getRotationMatrix2D((middle, middle), style.turn + turn, style.scale * (1 + zoom / 60) / _SCALE)
        matrix += np.array([[0, 0, CROP / 2 - middle + dx], [0, 0, CROP / 2 - middle + dy]])
        seen = cv2.warpAffine(face, matrix, (CROP, CROP), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        noise = generator.standard_normal((CROP, CROP), np.float32) * style.noise
        out[n] = np.clip(seen * light + noise + 0.5, 0, 255)
    return out
