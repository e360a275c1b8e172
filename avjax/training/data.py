"""Obtains the features that a configuration trains on: extracts them if need be, or takes those of the demo corpus.

The demo corpus stands in for a data set that cannot be shipped, and only where no path to that data set is given and
none exists: a path that is given and wrong is an error.
"""

import dataclasses
import os
from pathlib import Path

import jax
from rich.console import Console
from rich.panel import Panel

from avjax.datasets import registry
from avjax.errors import AvjaxError, choose
from avjax.features import extract as extraction
from avjax.features import presets, store
from avjax.features.store import Features
from avjax.features.tables import join
from avjax.settings import Settings
from avjax.training import streamed_batches
from avjax.utils import paths

STAND_INS = {"mafw": "demo"}


def obtain(settings: Settings, console: Console) -> Features:
    """Returns the features of the configuration, extracted first if need be, or made from the tables of `tables`.

    Prompts are added where `prompts` asks for them.

    Raises:
      AvjaxError: the data root or the feature store is set and wrong, or the extraction fails.
    """
    features = join.obtain(settings) if settings.tables is not None else _stored(settings, console)
    if settings.prompts is None:
        return features
    from avjax.features import prompts  # imported late: it needs the encoders, which training on features does not

    return prompts.attach(features, settings, console)


def check(settings: Settings) -> None:
    """Checks the names of the data set and the preset.

    Raises:
      AvjaxError: no data set or no preset has that name.
    """
    if settings.tables is None:
        registry.check(settings.dataset)
        presets.preset(settings.preset)
    if settings.prompts is not None and settings.prompts.preset:
        choose("prompts.preset", settings.prompts.preset, presets.PRESETS)


def with_store(settings: Settings, workdir: Path) -> Settings:
    """Returns settings in which a folder data set without a feature store has one in the run directory."""
    if settings.dataset != "folder" or settings.data.features:
        return settings
    data = dataclasses.replace(settings.data, features=str(workdir / "features"))
    return dataclasses.replace(settings, data=data)


def store_of(settings: Settings, dataset: str) -> Path:
    """Returns the path of the feature store of `dataset`: that of the settings, or the demo corpus's own."""
    if dataset not in STAND_INS.values():
        return store.path_of(settings.dataset, settings.data.features)
    from avjax.demo import corpus  # imported late: finished runs and bundles are read without it

    return corpus.folder() / "features"


def _stored(settings: Settings, console: Console) -> Features:
    from avjax.demo import corpus  # imported late, as in `store_of`

    dataset, root, folder = settings.dataset, settings.data.root, store_of(settings, settings.dataset)
    if _stand_in(settings, folder):
        dataset, root, folder = STAND_INS[dataset], str(corpus.folder()), store_of(settings, STAND_INS[dataset])
        console.print(Panel(_banner(settings), title=registry.title(dataset), border_style="yellow"))
        corpus.make(corpus.folder(), console)
    elif root:
        registry.index(dataset, root)  # checks the root even where the features exist
    if not store.is_finished(folder, settings.preset, dataset) and (root or paths.data_root(dataset).is_dir()):
        extraction.extract(dataset, settings.preset, root=root, out=str(folder), random=settings.weights.random)
    # Features that do not exist have no size: `load` raises an error that tells what to do.
    exists = store.is_finished(folder, settings.preset, dataset)
    # Each of several processes reads its own part.
    several = jax.process_count() > 1
    on_disk = exists and (several or streamed_batches.too_large(folder, dataset, settings.preset, settings.data.mode))
    return store.load(folder, settings.preset, dataset, on_disk=on_disk)


def _stand_in(settings: Settings, folder: Path) -> bool:
    if settings.dataset not in STAND_INS or settings.data.root or settings.data.features:
        return False
    given = os.environ.get("AVJAX_DATA")
    if given and not Path(given).expanduser().is_dir():
        raise AvjaxError(f"AVJAX_DATA is {given}, which does not exist; fix it, or unset it for the demo corpus")
    return not paths.data_root(settings.dataset).exists() and not folder.exists()


def _banner(settings: Settings) -> str:
    name, root = settings.dataset.upper(), paths.data_root(settings.dataset)
    return (
        f"No data root is set and {root} does not exist: this run uses synthetic clips in the layout of {name}. They "
        f"show that everything works; their scores mean nothing for {name} or for people.\n"
        f"With the real data: --config.data.root=FOLDER"
    )
