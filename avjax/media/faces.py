"""Faces in frames: boxes, blendshapes, action units, head pose and crops."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from avjax.errors import AvjaxError
from avjax.media.video import Frames

# The face landmarker's outputs, in its order.
# fmt: off
BLENDSHAPES = (
    "_neutral", "browDownLeft", "browDownRight", "browInnerUp", "browOuterUpLeft", "browOuterUpRight", "cheekPuff",
    "cheekSquintLeft", "cheekSquintRight", "eyeBlinkLeft", "eyeBlinkRight", "eyeLookDownLeft", "eyeLookDownRight",
    "eyeLookInLeft", "eyeLookInRight", "eyeLookOutLeft", "eyeLookOutRight", "eyeLookUpLeft", "eyeLookUpRight",
    "eyeSquintLeft", "eyeSquintRight", "eyeWideLeft", "eyeWideRight", "jawForward", "jawLeft", "jawOpen", "jawRight",
    "mouthClose", "mouthDimpleLeft", "mouthDimpleRight", "mouthFrownLeft", "mouthFrownRight", "mouthFunnel",
    "mouthLeft", "mouthLowerDownLeft", "mouthLowerDownRight", "mouthPressLeft", "mouthPressRight", "mouthPucker",
    "mouthRight", "mouthRollLower", "mouthRollUpper", "mouthShrugLower", "mouthShrugUpper", "mouthSmileLeft",
    "mouthSmileRight", "mouthStretchLeft", "mouthStretchRight", "mouthUpperUpLeft", "mouthUpperUpRight",
    "noseSneerLeft", "noseSneerRight",
)
# fmt: on


def _both(name: str) -> tuple[str, str]:
    return f"{name}Left", f"{name}Right"


# Action unit → the blendshapes that are averaged for it (ARKit's names; FACS, Ekman and Friesen 1978).
AU_BLENDSHAPES: dict[str, tuple[str, ...]] = {
    "AU1": ("browInnerUp",),
    "AU2": _both("browOuterUp"),
    "AU4": _both("browDown"),
    "AU5": _both("eyeWide"),
    "AU6": _both("cheekSquint"),
    "AU7": _both("eyeSquint"),
    "AU9": _both("noseSneer"),
    "AU10": _both("mouthUpperUp"),
    "AU12": _both("mouthSmile"),
    "AU14": _both("mouthDimple"),
    "AU15": _both("mouthFrown"),
    "AU16": _both("mouthLowerDown"),
    "AU17": ("mouthShrugLower",),
    "AU18": ("mouthPucker",),
    "AU20": _both("mouthStretch"),
    "AU23": ("mouthRollLower", "mouthRollUpper"),
    "AU24": _both("mouthPress"),
    "AU25": ("jawOpen", "mouthClose"),
    "AU26": ("jawOpen",),
    "AU45": _both("eyeBlink"),
    "AU28": ("mouthRollLower",),
}
AU_NAMES = tuple(AU_BLENDSHAPES)

# A speaker's neutral face is the 10th percentile over the clip. What may be subtracted is capped, or a smile held over
# the whole clip would vanish: in clips of neutral speech that percentile is 0.00 (median) to 0.12 (90th percentile of
# the worst unit) for most units, so more than 0.1 is not a neutral face.
_NEUTRAL_PERCENTILE = 10
_NEUTRAL_CAP = 0.1
# For these the landmarker's value has an offset due to the person or the camera (in neutral clips 0.1 to 0.9 for brows,
# 0.1 to 0.4 for lids and jaw), which cannot be distinguished from a held expression in a single clip: no cap.
_OFFSET_UNITS = ("AU1", "AU2", "AU7", "AU25", "AU26")
_MOST_FACES = 4


@dataclass(frozen=True)
class Faces:
    """The tracked face of one clip in T frames; rows of frames without a face are all zero.

    Attributes:
      present: (T,) bool, whether a frame shows the face.
      boxes: (T, 4) float32 x0, y0, x1, y1 in pixels; they may extend beyond the image.
      blendshapes: (T, 52) float32 in 0–1, columns `BLENDSHAPES`.
      pose: (T, 6) float32, rotation about the x, y and z axes in radians, then translation in decimetres, of the
        canonical face model relative to the camera (y up, z towards the viewer).
      several: the number of frames that show more than one face.
    """

    present: np.ndarray
    boxes: np.ndarray
    blendshapes: np.ndarray
    pose: np.ndarray
    several: int


class FaceTracker(contextlib.AbstractContextManager):
    """Tracks one face through the frames of a clip; a context manager that holds MediaPipe's face landmarker.

    The landmarker processes every frame independently and keeps no state between clips, so the result for a clip never
    depends on earlier clips.

    Args:
      model_path: the file `face_landmarker.task`.

    Raises:
      AvjaxError: there is no such file.
    """

    def __init__(self, model_path: str | Path) -> None:
        from mediapipe.tasks.python import BaseOptions, vision

        if not Path(model_path).is_file():
            raise AvjaxError(f"{model_path}: no such file; expected MediaPipe's face_landmarker.task")
        # Video mode gives the same numbers when it detects several faces, but carries state from frame to frame.
        options = vision.FaceLandmarkerOptions(
            base_options=BaseOptions(model_asset_path=str(model_path)),
            running_mode=vision.RunningMode.IMAGE,
            num_faces=_MOST_FACES,
            output_face_blendshapes=True,
            output_facial_transformation_matrixes=True,
        )
        self._landmarker = vision.FaceLandmarker.create_from_options(options)

    def __exit__(self, *exc_info: object) -> None:
        self._landmarker.close()

    def track(self, frames: Frames, before: Faces | None = None) -> Faces:
        """Selects the tracked face in every frame.

        Tracking starts with the largest face and continues with the one that overlaps most with the tracked face of the
        previous frame; if none overlaps, that face is lost and tracking restarts with the largest. If a clip comes in
        parts, `before` holds the faces of the frames right before `frames`.
        """
        results = [self._detect(image) for image in frames.images]
        size = np.array(frames.images.shape[2:0:-1] * 2, np.float32)
        boxes = [_boxes(result) * size for result in results]
        faces = _empty(len(results), several=sum(len(b) > 1 for b in boxes))
        last = before.boxes[-1] if before is not None and before.present[-1] else None
        for t, k in enumerate(follow(boxes, last)):
            if k is not None:
                faces.present[t] = True
                faces.boxes[t] = boxes[t][k]
                faces.blendshapes[t] = [shape.score for shape in results[t].face_blendshapes[k]]
                faces.pose[t] = _pose(results[t].facial_transformation_matrixes[k])
        return faces

    def _detect(self, image: np.ndarray) -> Any:
        import mediapipe

        return self._landmarker.detect(mediapipe.Image(image_format=mediapipe.ImageFormat.SRGB, data=image))


def joined(parts: Sequence[Faces]) -> Faces:
    """Concatenates the faces of consecutive parts of a clip."""
    arrays = (np.concatenate([getattr(p, name) for p in parts]) for name in ("present", "boxes", "blendshapes", "pose"))
    return Faces(*arrays, several=sum(p.several for p in parts))


def follow(boxes: Sequence[np.ndarray], last: np.ndarray | None = None) -> list[int | None]:
    """Selects the tracked face in each frame; see `FaceTracker.track`.

    Args:
      boxes: per frame (K, 4), x0, y0, x1, y1 of its K faces; K may be 0.
      last: the box (4,) of the face tracked in the frame before the first, if any.

    Returns:
      Per frame an index below K, or None if K is 0.
    """
    chosen = []
    for candidates in boxes:
        if len(candidates) == 0:
            chosen.append(None)
            last = None
            continue
        overlaps = np.zeros(len(candidates)) if last is None else _overlap(candidates, last)
        k = int(np.argmax(overlaps if overlaps.any() else _area(candidates)))
        chosen.append(k)
        last = candidates[k]
    return chosen


def crops(frames: Frames, present: np.ndarray, boxes: np.ndarray, size: int = 224, margin: float = 0.25) -> np.ndarray:
    """Crops the tracked face as squares, (T, size, size, 3) uint8 RGB; zeros for frames without a face.

    The square is centred on the face's box; its side is the longer side of the box plus `margin` of it at either end.
    Beyond the image its edge is repeated. `present` (T,) and `boxes` (T, 4) are those of `Faces`.
    """
    out = np.zeros((len(frames.images), size, size, 3), np.uint8)
    for t in np.flatnonzero(present):
        x0, y0, x1, y1 = boxes[t]
        side = max(x1 - x0, y1 - y0) * (1 + 2 * margin)
        out[t] = _square(frames.images[t], ((x0 + x1) / 2, (y0 + y1) / 2), side, size)
    return out


def boxed(frames: Frames, present: np.ndarray, boxes: np.ndarray, size: int, clamped: bool = True) -> np.ndarray:
    """Crops the tracked face to its box, stretched to a square, (T, size, size, 3) uint8 RGB.

    A box that extends beyond the image is clamped to it. Without `clamped`, its rounded corners are used as indices as
    they are, so that a negative one counts from the far side, as in AVT-CA's released preprocessing. Empty crops and
    frames without a face are zeros. `present` (T,) and `boxes` (T, 4) are those of `Faces`.
    """
    import cv2

    out = np.zeros((len(frames.images), size, size, 3), np.uint8)
    for t in np.flatnonzero(present):
        height, width = frames.images.shape[1:3]
        x0, y0, x1, y1 = np.rint(boxes[t]).astype(int)
        if clamped:
            x0, x1 = np.clip((x0, max(x1, x0 + 1)), 0, width)
            y0, y1 = np.clip((y0, max(y1, y0 + 1)), 0, height)
        cut = frames.images[t, y0:y1, x0:x1]
        if cut.size:
            out[t] = cv2.resize(cut, (size, size))
    return out


def action_units(blendshapes: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Computes the intensities of action units on OpenFace's scale 0–5.

    Each is five times the mean of its blendshapes (`AU_BLENDSHAPES`) above the speaker's neutral face. The neutral face
    is estimated from the clip itself: a low percentile, capped where neutral faces are known to be low, so that a held
    smile is kept.

    Args:
      blendshapes: (T, 52), 0–1.
      present: (T,) bool; frames where it is False get zeros.

    Returns:
      (T, len(AU_NAMES)) float32.
    """
    columns = {name: i for i, name in enumerate(BLENDSHAPES)}
    units = np.stack(
        [blendshapes[:, [columns[name] for name in names]].mean(1) for names in AU_BLENDSHAPES.values()], axis=1
    )
    if not present.any():
        return np.zeros(units.shape, np.float32)
    caps = np.where(np.isin(AU_NAMES, _OFFSET_UNITS), np.inf, _NEUTRAL_CAP)
    neutral = np.minimum(np.percentile(units[present], _NEUTRAL_PERCENTILE, axis=0), caps)
    return (np.clip(5 * (units - neutral), 0, 5) * present[:, None]).astype(np.float32)


