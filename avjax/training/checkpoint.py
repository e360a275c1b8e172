"""Training state on disk, by Orbax: written atomically, read back, and restored from the newest intact checkpoint.

A digest of each array is saved with every state, computed where the array lives. It depends neither on the mesh nor on
the number of processes, so a state restored on another machine is known to be bit-identical.
"""

import contextlib
import textwrap
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from avjax.errors import AvjaxError
from avjax.training.sharding import joined
from avjax.utils import multihost, murmur3
from avjax.utils.storage import is_local

DAMAGED = "damaged"  # folder next to the checkpoints, for those that could not be read
REFUSED = "not_finite"  # folder of the run directory, for the state before a step that was not finite
_POSITION = 0x9E3779B1  # odd, near 2^32 over the golden ratio


class Checkpoints:
    """The checkpoints of one run, numbered by the last epoch they include; the newest two are kept.

    A state includes each lane's best parameters so far, so the last checkpoint is enough; the one before it is kept in
    case the last is damaged. A context manager: saving happens in the background, and leaving the context waits for it.
    """

    def __init__(self, folder: Path, warn: Callable[[str], None] = lambda line: None) -> None:
        # Orbax fails later, in a thread, on a relative path.
        self._folder, self._warn = folder.absolute() if is_local(folder) else folder, warn
        options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(self._folder, options=options)
        self._check: _ReadBack | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._manager.close()
        if exc_info[0] is None:
            self._checked()

    def save(self, epoch: int, state: Any) -> None:
        """Starts to write `state`; the arrays may be donated as soon as this returns.

        Raises:
          AvjaxError: the checkpoint before was not written correctly.
        """
        self._checked()
        expected = digests(state)
        self._manager.save(epoch, args=ocp.args.StandardSave(state), custom_metadata={"digests": expected})
        if multihost.is_writer():
            self._check = _ReadBack(self._manager, self._folder / str(epoch), expected)

    def newest(self) -> int | None:
        """Returns the number of the newest checkpoint, None where there is none."""
        return self._manager.latest_step()

    def restore(self, like: Any) -> tuple[int, Any] | None:
        """Restores the newest intact (epoch, state), placed and typed as `like`, or None where nothing was saved.

        A checkpoint that cannot be read, or is not what was saved, is moved to the folder `damaged` with a warning.

        Raises:
          AvjaxError: there are checkpoints, and none is intact.
        """
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        epochs = sorted(self._manager.all_steps(), reverse=True)
        for epoch in epochs:
            state, wrong = self._restored(epoch, shapes)
            if not multihost.agree(bool(wrong)):
                return epoch, state
            self._warn(f"{self._folder / str(epoch)} cannot be used ({wrong}); the checkpoint before it is taken")
            self._set_aside(epoch)
        if epochs:
            raise AvjaxError(
                f"{self._folder}: none of the checkpoints can be read; they are in {self._aside}. Restore a copy, or "
                "choose another --workdir to train anew"
            )
        return None

    def _restored(self, epoch: int, shapes: Any) -> tuple[Any, str]:
        """Returns the state, and what is wrong with it ("" for nothing)."""
        try:
            state = self._manager.restore(epoch, args=ocp.args.StandardRestore(shapes))
            saved = self._manager.metadata(epoch).custom_metadata["digests"]
        except Exception as error:  # Orbax and what lies below it raise errors of many kinds for a damaged file
            return None, f"{type(error).__name__}: {textwrap.shorten(str(error), 160)}"
        return state, difference(saved, digests(state))

    @property
    def _aside(self) -> Path:
        return self._folder.parent / DAMAGED

    def _set_aside(self, epoch: int) -> None:
        with multihost.writer_first():
            if (source := self._folder / str(epoch)).exists():
                self._aside.mkdir(exist_ok=True)
                target = self._aside / f"{self._folder.name}-{epoch}"
                epath.Path(target).rmtree(missing_ok=True)
                source.rename(target)
        self._manager.reload()

    def _checked(self) -> None:
        check, self._check = self._check, None
        if check and (wrong := check.result()):
            raise AvjaxError(
                f"{check.path} was not written correctly ({wrong}): is the disk full or failing? Fix that and run the "
                "same command again; it resumes from the checkpoint before"
            )


