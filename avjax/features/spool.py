"""Arrays that wait on disk between processes."""

import dataclasses
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from avjax.errors import AvjaxError


@dataclasses.dataclass
class Spool:
    """Arrays of equal shape put on one pile on disk, for one process to fill and another to read: of a long clip
    memory then holds only what is worked on.

    Attributes:
      path: its file, which `only_writer` clears away if nobody discards it.
      shape, dtype: of one array; count: how many are on it.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: str
    count: int = 0

    @classmethod
    def create(cls, folder: Path, shape: tuple[int, ...], dtype: str) -> "Spool":
        """An empty one, in a file of its own in `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".pile-", suffix=".part", dir=folder)
        os.close(handle)
        return cls(Path(name), shape, dtype)

    def add(self, arrays: np.ndarray) -> None:
        """Puts arrays (n, *shape) on it.

        Raises:
          AvjaxError: there is no room.
        """
        try:
            with self.path.open("ab") as file:
                file.write(np.ascontiguousarray(arrays, self.dtype).tobytes())
        except OSError as error:
            folder = self.path.parent
            raise AvjaxError(f"{folder}: cannot be written ({error.strerror}); fix that and start again") from error
        self.count += len(arrays)

    def blocks(self, most: int) -> Iterator[np.ndarray]:
        """What is on it, from the first on, (n, *shape) with n up to `most`."""
        if self.count:
            arrays = np.memmap(self.path, self.dtype, "r", shape=(self.count, *self.shape))
            for at in range(0, self.count, most):
                yield np.array(arrays[at : at + most])

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)
