"""Training state on disk, by Orbax: written whole or not at all, the newest restored."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp


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

    def restore(self, like: Any) -> tuple[int, Any] | None:
        """The newest (epoch, state), placed and typed as `like`, or None where nothing was saved."""
        epoch = self._manager.latest_step()
        if epoch is None:
            return None
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        return epoch, self._manager.restore(epoch, args=ocp.args.StandardRestore(shapes))
