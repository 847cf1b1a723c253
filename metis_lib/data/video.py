"""Real video to mouth crops: uint8 [N, 96, 96] grey at 25 fps, cut and aligned as Auto-AVSR does it.

Four points of the face (right eye, left eye, nose tip, mouth centre) are found in every frame, filled in where
missing, smoothed over time, and mapped by a similarity onto a mean face in a picture of 256x256; the crop lies
around the mouth.  Source: the published Auto-AVSR recipe (arXiv 2303.14307), agreeing with vectors computed by
its code.  One difference: of several faces upstream in effect takes the last one listed (its running maximum is
reset by mistake); here it is the largest.
The face detector is mediapipe's, installed in a step of its own (:data:`INSTALL`), or any callable like it.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from metis_lib.errors import MetisError

VIDEO_RATE = 25
"""Frames a second of every lip video."""
CROP, PICTURE = 96, 256
"""Sides of the mouth crop and of the aligned face picture, in pixels."""
REFERENCE = np.array([
    [102.073943057066, 94.272303523897], [156.361305416213, 93.57815605187],
    [129.003737870237, 135.903430286031], [129.313373225879, 157.822996349189],
])  # fmt: skip
"""Where right eye, left eye, nose tip and mouth centre lie in the aligned picture (x, y)."""
INSTALL = "pip install --no-deps mediapipe==0.10.21 'protobuf>=4.25.8,<5' absl-py flatbuffers attrs"
LONGEST_SECONDS = 600

Points = np.ndarray
"""[4, 2] pixels (x, y): right eye, left eye, nose tip, mouth centre."""
Detector = Callable[[Iterable[np.ndarray]], Sequence[Points | None]]
"""RGB frames (which can be gone through again) to the points of each, None where no face is found."""


@dataclass(frozen=True)
class Video:
    """RGB frames uint8 [H, W, 3] of a file at 25 fps; every pass decodes again, so that memory stays small.

    A video of another rate is refused unless ``resample``: then each frame is the one of the file shown nearest to
    its time (repeated or left out, never blended).

    Raises:
        MetisError: (when gone through) missing, empty, not video, of another rate, too long, or broken off.
    """

    path: Path
    resample: bool = False
    longest: float = LONGEST_SECONDS

    def __iter__(self) -> Iterator[np.ndarray]:
        import cv2

        path = Path(self.path).expanduser()
        if not path.is_file() or path.stat().st_size == 0:
            raise MetisError(f"{path}: {'the file is empty' if path.is_file() else 'no such video'}")
        capture = cv2.VideoCapture(os.fspath(path))
        try:
            rate, expected = capture.get(cv2.CAP_PROP_FPS), capture.get(cv2.CAP_PROP_FRAME_COUNT)
            if not capture.isOpened() or not 1 <= rate <= 1000:
                raise MetisError(f"{path} is not video that can be read")
            if abs(rate - VIDEO_RATE) > 0.05 and not self.resample:
                raise MetisError(f"{path} has {rate:.3g} frames a second, not 25; convert it, or ask for resample")
            if max(expected, 0) / rate > self.longest:
                raise MetisError(f"{path} is longer than {self.longest:g} s; cut it into utterances")
            step, shown, count = rate / VIDEO_RATE if abs(rate - VIDEO_RATE) > 0.05 else 1.0, 0, 0
            while (frame := capture.read()[1]) is not None:
                while round(shown * step) <= count:
                    yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
                    shown += 1
                count += 1
        finally:
            capture.release()
        if count == 0 or count < 0.9 * expected:
            raise MetisError(f"{path} breaks off after {count} of {max(expected, 1):.0f} frames; encode it again")


def mediapipe_points(frames: Iterable[np.ndarray]) -> list[Points | None]:
    """The largest face of each frame by mediapipe: its full-range model, or, if that finds none at all, short range.

    Raises:
        MetisError: mediapipe is not installed (the message says how).
    """
    try:
        import mediapipe

        detector = mediapipe.solutions.face_detection.FaceDetection
    except (ImportError, AttributeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise MetisError(f"finding faces needs mediapipe 0.10.21 ({reason}); install it by: {INSTALL}") from error
    found: list[Points | None] = []
    for model in (1, 0):
        with detector(model_selection=model, min_detection_confidence=0.5) as detect:
            found = [_largest(detect.process(np.ascontiguousarray(f)).detections, *f.shape[:2]) for f in frames]
        if any(points is not None for points in found):
            break
    return found


def _largest(detections: Sequence | None, height: int, width: int) -> Points | None:
    """The four points of the largest detection, cut to whole pixels as upstream does."""
    if not detections:
        return None
    boxes = [d.location_data.relative_bounding_box for d in detections]
    face = detections[int(np.argmax([box.width * box.height for box in boxes]))].location_data
    return np.array([[int(p.x * width), int(p.y * height)] for p in face.relative_keypoints[:4]])


def fill(points: Sequence[Points | None]) -> np.ndarray:
    """[N, 4, 2] float: missing frames interpolated between their neighbours, at the ends copied.

    Raises:
        MetisError: no frame has a face.
    """
    known = [i for i, p in enumerate(points) if p is not None]
    if not known:
        raise MetisError("no frame of the video shows a face that can be found; the mouth must be visible")
    values = np.stack([np.asarray(points[i], dtype=np.float64).reshape(8) for i in known])
    frames = np.arange(len(points))
    return np.stack([np.interp(frames, known, column) for column in values.T], axis=1).reshape(-1, 4, 2)


def smooth(points: np.ndarray, reach: int = 6) -> np.ndarray:
    """[N, 4, 2]: the shape is the mean over +-``reach`` frames (fewer at the ends); each frame keeps its centre."""
    margins = [min(reach, t, len(points) - 1 - t) for t in range(len(points))]
    means = np.stack([points[t - m : t + m + 1].mean(axis=0) for t, m in enumerate(margins)])
    return means + (points - means).mean(axis=1, keepdims=True)


def grey(frame: np.ndarray) -> np.ndarray:
    """RGB uint8 [..., 3] as grey uint8 [...]: OpenCV's formula in whole numbers."""
    return ((frame.astype(np.int32) @ np.array([9798, 19235, 3735]) + 16384) >> 15).astype(np.uint8)


