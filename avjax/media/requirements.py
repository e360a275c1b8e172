"""The packages that reading media takes."""

import importlib.util

from avjax.errors import AvjaxError

PACKAGES = ("av", "mediapipe", "pebble")  # of avjax[media], without which nothing can be measured


def need_media() -> None:
    """Raises AvjaxError where packages are missing that reading media takes."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise AvjaxError(f"extraction needs {', '.join(missing)}; install with: pip install 'avjax[media]'")
