"""The run directory: its files, written so that a kill loses nothing, and the check that it belongs to this run.

W/config.json environment.json protocol.json metrics.jsonl checkpoints/ events.*    during the run
W/predictions.npz metrics.json confusion.png curves.png report.html   when it is finished; report.html last
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from avjax import tasks
from avjax.errors import AvjaxError
from avjax.features.packed import shapes
from avjax.features.store import Features
from avjax.settings import Settings
from avjax.utils.storage import is_local, only_writer, read_json, write_text
from avjax.utils.version import VERSION

# Keys that do not change what is computed: data and machine may differ when a run is resumed.
_PLACES = re.compile(r"data\.(root|features|mode)$|train\.(save_steps|remat)$|mesh\.|processes\.")


def default(settings: Settings, stand_in: str = "") -> Path:
    """Returns `runs/<config>-<variants>`, and `-<data set>` where another one stands in for the configuration's."""
    return Path("runs") / "-".join(filter(None, [settings.name, *settings.variants.split(","), stand_in]))


def read_settings(path: Path) -> Settings:
    """Reads the `config.json` of a run or bundle.

    Raises:
      AvjaxError: it cannot be read, or is not of this version of avjax.
    """
    plain = read_json(path)
    try:
        settings = Settings.of(plain)
    except AvjaxError as error:
        raise AvjaxError(f"{path}: not of this version of avjax ({error}); train again") from error
    if missing := {k for k in _flat(settings.to_dict()) if not _PLACES.match(k)} - _flat(plain).keys():
        raise AvjaxError(f"{path}: not of this version of avjax (without {min(missing)!r}); train again")
    return settings


def is_finished(workdir: Path) -> bool:
    """Returns whether the run is finished: its report is written last."""
    return (workdir / "report.html").is_file()


@contextlib.contextmanager
def held(workdir: Path, writes: bool) -> Iterator[None]:
    """Locks `workdir` for the process that `writes`, and removes files that a killed process left half-written.

    Raises:
      AvjaxError: another run is writing to it, or nothing can be written.
    """
    with only_writer(workdir, "choose another --workdir") if writes else contextlib.nullcontext():
        yield


def begin(workdir: Path, settings: Settings, features: Features) -> None:
    """Claims `workdir` for a run that trains on `features`, or checks that it holds this very run.

    Raises:
      AvjaxError: the directory holds a run of another configuration, or of other features.
    """
    new = {k: v for k, v in _flat(settings.to_dict()).items() if not _PLACES.match(k)}
    path = workdir / "config.json"
    if path.is_file():
        old = {k: v for k, v in _flat(read_json(path)).items() if not _PLACES.match(k)}
        new_plain = json.loads(json.dumps(new))
        changed = [
            f"{k}: was {old.get(k)!r}, is {new_plain.get(k)!r}"
            for k in sorted({*old, *new_plain})
            if old.get(k) != new_plain.get(k)
        ]
        was = read_json(workdir / "environment.json")["features"]
        if was["content"] != features.content:
            changed.append("the features have changed since it started")
        if changed:
            raise AvjaxError(
                f"{workdir} holds another run ({'; '.join(changed)}); choose another --workdir or remove it"
            )
        return
    made = {"content": features.content, "made_by": features.made_by, "random": features.random}
    made |= {"streams": shapes(features)}
    write_text(workdir / "environment.json", json.dumps(environment() | {"features": made}, indent=1))
    write_text(path, json.dumps(settings.to_dict(), indent=1))


def environment() -> dict[str, object]:
    """Returns the versions of packages and the devices, for `environment.json`."""
    import jax

    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scikit-learn", "transformers")
    return {
        "avjax": VERSION,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "devices": [f"{d.platform}:{d.device_kind}" for d in jax.devices()],
        "packages": {n: importlib.metadata.version(n) for n in names},
    }