def _empty(steps: int, several: int) -> Faces:
    zeros = [np.zeros((steps, width), np.float32) for width in (4, len(BLENDSHAPES), 6)]
    return Faces(np.zeros(steps, bool), *zeros, several)


def _boxes(result: Any) -> np.ndarray:
    """Returns the boxes (K, 4) around the landmarks of K faces, relative to the image's width and height."""
    points = [np.array([(p.x, p.y) for p in face], np.float32) for face in result.face_landmarks]
    return np.array([(*p.min(0), *p.max(0)) for p in points], np.float32).reshape(-1, 4)


def _pose(matrix: np.ndarray) -> np.ndarray:
    """Returns the angles and the translation, (6,), of a 4x4 transformation in centimetres."""
    from scipy.spatial.transform import Rotation

    return np.concatenate([Rotation.from_matrix(matrix[:3, :3]).as_euler("xyz"), matrix[:3, 3] / 10])


def _area(boxes: np.ndarray) -> np.ndarray:
    return np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)


def _overlap(boxes: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Computes the intersection over union (K,) of K boxes with one."""
    sides = np.minimum(boxes[:, 2:], box[2:]) - np.maximum(boxes[:, :2], box[:2])
    shared = np.prod(np.maximum(sides, 0), axis=1)
    return shared / (_area(boxes) + _area(box[None]) - shared)


def _square(image: np.ndarray, centre: tuple[float, float], side: float, size: int) -> np.ndarray:
    """Crops the square of `side` pixels around `centre` (x, y) and scales it to (size, size, 3)."""
    import cv2

    side = max(1, round(float(side)))
    # Clamped indices repeat the edge.
    columns, rows = (
        np.clip(round(float(c) - side / 2) + np.arange(side), 0, length - 1)
        for c, length in zip(centre, image.shape[1::-1], strict=True)
    )
    method = cv2.INTER_AREA if side > size else cv2.INTER_LINEAR
    return cv2.resize(image[rows[:, None], columns], (size, size), interpolation=method)
