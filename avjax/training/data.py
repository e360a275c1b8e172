"""From a configuration to the features it trains on: extracted where they are not yet, or those of the demo corpus.

The demo corpus stands in for a data set that cannot be shipped, and only where nothing of that data set is named or
found: a place that is named and wrong is an error.
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
    """Gives the features of the data set with the preset: extracts them first where the data are available, or makes
    them of the tables that `tables` describes; with prompts where `prompts` asks for them.

    Raises:
      AvjaxError: the data root or the feature store is set and wrong, or the extraction fails.
    """
    found = join.obtain(settings) if settings.tables is not None else _stored(settings, console)
    if settings.prompts is None:
        return found
    from avjax.features import (
        prompts,  # imported late: it brings the encoders, which training on features does not need
    )

    return prompts.attach(found, settings, console)


def check(settings: Settings) -> None:
    """Checks the names of data set and preset.

    Raises:
      AvjaxError: there is no data set, or no preset, of that name.
    """
    if settings.tables is None:
        registry.check(settings.dataset)
        presets.preset(settings.preset)
    if settings.prompts is not None and settings.prompts.preset:
        choose("prompts.preset", settings.prompts.preset, presets.PRESETS)


def with_store(settings: Settings, workdir: Path) -> Settings:
    """Gives a folder data set whose feature store is not named one of its own, in the run directory."""
    if settings.dataset != "folder" or settings.data.features:
        return settings
    named = dataclasses.replace(settings.data, features=str(workdir / "features"))
    return dataclasses.replace(settings, data=named)


def store_of(settings: Settings, dataset: str) -> Path:
    """Finds the feature store of `dataset`: that of the settings, or the demo corpus's own where it stands in."""
    if dataset not in STAND_INS.values():
        return store.place(settings.dataset, settings.data.features)
    from avjax.demo import corpus  # imported late: finished runs and bundles are read without it

    return corpus.place() / "features"


def _stored(settings: Settings, console: Console) -> Features:
    from avjax.demo import corpus  # imported late: as in `store_of`

    dataset, root, place = settings.dataset, settings.data.root, store_of(settings, settings.dataset)
    if _stand_in(settings, place):
        dataset, root, place = STAND_INS[dataset], str(corpus.place()), store_of(settings, STAND_INS[dataset])
        console.print(Panel(_banner(settings), title=registry.title(dataset), border_style="yellow"))
        corpus.make(corpus.place(), console)
    elif root:
        registry.index(dataset, root)  # also where its features are there already
    if not store.is_finished(place, settings.preset, dataset) and (root or paths.data_root(dataset).is_dir()):
        extraction.extract(dataset, settings.preset, root=root, out=str(place), random=settings.weights.random)
    # What is not there yet has no size: `load` says what to do.
    there = store.is_finished(place, settings.preset, dataset)
    # Of several processes each reads its part.
    several = jax.process_count() > 1
    on_disk = there and (several or streamed_batches.too_large(place, dataset, settings.preset, settings.data.mode))
    return store.load(place, settings.preset, dataset, on_disk=on_disk)


def _stand_in(settings: Settings, place: Path) -> bool:
    if settings.dataset not in STAND_INS or settings.data.root or settings.data.features:
        return False
    given = os.environ.get("AVJAX_DATA")
    if given and not Path(given).expanduser().is_dir():
        raise AvjaxError(f"AVJAX_DATA is {given}, and no such folder exists; fix it, or unset it for the demo corpus")
    return not paths.data_root(settings.dataset).exists() and not place.exists()


def _banner(settings: Settings) -> str:
    name, there = settings.dataset.upper(), paths.data_root(settings.dataset)
    return (
        f"No data root is set and nothing is at {there}: this run uses synthetic clips in the layout of {name}. They "
        f"show that everything works; their figures say nothing about {name} or about people.\n"
        f"With the real data: --config.data.root=FOLDER"
    )
