"""The registry of data sets: name → a function that indexes its folder."""

import dataclasses
from pathlib import Path

from avjax.datasets import crema_d, dfew, folder, java_sed, mafw, meld, msp_improv, ravdess
from avjax.datasets.base import Corpus, Index
from avjax.errors import AvjaxError, choose
from avjax.utils import paths, tables


def _demo(root: Path) -> Corpus:
    columns = tables.read_columns(root / "speakers.csv")
    speakers = dict(zip(columns["clip"], columns["speaker"], strict=True))
    corpus = mafw.index(root)
    clips = tuple(dataclasses.replace(clip, speaker=speakers[clip.id]) for clip in corpus.clips)
    return dataclasses.replace(corpus, name="demo", clips=clips)


REGISTRY: dict[str, Index] = {
    "crema_d": crema_d.intended,
    "crema_d:crowd": crema_d.crowd,
    "crema_d:soft": crema_d.soft,
    "demo": _demo,
    "dfew": dfew.index,
    "folder": folder.index,
    "java_sed": java_sed.index,
    "mafw": mafw.index,
    "mafw:compound": mafw.compound,
    "meld": meld.index,
    "msp_improv": msp_improv.index,
    "ravdess": ravdess.index,
}


# Titles in tables and figures; every other data set has its name there.
_TITLES = {"demo": "demo corpus (synthetic), not MAFW"}


def title(name: str) -> str:
    """Returns the title of data set `name` for tables and figures."""
    return _TITLES.get(name, name)


def check(name: str) -> None:
    """Raises an AvjaxError if no data set has that name."""
    choose("dataset", name, sorted(REGISTRY))


def index(name: str, root: str = "") -> Corpus:
    """Indexes data set `name` at `root`, by default `$AVJAX_DATA/<corpus>`.

    Raises:
      AvjaxError: no data set has that name, the root does not exist, or its layout is different.
    """
    check(name)
    path = paths.data_root(name, root)
    if not path.is_dir():
        raise AvjaxError(f"{path}: no such folder; set --config.data.root to where the {name} data are")
    return REGISTRY[name](path)