def crop_mouth(picture: np.ndarray, points: Points) -> np.ndarray:
    """Grey [H, W] and its (smoothed) points to the aligned mouth, uint8 [96, 96]; MetisError if they make no face."""
    import cv2

    matrix, _ = cv2.estimateAffinePartial2D(np.asarray(points, np.float64), REFERENCE, method=cv2.LMEDS)
    if matrix is None or not np.isfinite(matrix).all():
        raise MetisError("the points of the face lie on one spot; is the face in the picture?")
    face = cv2.warpAffine(picture, matrix, (PICTURE, PICTURE), flags=cv2.INTER_LINEAR, borderValue=0)
    centre = matrix[:, :2] @ points[3] + matrix[:, 2]
    if np.abs(centre - PICTURE / 2).max() > CROP / 2 + 5:
        raise MetisError("the mouth lies too far from the middle of the aligned face; are the points right?")
    left, top = (round(float(c) - CROP / 2) for c in centre)
    return face[top : top + CROP, left : left + CROP]


def mouth_crops(frames: Iterable[np.ndarray], detect: Detector = mediapipe_points) -> np.ndarray:
    """RGB frames at 25 fps, gone through twice (a list, an array, a :class:`Video`), to uint8 [N, 96, 96].

    Raises:
        MetisError: no face, or a frame whose crop fails; see also :class:`Video` and :func:`mediapipe_points`.
    """
    points = smooth(fill(detect(frames)))
    return np.stack([crop_mouth(grey(frame), face) for frame, face in zip(frames, points, strict=True)])


def read_lips(
    path: str | os.PathLike[str], *, resample: bool = False, detect: Detector = mediapipe_points,
    longest: float = LONGEST_SECONDS,
) -> np.ndarray:  # fmt: skip
    """A video file, or an .npz of crops, as mouth crops, uint8 [N, 96, 96] at 25 fps; errors name the file."""
    if str(path).endswith(".npz"):
        return read_crops(path)
    try:
        return mouth_crops(Video(Path(path), resample, longest), detect)
    except MetisError as error:
        raise error if str(path) in str(error) else MetisError(f"{path}: {error}") from None


def read_crops(path: str | os.PathLike[str]) -> np.ndarray:
    """Mouth crops uint8 [N, 96, 96] of an .npz file (key ``crops``); MetisError where it holds none."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            return stored["crops"]
    except (OSError, ValueError, KeyError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise MetisError(f"{path} holds no mouth crops ({(str(error) or 'it is empty').splitlines()[0]})") from error
