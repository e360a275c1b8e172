"""Errors that a user can mend: each says what was got, what was expected and what to do."""


class AvjaxError(Exception):
    """A mistake in the input, the configuration or the set-up; entry points print it as one line and exit with 2."""


class UnusableMedia(AvjaxError):
    """A media file out of which neither picture nor sound can be had; extraction quarantines the clip."""


class Stopped(Exception):
    """A run was told to stop, and has kept its state; the message says where. The same command goes on from there."""
