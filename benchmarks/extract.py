"""Times feature extraction: all that `avjax.extract` does for a data set, into an empty store.

Loading and compiling the encoders is included, as in a first extraction; downloading weights is not.
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from avjax.encoders import default_dtype
from avjax.features import extract as extraction
from benchmarks import record

KEY = ("benchmark", "dataset", "preset", "weights", "clips", "workers", "dtype", "machine", "cores", "device")
# Seconds of all worker processes added up, and of the process that encodes.
STAGES = ("decoding", "faces", "acoustics", "flow", "encoders", "writing", "packing")
TABLE = {
    "preset": "preset",
    "clips": "clips",
    "seconds_median": "s",
    "clips_per_second": "/s",
    "times_real_time": "× real",
    "decoding_seconds": "decode",
    "faces_seconds": "faces",
    "acoustics_seconds": "acoustics",
    "flow_seconds": "flow",
    "encoders_seconds": "encode",
}


def measure(
    dataset: str, root: str, preset: str, random: bool, repeats: int, say: Callable[[str], None]
) -> dict[str, object]:
    """Extracts `repeats` times, each time into a new store.

    Args:
      dataset: as of `extraction.extract`, like `root`, `preset` and `random`.
      root: folder of the data set.
      preset: name of the preset.
      random: whether the encoders have random weights.
      repeats: number of extractions.
      say: called with progress messages.

    Returns:
      dataset, preset, weights (random or pretrained), dtype (of the encoders), clips, seconds_of_sound, workers,
      repeats, seconds_min, seconds_median, seconds_max, and of the median run (the lower of two) clips_per_second,
      times_real_time and seconds by stage.

    Raises:
      AvjaxError: see `extraction.extract`.
    """
    workers = record.cores()
    runs = []
    for repeat in range(1, repeats + 1):
        runs.append(_timings(dataset, root, preset, random, workers))
        say(f"{preset}, repeat {repeat}/{repeats}: {runs[-1]['seconds']:.1f} s")
    runs.sort(key=lambda run: run["seconds"])
    typical = runs[(len(runs) - 1) // 2]
    return {
        "dataset": dataset,
        "preset": preset,
        "weights": "random" if random else "pretrained",
        "dtype": default_dtype(),
        "clips": typical["clips"],
        "seconds_of_sound": float(typical["seconds_of_sound"]),
        "workers": workers,
        "repeats": repeats,
        "seconds_min": runs[0]["seconds"],
        "seconds_median": typical["seconds"],
        "seconds_max": runs[-1]["seconds"],
        "clips_per_second": typical["clips"] / typical["seconds"],
        "times_real_time": typical["seconds_of_sound"] / typical["seconds"],
        **by_stage(typical["spent"]),
    }


def _timings(dataset: str, root: str, preset: str, random: bool, workers: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        options = extraction.Options(processes=workers)
        store = extraction.extract(dataset, preset, root=root, out=folder, random=random, options=options)
        return json.loads((Path(store) / "timings.json").read_text())


def by_stage(spent: dict[str, float]) -> dict[str, float | str]:
    """Returns `<stage>_seconds` of each of STAGES, "" where missing; `spent` lists encoders by their own names."""
    encoders = sum(seconds for stage, seconds in spent.items() if stage not in STAGES)
    stages = spent | {"encoders": encoders}
    return {f"{stage}_seconds": float(stages[stage]) if stage in stages else "" for stage in STAGES}