def read_history(workdir: Path, upto: int) -> list[dict]:
    """Reads the rows of `metrics.jsonl` up to epoch `upto`; later epochs were lost when the run was killed."""
    path = workdir / "metrics.jsonl"
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:  # a line cut short by a kill: its epoch is not in a checkpoint
            break
    return [r for r in rows if r["epoch"] <= upto]


def write_history(workdir: Path, rows: Iterable[Mapping]) -> None:
    """Writes `metrics.jsonl` atomically, one line per epoch and lane."""
    write_text(workdir / "metrics.jsonl", "".join(json.dumps(r) + "\n" for r in rows))


def mean_over_lanes(rows: Sequence[Mapping]) -> list[dict[str, float]]:
    """Returns one row per epoch, with each score averaged over the lanes that were still training."""
    by_epoch: dict[int, list[Mapping]] = {}
    for row in rows:
        by_epoch.setdefault(row["epoch"], []).append(row)
    out = []
    for epoch, group in sorted(by_epoch.items()):
        names = [k for k in group[0] if k.startswith(("train_", "val_"))]
        out.append({"epoch": epoch} | {k: float(np.mean([g[k] for g in group if k in g])) for k in names})
    return out


def progress(rows: Sequence[Mapping], epochs: int, lanes: int, seconds: float, task: str) -> str:
    """Describes the newest epoch in one line, averaged over the lanes in training; `seconds`: what the call took."""
    last = mean_over_lanes(rows)[-1]
    going = sum(r["epoch"] == last["epoch"] for r in rows)
    name = tasks.SCORINGS[task].picks
    val = f", val {tasks.SCORINGS[task].names[name]} {100 * last[f'val_{name}']:.1f}" if f"val_{name}" in last else ""
    return (
        f"epoch {last['epoch']}/{epochs}: train loss {last['train_loss']:.3f}{val}; "
        f"{going} of {lanes} lanes training; {seconds:.1f} s"
    )


class Log:
    """The history of a run: `metrics.jsonl`, and TensorBoard event files, which are rewritten when a run resumes.

    Attributes:
      rows: of all epochs; those up to the epoch `done` were read back.

    Args:
      workdir: of the run.
      done: last epoch in a checkpoint.
      writes: whether this process writes the files.
    """

    def __init__(self, workdir: Path, done: int, writes: bool) -> None:
        self.rows = read_history(workdir, done)
        self._workdir, self._writes = workdir, writes
        # No event files on cloud storage: its objects cannot be appended to.
        self._has_events = writes and is_local(workdir)
        self._writer = None
        self._picked = {f"val_{scoring.picks}" for scoring in tasks.SCORINGS.values()}

    def add(self, rows: Sequence[Mapping]) -> None:
        """Adds rows; event files get each score's mean over lanes, and each lane's score that validation selects by."""
        before, self.rows = self.rows, [*self.rows, *rows]
        if self._writes:
            write_history(self._workdir, self.rows)
        if self._has_events:
            if self._writer is None:
                self._open()
                self._add_events(before)
            self._add_events(rows)

    def _open(self) -> None:
        # Imported late, after the first epochs: the package may take seconds to import.
        from tensorboardX import SummaryWriter

        for old in self._workdir.glob("events.*"):
            old.unlink()
        self._writer = SummaryWriter(str(self._workdir))

    def _add_events(self, rows: Sequence[Mapping]) -> None:
        for row in mean_over_lanes(rows):
            for name in row.keys() - {"epoch"}:
                self._writer.add_scalar(name.replace("_", "/", 1), row[name], row["epoch"])
        for row in rows:
            for name in row.keys() & self._picked:
                self._writer.add_scalar(f"{name}/fold {row['fold']} seed {row['seed']}", row[name], row["epoch"])
        self._writer.flush()

    def close(self) -> None:
        """Closes the event files."""
        if self._writer:
            self._writer.close()


def _flat(tree: Mapping, prefix: str = "") -> dict[str, object]:
    out: dict[str, object] = {}
    for key, value in tree.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return out
