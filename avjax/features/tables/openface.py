"""Reads the tables of OpenFace 2 (Baltrušaitis et al. 2018): the CSV of FeatureExtraction or FaceLandmarkVidMulti."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from avjax.errors import AvjaxError
from avjax.utils import tables

# The action units with an intensity in OpenFace, 0 to 5; one more is only marked as present.
UNITS = tuple(f"AU{n:02d}" for n in (1, 2, 4, 5, 6, 7, 9, 10, 12, 14, 15, 17, 20, 23, 25, 26, 45))
PRESENT = (*UNITS[:-1], "AU28", "AU45")
_POSE = ("pose_Tx", "pose_Ty", "pose_Tz", "pose_Rx", "pose_Ry", "pose_Rz")
_CONFIDENT = 0.5


def openface(path: Path) -> dict[str, np.ndarray]:
    """Reads one clip's table of OpenFace 2; of several faces the one with the highest mean confidence is selected.

    Returns:
      timestamp (t,) seconds, confidence (t,), au (t, 17) intensities of `UNITS`, present (t, 18) of `PRESENT`, pose
      (t, 6): mm and radians; mask (t,): success, a confidence of at least 0.5, and only finite values (others become
      0). Frames without a row of that face are no steps.

    Raises:
      AvjaxError: it is no table, has no frame, or lacks a column.
    """
    columns = tables.read_columns(path)
    parts = {
        "timestamp": ("timestamp",),
        "confidence": ("confidence",),
        "success": ("success",),
        "au": [f"{unit}_r" for unit in UNITS],
        "present": [f"{unit}_c" for unit in PRESENT],
        "pose": _POSE,
    }
    if missing := [name for names in parts.values() for name in names if name not in columns]:
        raise AvjaxError(f"{path}: no column {', '.join(missing)}; expected a table of OpenFace 2 with action units")
    if not columns["frame" if "frame" in columns else "timestamp"]:
        raise AvjaxError(f"{path}: no frame in it")
    made = {part: _floats([columns[name] for name in names]) for part, names in parts.items()}
    if "face_id" in columns:
        shown = _followed(columns["face_id"], made["confidence"][:, 0])
        made = {part: values[shown] for part, values in made.items()}
    finite = np.all([np.isfinite(values).all(-1) for values in made.values()], 0)
    made = {part: np.where(np.isfinite(values), values, 0) for part, values in made.items()}
    mask = finite & (made.pop("success")[:, 0] == 1) & (made["confidence"][:, 0] >= _CONFIDENT)
    return made | {name: made[name][:, 0] for name in ("timestamp", "confidence")} | {"mask": mask}


def _floats(columns: Iterable[Sequence[str]]) -> np.ndarray:
    return np.array([[tables.number(cell) for cell in column] for column in columns], np.float32).T


def _followed(faces: Sequence[str], confidence: np.ndarray) -> np.ndarray:
    """Returns which rows are of the face with the highest mean confidence, the first of equals."""
    faces = np.array([face.strip() for face in faces])
    means = {face: np.nan_to_num(confidence[faces == face]).mean() for face in dict.fromkeys(faces.tolist())}
    return faces == max(means, key=means.get)
