"""avjax: audio-visual emotion recognition in JAX and Flax."""

from pathlib import Path
from typing import TYPE_CHECKING

from avjax.utils.version import VERSION as __version__

if TYPE_CHECKING:
    from avjax.inference.bundle import Bundle

__all__ = ["__version__", "load"]


def load(folder: str | Path) -> "Bundle":
    """Reads a bundle of `avjax.export` (see `avjax.inference.bundle.load`).

    Example:
      >>> load(bundle_folder).classes  # of a bundle that `python -m avjax.export` wrote
      ('class0', 'class1', 'class2')
    """
    from avjax.inference import bundle  # imported late: most imports of avjax need only a part of it

    return bundle.load(folder)
