"""Packages required for reading media."""

import importlib.util

from avjax.errors import AvjaxError

PACKAGES = ("av", "mediapipe", "pebble")  # of avjax[media]; extraction needs all of them


def need_media() -> None:
    """Raises AvjaxError if packages for reading media are missing."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise AvjaxError(f"extraction needs {', '.join(missing)}; install with: pip install 'avjax[media]'")
