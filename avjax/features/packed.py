"""Reads a packed view clip by clip, for data sets that do not fit into memory."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from avjax.datasets.base import Clip
from avjax.errors import AvjaxError
from avjax.features import store, tfds
from avjax.utils.storage import read_json, write_text

_SCANNED = "avjax_positions.json"  # beside the records


class Packed:
    """The streams of the clips of a packed view, each padded to the longest clip of the set; nothing is cached.

    The first time that a view is opened, all records are read once for their lengths and positions. `clips` determine
    the numbers of the clips; the tokens of `text_source` are the stream `text` ("" = none).

    Attributes:
      longest: the maximum number of steps of a stream, or of a text as `text_<source>`.

    Raises:
      AvjaxError: the view has no such text.
    """

    def __init__(self, root: Path, dataset: str, preset: str, clips: Sequence[Clip], text_source: str) -> None:
        import tensorflow_datasets

        folder = tfds.readable(root, dataset, preset)
        self._source = tensorflow_datasets.builder_from_directory(str(folder)).as_data_source("clips")
        scanned = _scanned(folder, self._source)
        self._positions = [scanned["positions"][clip.id] for clip in clips]
        self.longest = scanned["longest"]
        self._streams = [s for s in store.STREAMS if s in self.longest]
        self._text = text_source
        if text_source and f"text_{text_source}" not in self.longest:
            sources = ", ".join(n.removeprefix("text_") for n in self.longest if n.startswith("text_"))
            raise AvjaxError(f"model.text_source is {text_source!r}; the feature store has {sources}")

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        """Reads clip `i`: `<stream> (longest, …)` and `<stream>_mask (longest,)`, as from `store.stacked`."""
        example = self._source[self._positions[i]]
        out = {}
        for s in self._streams:
            out[s], out[f"{s}_mask"] = _padded(example[s], example[f"{s}_mask"], self.longest[s])
        if self._text:
            tokens = example["text"][self._text]
            longest = self.longest[f"text_{self._text}"]
            out["text"], out["text_mask"] = _padded(tokens, np.ones(len(tokens), bool), longest)
        out["surface"], out["surface_mask"] = example["surface"][None], np.ones(1, bool)
        return out


def shapes(features: store.Features) -> dict[str, tuple[list[int], str]]:
    """Returns the form of each stream: name, as in `Features.arrays`, → (shape of the longest clip, dtype)."""
    held = {name: (list(array.shape[1:]), array.dtype.name) for name, array in features.arrays.items()}
    if not features.packed:
        return held
    steps, longest = tfds.steps(*features.packed), Packed(*features.packed, features.clips, "").longest
    return {name: ([longest[name], *shape], dtype) for name, (shape, dtype) in steps.items()} | held


def _scanned(folder: Path, source: Any) -> dict[str, dict[str, int]]:
    """Returns the position of each clip among the records, and the maximum number of steps of each stream and text."""
    path = folder / _SCANNED
    if not path.is_file():
        positions, longest = {}, {}
        for position in range(len(source)):
            row = source[position]
            positions[row["clip_id"].decode()] = position
            steps = {s: len(row[s]) for s in store.STREAMS if s in row}
            steps |= {f"text_{name}": len(tokens) for name, tokens in row["text"].items()}
            longest = {name: max(1, count, longest.get(name, 1)) for name, count in steps.items()}
        write_text(path, json.dumps({"positions": positions, "longest": longest}))
    return read_json(path)


def _padded(steps: np.ndarray, mask: np.ndarray, longest: int) -> tuple[np.ndarray, np.ndarray]:
    x, real = store.dense([steps], [mask])
    more = longest - x.shape[1]
    return tuple(np.pad(v[0], [(0, more)] + [(0, 0)] * (v.ndim - 2)) for v in (x, real))
