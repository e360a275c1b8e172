"""Arrays passed between processes on disk."""

import dataclasses
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from avjax.errors import AvjaxError


@dataclasses.dataclass
class Spool:
    """Arrays of equal shape in a file that one process fills and another reads.

    Of a long clip, memory thus holds only the block in use.

    Attributes:
      path: its file, which `only_writer` removes if nobody discards it.
      shape, dtype: of one array.
      count: number of arrays in it.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: str
    count: int = 0

    @classmethod
    def create(cls, folder: Path, shape: tuple[int, ...], dtype: str) -> "Spool":
        """Creates an empty spool in a file of its own in `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".pile-", suffix=".part", dir=folder)
        os.close(handle)
        return cls(Path(name), shape, dtype)

    def add(self, arrays: np.ndarray) -> None:
        """Appends arrays (n, *shape).

        Raises:
          AvjaxError: the disk is full.
        """
        try:
            with self.path.open("ab") as file:
                file.write(np.ascontiguousarray(arrays, self.dtype).tobytes())
        except OSError as error:
            folder = self.path.parent
            raise AvjaxError(f"{folder}: cannot be written ({error.strerror}); fix that and start again") from error
        self.count += len(arrays)

    def blocks(self, most: int) -> Iterator[np.ndarray]:
        """Yields its arrays in order, (n, *shape) with n up to `most`."""
        if self.count:
            arrays = np.memmap(self.path, self.dtype, "r", shape=(self.count, *self.shape))
            for at in range(0, self.count, most):
                yield np.array(arrays[at : at + most])

    def discard(self) -> None:
        """Removes its file."""
        self.path.unlink(missing_ok=True)