@contextlib.contextmanager
def kept_if_refused(folder: Path, epoch: int, state: Any) -> Iterator[None]:
    """Saves `state` in `folder` as a checkpoint of `epoch` if the block raises `AvjaxError`, and raises it again."""
    try:
        yield
    except AvjaxError as error:
        if multihost.is_writer():
            epath.Path(folder).rmtree(missing_ok=True)
        with Checkpoints(folder) as kept:
            kept.save(epoch, state)
        raise AvjaxError(f"{error}. The state before it is in {folder}") from error


class _ReadBack:
    """Reads a checkpoint back, in a thread, when it has been written."""

    def __init__(self, manager: ocp.CheckpointManager, path: Path, expected: Mapping[str, int]) -> None:
        self.path, self._expected, self._wrong = path, expected, ""
        self._thread = threading.Thread(target=self._run, args=(manager,), daemon=True)
        self._thread.start()

    def result(self) -> str:
        """Waits for the check, and returns what is wrong ("" for nothing)."""
        self._thread.join()
        return self._wrong

    def _run(self, manager: ocp.CheckpointManager) -> None:
        try:
            manager.wait_until_finished()
            item = self.path / "default"
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(), **_alone("read_back")) as reader:
                tree = reader.metadata(item).item_metadata.tree
                plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
                restored = reader.restore(item, restore_args=plain)
            self._wrong = difference(self._expected, digests(restored))
        except Exception as error:  # as in `Checkpoints.restore`
            self._wrong = f"{type(error).__name__}: {textwrap.shorten(str(error), 160)}"


def _alone(name: str) -> dict[str, Any]:
    """Returns the options with which Orbax reads in this process alone."""
    me = jax.process_index()
    only = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"{name}_{me}"
    )
    return {"multiprocessing_options": only}


def digests(tree: Any) -> dict[str, int]:
    """Computes path → a digest of all bits of an array and their positions, the same wherever the array lives."""
    values = _digests([leaf for _, leaf in jax.tree_util.tree_leaves_with_path(tree)])
    return dict(zip(_paths(tree), map(int, jax.device_get(values)), strict=True))


def _paths(tree: Any) -> list[str]:
    return [joined(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


@jax.jit
def _digests(leaves: list[jax.Array]) -> list[jax.Array]:
    return [_digest(leaf) for leaf in leaves]


def _digest(array: jax.Array) -> jax.Array:
    """Computes the sum, modulo 2^32, of each element's bits mixed with its position."""
    if jnp.issubdtype(array.dtype, jnp.floating):
        array = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}"))
    bits, position = array.astype(jnp.uint32), jnp.zeros(array.shape, jnp.uint32)
    for axis, length in enumerate(array.shape):
        position = position * jnp.uint32(length) + jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
    return jnp.sum(murmur3.finalise(bits ^ (position * jnp.uint32(_POSITION))), dtype=jnp.uint32)


def difference(saved: Mapping[str, int], restored: Mapping[str, int]) -> str:
    """Names the arrays that differ from what was saved, "" for none; `restored` may hold only some of them."""
    changed = [path for path, digest in restored.items() if saved.get(path) != digest]
    return f"{changed[0]} and {len(changed) - 1} more of {len(restored)} arrays have changed" if changed else ""


def read(folder: Path, *parts: str) -> dict[str, Any]:
    """Reads only `parts` of the newest state in `folder`, as they were saved (optimizer state is twice as large).

    Returns:
      part → its tree of NumPy arrays, on whatever devices they were when saved; tuples come back as lists.

    Raises:
      AvjaxError: there is no checkpoint, it lacks a part, or it is damaged.
    """
    options, handler = ocp.CheckpointManagerOptions(read_only=True), ocp.PyTreeCheckpointHandler()
    try:
        with ocp.CheckpointManager(folder.absolute(), options=options, item_handlers=handler) as manager:
            step = manager.latest_step()
            metadata = None if step is None else manager.item_metadata(step)
            if metadata is None:
                raise FileNotFoundError("there is none, or its metadata are missing")
            saved = metadata.tree
            item = {part: jax.tree.map(_shape, saved[part]) for part in parts}
            plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
            restored = manager.restore(step, args=ocp.args.PyTreeRestore(item, plain, partial_restore=True))
            if wrong := difference(manager.metadata(step).custom_metadata["digests"], digests(restored)):
                raise ValueError(wrong)
            return restored
    except Exception as error:  # Orbax and what lies below it raise errors of many kinds for a damaged file
        reason = textwrap.shorten(str(error), 160)
        raise AvjaxError(
            f"{folder}: no checkpoint can be read ({type(error).__name__}: {reason}); train again, or restore a copy"
        ) from error


def _shape(saved: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(saved.shape, saved.dtype)
