"""Bundles: all that answering takes of a run, in a folder that can be passed on and is checked before it is used.

    B/model.stablehlo       the answer as a program for JAX alone (`avjax.inference.stablehlo`)
    B/weights.safetensors   its weights
    B/params/               the same as an Orbax checkpoint
    B/caches/               of a run that is read by caches
    B/config.json labels.json provenance.json model_card.md
    B/manifest.json         written last: size and sha256 of every other file, and of itself

The sums tell what was changed by accident or on the way; they do not tell who made a bundle.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict
from rich.console import Console

from avjax import models
from avjax.datasets.metadata import metadata
from avjax.errors import AvjaxError
from avjax.evaluation import predictor as predictors
from avjax.features import extract as extraction
from avjax.inference import model_card, provenance, stablehlo
from avjax.inference import predict as prediction
from avjax.inference import run as runs
from avjax.inference.predict import Prediction
from avjax.inference.run import MANIFEST, WEIGHTS, Run
from avjax.settings import Settings
from avjax.training import run_directory
from avjax.utils.storage import is_local, only_writer, read_json, sha256, write_text

FORMAT = "avjax bundle 1"
PROGRAM, PARAMS = "model.stablehlo", "params"
# Places on the machine that trained: they mean nothing elsewhere.
_PLACES = ("root", "features")


# ---- Writing ------------------------------------------------------------------------------------------------------


def write(workdir: Path, out: Path, fold: str | None = None, seed: int | None = None) -> None:
    """Writes the bundle of a finished run, or of its lanes of `fold` and `seed`, to the new folder `out`, whole.

    Raises:
      AvjaxError: `out` is there already or cannot be written; no finished run at `workdir`, it has no such lanes, or it
        cannot answer for clips of a new speaker; its model has no portable program.
    """
    _check_new(out)
    run = runs.read_run(workdir, fold, seed, new_clips=False)
    settings = run_directory.read_settings(workdir / "config.json")
    runs.check_statistics(workdir, settings)
    weights = stablehlo.weights_of(run)
    exported = stablehlo.exported(run, weights)
    says = provenance.of_run(run, settings, workdir, stablehlo.inputs(exported))
    metrics, known = read_json(workdir / "metrics.json"), metadata(says["dataset"])
    with _whole(out) as folder:
        (folder / PROGRAM).write_bytes(exported.serialize())
        _write_weights(folder, weights)
        run.predictor.save(folder, run.lanes)
        _write_json(folder / "config.json", _placeless(settings))
        _write_json(folder / "labels.json", {"task": run.task, "classes": list(run.classes)})
        _write_json(folder / "provenance.json", says)
        params = jax.tree.map(lambda leaf: leaf[0], run.best["params"])
        write_text(folder / "model_card.md", model_card.markdown(out.name, says, metrics, known, params))
        write_text(folder / MANIFEST, _sealed(FORMAT, _described(folder)))


def _check_new(out: Path) -> None:
    if not is_local(out):
        raise AvjaxError(f"{out}: a bundle is written on this machine; give a folder here, and copy it there")
    if out.exists() or out.is_symlink():
        raise AvjaxError(f"{out}: is there already; give another --out, or remove it")


@contextlib.contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """A folder to write to beside `out`, which becomes `out` when all was written; one that was left by a kill goes."""
    folder = out.absolute().with_name(f".{out.name}.unfinished")
    with only_writer(folder, "give another --out"):
        try:
            for left in folder.iterdir():
                if left.name != ".lock":
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield folder
            (folder / ".lock").unlink()
            folder.rename(out)
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise AvjaxError(f"{out}: cannot be written ({error.strerror or error}); fix that and try again") from error
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


def _write_weights(folder: Path, weights: Mapping[str, np.ndarray]) -> None:
    import orbax.checkpoint as ocp
    from safetensors.numpy import save

    (folder / WEIGHTS).write_bytes(save({name: np.ascontiguousarray(array) for name, array in weights.items()}))
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute() / PARAMS, unflatten_dict(dict(weights), sep="/"))
    # It names the folder where it was written, and nothing reads it on this kind of disk.
    (folder / PARAMS / "commit_success.txt").unlink(missing_ok=True)


def _placeless(settings: Settings) -> dict[str, Any]:
    plain = settings.to_dict()
    return plain | {"data": plain["data"] | dict.fromkeys(_PLACES, "")}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")


# ---- Checking -----------------------------------------------------------------------------------------------------


def check(folder: Path) -> None:
    """Compares every file of a bundle with its manifest.

    Raises:
      AvjaxError: a file is missing, too much, or not what it was; the message names it. Or the manifest is of another
        format, or names what is not in the folder.
    """
    expected, there = _manifest(folder), _files(folder) - {MANIFEST}
    for wrong, what in ((expected.keys() - there, "is missing"), (there - expected.keys(), "does not belong there")):
        if wrong:
            raise AvjaxError(f"{folder}: {min(wrong)} {what}; get the bundle again")
    for name, entry in sorted(expected.items()):
        if _entry(folder / name) != entry:
            raise AvjaxError(f"{folder / name}: has been changed since the bundle was made; get the bundle again")


def _manifest(folder: Path) -> dict[str, Any]:
    """File → what it must be."""
    path = folder / MANIFEST
    try:
        text = path.read_bytes().decode()
        content = json.loads(text)
        made_by, files = content["format"], dict(content["files"])
        if text != _sealed(made_by, files):
            raise ValueError("it has been changed since the bundle was made")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise AvjaxError(f"{path}: cannot be used ({error}); get the bundle again") from error
    if made_by != FORMAT:
        raise AvjaxError(f"{path}: the bundle is a {made_by!r}; this version of avjax reads {FORMAT!r}")
    if leading := [name for name in files if _leads_out(name)]:
        raise AvjaxError(f"{path}: names {leading[0]!r}, which is not in the bundle; do not use it")
    return files


def _leads_out(name: str) -> bool:
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts or str(path) != name


def _files(folder: Path) -> set[str]:
    """The names of all files in and below a folder."""
    found = set()
    for path in folder.rglob("*"):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise AvjaxError(f"{path}: is a link or no file, which a bundle does not have; do not use it")
        if path.is_file():
            found.add(path.relative_to(folder).as_posix())
    return found


def _described(folder: Path) -> dict[str, dict[str, Any]]:
    return {name: _entry(folder / name) for name in sorted(_files(folder) - {".lock"})}


def _entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _sealed(made_by: str, files: Mapping[str, Any]) -> str:
    """The manifest as text: there is just one for its content, so that no byte of it can be another."""
    content = {"files": files, "format": made_by}
    own = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps(content | {"sha256": own}, indent=1, sort_keys=True) + "\n"


# ---- Reading ------------------------------------------------------------------------------------------------------


def read(folder: Path, fold: str | None = None, seed: int | None = None, *, new_clips: bool = True) -> Run:
    """Reads the run out of a bundle, when every file was checked; arguments as of `prediction.read_run`.

    Raises:
      AvjaxError: what `check` raises; it has no such lanes, or, for new clips, was trained on tables.
    """
    check(folder)
    settings = run_directory.read_settings(folder / "config.json")
    if new_clips:
        runs.check_measurable(folder, settings)
    try:
        run = _restored(folder, settings)
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise AvjaxError(f"{folder}: not of this version of avjax (without {error}); export its run again") from error
    return runs.select_lanes(run, folder, fold, seed)


def _restored(folder: Path, settings: Settings) -> Run:
    from safetensors.numpy import load_file

    labels, says = (read_json(folder / f"{name}.json") for name in ("labels", "provenance"))
    tree = unflatten_dict(load_file(folder / WEIGHTS), sep="/")
    lanes = tuple((lane["fold"], lane["seed"]) for lane in says["lanes"])
    model = models.build(settings.model, len(labels["classes"]), labels["task"])
    streams = says["preprocessing"]["streams"]
    return Run(
        name=says["run"],
        dataset=says["title"],
        protocol=says["protocol"],
        classes=tuple(labels["classes"]),
        preset=settings.preset,
        text_source=settings.model.text_source,
        model=model.replace(constants=tree.get("constants", {})),
        best=tree["best"],
        best_head=tree["best_head"],
        stats={stream: (found["mean"], found["std"]) for stream, found in tree.get("stats", {}).items()},
        lanes=lanes,
        made_by=says["features"]["made_by"],
        random=says["random_weights"],
        predictor=predictors.restored(model, folder, lanes),
        streams={name: (tuple(stream["longest"]), stream["dtype"]) for name, stream in streams.items()},
    )


@dataclasses.dataclass(frozen=True)
class Bundle:
    """A bundle that has been read and found whole.

    Attributes:
      folder: where it is; run: what is in it; settings: with which that was trained.
    """

    folder: Path
    run: Run
    settings: Settings

    @property
    def classes(self) -> tuple[str, ...]:
        """What answers are about, in their order."""
        return self.run.classes

    @property
    def lanes(self) -> tuple[tuple[str, int], ...]:
        """(fold, seed) of each lane; an answer is their mean."""
        return self.run.lanes

    def predict(
        self, paths: Iterable[str | os.PathLike], *, clip_seconds: float = extraction.CLIP_SECONDS
    ) -> tuple[list[Prediction], list[tuple[str, str]]]:
        """Answers for files and folders of clips, as `python -m avjax.predict` gives them.

        Args:
          clip_seconds: time limit for measuring one clip.
        Returns:
          the answers, and (file, reason) of each file that cannot be used.
        Raises:
          AvjaxError: a folder has no media files; the bundle is of features from tables; clips are measured otherwise
            now than when it was trained.
        """
        runs.check_measurable(self.folder, self.settings)
        clips = prediction.find_clips(map(os.fspath, paths))
        return prediction.predict(self.run, clips, Console(quiet=True), clip_seconds=clip_seconds)


def load(folder: str | os.PathLike) -> Bundle:
    """Reads a bundle of `avjax.export`.

    Raises:
      AvjaxError: it is not whole, or not what was written; see `check`.
    """
    place = Path(folder)
    return Bundle(place, read(place, new_clips=False), run_directory.read_settings(place / "config.json"))
