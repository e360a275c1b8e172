"""Bundles: all that prediction needs of a run, in a folder that can be shared and is checked before it is used.

    B/model.stablehlo       prediction as a program for JAX alone (`avjax.inference.stablehlo`)
    B/weights.safetensors   its weights
    B/params/               the same as an Orbax checkpoint
    B/caches/               of a run that predicts by caches
    B/config.json labels.json provenance.json model_card.md
    B/manifest.json         written last: size and sha256 of every other file, and of itself

The checksums detect accidental changes and damage in transfer; they do not identify who made a bundle.
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
# Folders of the machine that trained: they mean nothing elsewhere.
_FOLDERS = ("root", "features")


# ---- Writing ------------------------------------------------------------------------------------------------------


def write(workdir: Path, out: Path, fold: str | None = None, seed: int | None = None) -> None:
    """Writes the bundle of a finished run, or of its lanes of `fold` and `seed`, to the new folder `out`, or nothing.

    Raises:
      AvjaxError: `out` exists or cannot be written; there is no finished run at `workdir`, it has no such lanes, or it
        cannot predict clips of a new speaker; its model has no portable program.
    """
    _check_new(out)
    run = runs.read_run(workdir, fold, seed, new_clips=False)
    settings = run_directory.read_settings(workdir / "config.json")
    runs.check_statistics(workdir, settings)
    weights = stablehlo.weights_of(run)
    exported = stablehlo.exported(run, weights)
    made = provenance.of_run(run, settings, workdir, stablehlo.inputs(exported))
    metrics, published = read_json(workdir / "metrics.json"), metadata(made["dataset"])
    with _replacing(out) as folder:
        (folder / PROGRAM).write_bytes(exported.serialize())
        _write_weights(folder, weights)
        run.predictor.save(folder, run.lanes)
        _write_json(folder / "config.json", _without_folders(settings))
        _write_json(folder / "labels.json", {"task": run.task, "classes": list(run.classes)})
        _write_json(folder / "provenance.json", made)
        params = jax.tree.map(lambda leaf: leaf[0], run.best["params"])
        write_text(folder / "model_card.md", model_card.markdown(out.name, made, metrics, published, params))
        write_text(folder / MANIFEST, _sealed(FORMAT, _described(folder)))


def _check_new(out: Path) -> None:
    if not is_local(out):
        raise AvjaxError(f"{out}: a bundle is written on this machine; give a local folder, and copy it there")
    if out.exists() or out.is_symlink():
        raise AvjaxError(f"{out}: already exists; give another --out, or remove it")


@contextlib.contextmanager
def _replacing(out: Path) -> Iterator[Path]:
    """Yields a folder beside `out`, which becomes `out` when all is written; remnants of a killed run are removed."""
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
    # It names the folder where it was written, and nothing reads it on a local disk.
    (folder / PARAMS / "commit_success.txt").unlink(missing_ok=True)


def _without_folders(settings: Settings) -> dict[str, Any]:
    plain = settings.to_dict()
    return plain | {"data": plain["data"] | dict.fromkeys(_FOLDERS, "")}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")


# ---- Checking -----------------------------------------------------------------------------------------------------


def check(folder: Path) -> None:
    """Compares every file of a bundle with its manifest.

    Raises:
      AvjaxError: a file is missing, superfluous or changed; or the manifest has another format or names files outside
        the folder.
    """
    expected, actual = _manifest(folder), _files(folder) - {MANIFEST}
    for wrong, what in ((expected.keys() - actual, "is missing"), (actual - expected.keys(), "is not part of it")):
        if wrong:
            raise AvjaxError(f"{folder}: {min(wrong)} {what}; get the bundle again")
    for name, entry in sorted(expected.items()):
        if _entry(folder / name) != entry:
            raise AvjaxError(f"{folder / name}: has been changed since the bundle was made; get the bundle again")


def _manifest(folder: Path) -> dict[str, Any]:
    """Reads the manifest: file → its expected size and sha256."""
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
    """Returns the names of all files in and below a folder."""
    names = set()
    for path in folder.rglob("*"):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise AvjaxError(f"{path}: is a link or a special file, which no bundle contains; do not use it")
        if path.is_file():
            names.add(path.relative_to(folder).as_posix())
    return names


def _described(folder: Path) -> dict[str, dict[str, Any]]:
    return {name: _entry(folder / name) for name in sorted(_files(folder) - {".lock"})}


def _entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _sealed(made_by: str, files: Mapping[str, Any]) -> str:
    """Returns the manifest as text: the only text for its content, so that a change of any byte is detected."""
    content = {"files": files, "format": made_by}
    own = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps(content | {"sha256": own}, indent=1, sort_keys=True) + "\n"


# ---- Reading ------------------------------------------------------------------------------------------------------


def read(folder: Path, fold: str | None = None, seed: int | None = None, *, new_clips: bool = True) -> Run:
    """Checks every file of a bundle and reads its run; arguments as for `run.read_run`.

    Raises:
      AvjaxError: as `check`; it has no such lanes, or, for new clips, was trained on tables.
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

    labels, made = (read_json(folder / f"{name}.json") for name in ("labels", "provenance"))
    tree = unflatten_dict(load_file(folder / WEIGHTS), sep="/")
    lanes = tuple((lane["fold"], lane["seed"]) for lane in made["lanes"])
    model = models.build(settings.model, len(labels["classes"]), labels["task"])
    streams = made["preprocessing"]["streams"]
    return Run(
        name=made["run"],
        dataset=made["title"],
        protocol=made["protocol"],
        classes=tuple(labels["classes"]),
        preset=settings.preset,
        text_source=settings.model.text_source,
        model=model.replace(constants=tree.get("constants", {})),
        best=tree["best"],
        best_head=tree["best_head"],
        stats={stream: (s["mean"], s["std"]) for stream, s in tree.get("stats", {}).items()},
        lanes=lanes,
        made_by=made["features"]["made_by"],
        random=made["random_weights"],
        predictor=predictors.restored(model, folder, lanes),
        streams={name: (tuple(stream["longest"]), stream["dtype"]) for name, stream in streams.items()},
    )


