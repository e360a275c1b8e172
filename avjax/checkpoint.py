"""Training state on disk, by Orbax: written whole or not at all, the newest restored."""

import textwrap
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from avjax.errors import AvjaxError


class Checkpoints:
    """The checkpoints of one run, numbered by the last epoch they include; the newest two are kept.

    Saving happens in the background; `close` waits for it. A context manager.
    """

    def __init__(self, folder: Path):
        # Orbax fails later, in a thread, on a relative path.
        options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exc_info) -> None:
        self._manager.close()

    def save(self, epoch: int, state: Any) -> None:
        """Begins to write `state`; the arrays may be donated as soon as this returns."""
        self._manager.save(epoch, args=ocp.args.StandardSave(state))

    def newest(self) -> int | None:
        """The number of the newest checkpoint, None where there is none."""
        return self._manager.latest_step()

    def restore(self, like: Any) -> tuple[int, Any] | None:
        """The newest (epoch, state), placed and typed as `like`, or None where nothing was saved."""
        epoch = self.newest()
        if epoch is None:
            return None
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        return epoch, self._manager.restore(epoch, args=ocp.args.StandardRestore(shapes))


def read(folder: Path, *parts: str) -> dict[str, Any]:
    """Reads `parts` of the newest state in `folder` as they were saved, and nothing else (moments are twice as much).

    Returns:
      part → its tree of NumPy arrays, wherever they were when saved; tuples come back as lists.
    Raises:
      AvjaxError: there is no checkpoint, it lacks a part, or it is damaged.
    """
    options, handler = ocp.CheckpointManagerOptions(read_only=True), ocp.PyTreeCheckpointHandler()
    try:
        with ocp.CheckpointManager(folder.absolute(), options=options, item_handlers=handler) as manager:
            step = manager.latest_step()
            about = None if step is None else manager.item_metadata(step)
            if about is None:
                raise FileNotFoundError("there is none, or its description is gone")
            saved = about.tree
            item = {part: jax.tree.map(_shape, saved[part]) for part in parts}
            plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
            return manager.restore(step, args=ocp.args.PyTreeRestore(item, plain, partial_restore=True))
    except Exception as error:  # Orbax and what lies below it raise errors of many kinds for a damaged file
        reason = textwrap.shorten(str(error), 160)
        raise AvjaxError(
            f"{folder}: no checkpoint can be read ({type(error).__name__}: {reason}); train again, or restore a copy"
        ) from error


def _shape(saved: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(saved.shape, saved.dtype)
