"""The registry of data sets: name → a function that indexes its folder."""

from pathlib import Path

from avjax import assets
from avjax.datasets import folder, mafw
from avjax.datasets.base import Corpus, Index
from avjax.errors import AvjaxError

REGISTRY: dict[str, Index] = {"folder": folder.index, "mafw": mafw.index}


def index(name: str, root: str = "") -> Corpus:
    """Indexes data set `name` at `root`, by default `$AVJAX_DATA/<name>`.

    Raises:
      AvjaxError: no data set has that name, the root does not exist, or its layout is another.
    """
    if name not in REGISTRY:
        raise AvjaxError(f"dataset is {name!r}; the registry has {', '.join(sorted(REGISTRY))}")
    place = Path(root).expanduser() if root else assets.data_root(name)
    if not place.is_dir():
        raise AvjaxError(f"{place}: no such folder; set --config.data.root to where the {name} data are")
    return REGISTRY[name](place)