@dataclasses.dataclass(frozen=True)
class Bundle:
    """A bundle that was read and checked.

    Attributes:
      folder: its folder.
      run: the run in it.
      settings: those that the run was trained with.
    """

    folder: Path
    run: Run
    settings: Settings

    @property
    def classes(self) -> tuple[str, ...]:
        """Returns the classes, in the order of predictions."""
        return self.run.classes

    @property
    def lanes(self) -> tuple[tuple[str, int], ...]:
        """Returns (fold, seed) of each lane; a prediction is their mean."""
        return self.run.lanes

    def predict(
        self, paths: Iterable[str | os.PathLike], *, clip_seconds: float = extraction.CLIP_SECONDS
    ) -> tuple[list[Prediction], list[tuple[str, str]]]:
        """Predicts files and folders of clips, like `python -m avjax.predict`.

        Args:
          paths: of files and folders.
          clip_seconds: time limit for measuring one clip.

        Returns:
          the predictions, and (file, reason) of each file that cannot be used.

        Raises:
          AvjaxError: a folder has no media files; the bundle was trained on features from tables, or on features that
            this version measures differently.
        """
        runs.check_measurable(self.folder, self.settings)
        clips = prediction.find_clips(map(os.fspath, paths))
        return prediction.predict(self.run, clips, Console(quiet=True), clip_seconds=clip_seconds)


def load(folder: str | os.PathLike) -> Bundle:
    """Reads a bundle of `avjax.export`.

    Raises:
      AvjaxError: it is incomplete or was changed; see `check`.
    """
    path = Path(folder)
    return Bundle(path, read(path, new_clips=False), run_directory.read_settings(path / "config.json"))
