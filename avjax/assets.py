"""Finds `configs/` and `data/` in a checkout and in an installed wheel, and the places where a user's files live."""

import os
from pathlib import Path

from avjax.errors import AvjaxError

_PACKAGE = Path(__file__).resolve().parent
# A wheel ships both folders inside the package; in a checkout they stand beside it.
_ROOTS = (_PACKAGE / "_shipped", _PACKAGE.parent)


def path(name: str) -> Path:
    """Returns the path of a shipped file or folder, such as `configs/etg_mafw.py` or `data/mafw.json`.

    Raises:
      AvjaxError: no such file is shipped; the message lists its neighbours.
    """
    for root in _ROOTS:
        if (root / name).exists():
            return root / name
    folder = Path(name).parts[0] if Path(name).parts else ""
    neighbours = sorted(p.name for root in _ROOTS for p in (root / folder).glob("*") if p.is_file())
    raise AvjaxError(f"{name}: no such file; avjax ships these in {folder or '.'}/: {', '.join(neighbours) or 'none'}")


def data_root(dataset: str) -> Path:
    """The default place of a data set: `$AVJAX_DATA/<dataset>`, else `~/avjax_data/<dataset>`."""
    return Path(os.environ.get("AVJAX_DATA", "~/avjax_data")).expanduser() / dataset


def cache() -> Path:
    """Where weights, feature stores and compiled programs are kept: `$AVJAX_CACHE`, else `~/.cache/avjax`."""
    return Path(os.environ.get("AVJAX_CACHE", "~/.cache/avjax")).expanduser()
