"""Finds `configs/` and `data/` in a checkout and in an installed wheel, and the folders of a user's files."""

import os
from pathlib import Path

from avjax.errors import AvjaxError

_PACKAGE = Path(__file__).resolve().parents[1]
# A wheel has both folders inside the package, a checkout beside it.
_ROOT = _PACKAGE / "_shipped" if (_PACKAGE / "_shipped").is_dir() else _PACKAGE.parent


def path(name: str) -> Path:
    """Returns the path of a shipped file, such as `configs/etg_mafw.py` or `data/mafw.json`.

    Raises:
      AvjaxError: no such file is shipped; the message lists those that are.
    """
    if name not in names():
        raise AvjaxError(f"{name}: no such file; avjax ships {', '.join(names())}")
    return _ROOT / name


def names(*folders: str) -> list[str]:
    """Returns the names of all shipped files in `folders`, by default both."""
    files = (p for folder in folders or ("configs", "data") for p in (_ROOT / folder).rglob("*") if p.is_file())
    return sorted(p.relative_to(_ROOT).as_posix() for p in files if "__pycache__" not in p.parts)


def data_root(dataset: str, given: str = "") -> Path:
    """Returns a data set's folder: `given`, else `$AVJAX_DATA/<corpus>`, by default `~/avjax_data/<corpus>`."""
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("AVJAX_DATA", "~/avjax_data")).expanduser() / dataset.partition(":")[0]


def cache() -> Path:
    """Returns the folder of weights, feature stores and compiled programs: `$AVJAX_CACHE`, else `~/.cache/avjax`."""
    return Path(os.environ.get("AVJAX_CACHE", "~/.cache/avjax")).expanduser()
