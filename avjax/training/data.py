"""From a configuration to the features it trains on: extracted where they are not yet, or those of the demo corpus.

The demo corpus stands in for a data set that cannot be shipped, and only where nothing of that data set is named or
found: a place that is named and wrong is an error.
"""

import os
from pathlib import Path

import jax
from rich.console import Console
from rich.panel import Panel

from avjax.datasets import registry
from avjax.errors import AvjaxError
from avjax.features import extract as extraction
from avjax.features import store
from avjax.features.store import Features
from avjax.features.tables import join
from avjax.training import streamed_batches
from avjax.utils import paths

STAND_INS = {"mafw": "demo"}


def obtain(config, console: Console) -> Features:
    """The features of `config.dataset` with `config.preset`; extracts them first where the data are at hand, or makes
    them of the tables that `config.tables` describes; with prompts where `config.prompts` asks for them.

    Raises:
      AvjaxError: the data root or the feature store is set and wrong, or the extraction fails.
    """
    found = join.obtain(config) if "tables" in config else _stored(config, console)
    if "prompts" not in config:
        return found
    from avjax.features import prompts  # here: it brings the encoders, which training on features does not need

    return prompts.attach(found, config, console)


def store_of(config, dataset: str) -> Path:
    """Finds the feature store of `dataset`: that of `config`, or the demo corpus's own where it stands in."""
    if dataset not in STAND_INS.values():
        return store.place(config.dataset, config.data.features)
    from avjax.demo import corpus  # here: finished runs and bundles are read without it

    return corpus.place() / "features"


def _stored(config, console: Console) -> Features:
    from avjax.demo import corpus  # here: as in `store_of`

    dataset, root, place = config.dataset, config.data.root, store_of(config, config.dataset)
    if _stand_in(config, place):
        dataset, root, place = STAND_INS[dataset], str(corpus.place()), store_of(config, STAND_INS[dataset])
        console.print(Panel(_banner(config), title=registry.title(dataset), border_style="yellow"))
        corpus.make(corpus.place(), console)
    elif root:
        registry.index(dataset, root)  # also where its features are there already
    if not store.is_finished(place, config.preset, dataset) and (root or paths.data_root(dataset).is_dir()):
        extraction.extract(dataset, config.preset, root=root, out=str(place), random=config.weights.random)
    # What is not there yet has no size: `load` says what to do.
    there = store.is_finished(place, config.preset, dataset)
    # Of several processes each reads its part.
    several = jax.process_count() > 1
    on_disk = there and (several or streamed_batches.too_large(place, dataset, config.preset, config.data.mode))
    return store.load(place, config.preset, dataset, on_disk=on_disk)


def _stand_in(config, place: Path) -> bool:
    if config.dataset not in STAND_INS or config.data.root or config.data.features:
        return False
    given = os.environ.get("AVJAX_DATA")
    if given and not Path(given).expanduser().is_dir():
        raise AvjaxError(f"AVJAX_DATA is {given}, and no such folder exists; mend it, or unset it for the demo corpus")
    return not paths.data_root(config.dataset).exists() and not place.exists()


def _banner(config) -> str:
    name, there = config.dataset.upper(), paths.data_root(config.dataset)
    return (
        f"No data root is set and nothing is at {there}: this run uses synthetic clips in the layout of {name}. They "
        f"show that everything works; their figures say nothing about {name} or about people.\n"
        f"With the real data: --config.data.root=FOLDER"
    )
