"""CMU-MOSEI in the format of the CMU Multimodal SDK (Zadeh et al. 2018): HDF5 files of full videos → utterances.

CMU_MOSEI_Labels.csd                  All Labels/data/<video>/features (n, 7), intervals (n, 2) in seconds
CMU_MOSEI_TimestampedWordVectors.csd  text: 300 numbers for each word
CMU_MOSEI_COVAREP.csd                 audio: 74 numbers, a hundred times a second
CMU_MOSEI_VisualFacet42.csd           vision: 35 numbers for each frame; or CMU_MOSEI_VisualOpenFace2.csd, 713
CMU_MOSEI_TimestampedWords.csd        the words, for transcripts; optional
cmu_mosei_std_folds.py                the official parts by video, of the SDK's code; read, never run
"""

import ast
import contextlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from avjax.errors import AvjaxError

EMOTIONS = ("happy", "sad", "anger", "surprise", "disgust", "fear")
MOST_STEPS = 50  # of an utterance in a stream, as in MMSA's files
_LABELS = ("sentiment", *EMOTIONS)
_FOLDS = "cmu_mosei_std_folds.py"
_WORDS = "CMU_MOSEI_TimestampedWords.csd"
# Stream → the files that may hold it; the first that exists is used.
_STREAMS = {
    "text": ("CMU_MOSEI_TimestampedWordVectors.csd",),
    "audio": ("CMU_MOSEI_COVAREP.csd",),
    "vision": ("CMU_MOSEI_VisualFacet42.csd", "CMU_MOSEI_VisualOpenFace2.csd"),
}
BESIDE = (_FOLDS, _WORDS, *(name for names in _STREAMS.values() for name in names))


def read(labels: Path) -> dict[str, list]:
    """Reads the utterances of all videos: column → one value per utterance.

    An utterance is an interval of the labels. Its steps are those whose middle lies in it; more than 50 are averaged
    over 50 equal windows, without empty ones. Non-finite numbers (COVAREP has −inf) become 0.

    Args:
      labels: CMU_MOSEI_Labels.csd; the other files are in the same folder.

    Returns:
      id ("video$_$n", n from 0 in the order of time), part ("train", "valid", "test", "" in none), raw_text, sentiment,
      the `EMOTIONS`, 0 to 3, and text, audio and vision (steps, d) float32.

    Raises:
      AvjaxError: a file is missing or of another layout.
    """
    folder, columns = labels.parent, defaultdict(list)
    part = official(folder / _FOLDS)
    with contextlib.ExitStack() as files:
        labelled = _sequences(files, _first_existing(folder, (labels.name,)))
        streams = {stream: _sequences(files, _first_existing(folder, names)) for stream, names in _STREAMS.items()}
        timed_words = _sequences(files, folder / _WORDS) if (folder / _WORDS).is_file() else {}
        width = {stream: next(iter(videos.values()))["features"].shape[1] for stream, videos in streams.items()}
        for video, group in labelled.items():
            label, times = _arrays(folder, video, group)
            if label.shape[1] != len(_LABELS):
                raise AvjaxError(f"{labels}: {video} has labels {label.shape}; expected (n, {len(_LABELS)})")
            arrays = {s: _arrays(folder, video, videos[video]) for s, videos in streams.items() if video in videos}
            words = _arrays(folder, video, timed_words[video]) if video in timed_words else None
            for turn, i in enumerate(np.argsort(times[:, 0], kind="stable")):
                steps = {s: _steps(*arrays[s], times[i]) if s in arrays else np.zeros((0, d), np.float32)
                         for s, d in width.items()}  # fmt: skip
                row = dict(zip(_LABELS, label[i], strict=True)) | steps
                row |= {
                    "id": f"{video}$_${turn}",
                    "part": part.get(video, ""),
                    "raw_text": _transcript(words, times[i]),
                }
                for name, value in row.items():
                    columns[name].append(value)
    return dict(columns)


def official(path: Path) -> dict[str, str]:
    """Reads video → "train", "valid" or "test" from the three lists in the SDK's file.

    Raises:
      AvjaxError: there is no such file, or it lacks one of the lists.
    """
    names = {f"standard_{part}_fold": part for part in ("train", "valid", "test")}
    lists: dict[str, Sequence[str]] = {}
    try:
        for node in ast.parse(_first_existing(path.parent, (path.name,)).read_text(encoding="utf-8")).body:
            target = node.targets[0] if isinstance(node, ast.Assign) else None
            if isinstance(target, ast.Name) and target.id in names:
                lists[names[target.id]] = ast.literal_eval(node.value)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise AvjaxError(f"{path}: {error}; expected the lists {', '.join(names)}") from error
    if missing := [name for name, part in names.items() if part not in lists]:
        raise AvjaxError(f"{path}: no list {', '.join(missing)}; take the file of the CMU Multimodal SDK")
    return {video: part for part, videos in lists.items() for video in videos}


def _first_existing(folder: Path, names: Sequence[str]) -> Path:
    if not (paths := [folder / name for name in names if (folder / name).is_file()]):
        raise AvjaxError(f"{folder}: no {' and no '.join(names)}; it comes with the CMU Multimodal SDK")
    return paths[0]


def _sequences(files: contextlib.ExitStack, path: Path) -> Mapping[str, Any]:
    """Returns video → its group, of a file with one sequence that stays open as long as `files`."""
    import h5py

    try:
        file = files.enter_context(h5py.File(path))
    except OSError as error:
        raise AvjaxError(f"{path}: {error}; expected an HDF5 file of the CMU Multimodal SDK") from error
    for group in file.values():
        if "data" in group and len(group["data"]):
            return group["data"]
    raise AvjaxError(f"{path}: no videos in it; expected <name>/data/<video> of the CMU Multimodal SDK")


def _arrays(folder: Path, video: str, group: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Reads features (n, d) and intervals (n, 2)."""
    shapes = [group[name].shape if name in group else None for name in ("features", "intervals")]
    if None in shapes or len(shapes[0]) != 2 or shapes[1] != (shapes[0][0], 2):
        shapes_text = " and ".join(map(str, shapes))
        raise AvjaxError(
            f"{folder}: {video} has {shapes_text}; expected features (n, d) and intervals (n, 2) everywhere"
        )
    return group["features"][()], group["intervals"][()]


def _inside(times: np.ndarray, interval: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns which steps have their middle in the interval, and its relative position there, 0 to 1."""
    middle, (start, end) = times.mean(-1), interval
    inside = (middle >= start) & (middle < end)
    return inside, (middle[inside] - start) / (end - start) if inside.any() else middle[inside]


def _steps(features: np.ndarray, times: np.ndarray, interval: np.ndarray) -> np.ndarray:
    inside, position = _inside(times, interval)
    x = features[inside].astype(np.float32)
    x = np.where(np.isfinite(x), x, 0)
    if len(x) <= MOST_STEPS:
        return x
    window = np.minimum((position * MOST_STEPS).astype(int), MOST_STEPS - 1)
    sums, count = np.zeros((MOST_STEPS, x.shape[1])), np.bincount(window, minlength=MOST_STEPS)
    np.add.at(sums, window, x)
    return (sums[count > 0] / count[count > 0, None]).astype(np.float32)


def _transcript(words: tuple[np.ndarray, np.ndarray] | None, interval: np.ndarray) -> str:
    """Joins the words of the interval; "sp" denotes a pause."""
    if words is None:
        return ""
    features, times = words
    tokens = [
        word.decode() if isinstance(word, bytes) else str(word) for word in features[_inside(times, interval)[0], 0]
    ]
    return " ".join(word for word in tokens if word != "sp")
