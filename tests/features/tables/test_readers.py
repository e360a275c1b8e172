"""Arrays of files and of folders."""

import numpy as np
import pytest

from avjax.errors import AvjaxError
from avjax.features.tables import readers


def test_a_folder_of_arrays(tmp_path):
    np.save(tmp_path / "one.npy", np.arange(3))
    np.save(tmp_path / "two.npy", np.ones((4, 3)))
    (tmp_path / "three").mkdir()
    for name, value in (("00010", [2, 2]), ("00002", [1, 1])):
        np.save(tmp_path / "three" / f"{name}.npy", value)
    assert readers.frames(tmp_path / "one.npy").tolist() == [0, 1, 2]
    assert readers.frames(tmp_path / "two.npy").tolist() == [[1] * 3] * 4
    assert readers.frames(tmp_path / "three").tolist() == [[1, 1], [2, 2]]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.array([{}], object), "expected an .npy of numbers"),
        (np.array(["a"]), "expected numbers"),
        (np.zeros((2, 2, 2)), r"\(2, 2, 2\); expected numbers, \(d,\) or \(steps, d\)"),
    ],
)
def test_what_is_no_array_of_numbers_is_a_clear_error(tmp_path, value, message):
    np.save(tmp_path / "a.npy", value, allow_pickle=True)
    with pytest.raises(AvjaxError, match=message):
        readers.frames(tmp_path / "a.npy")


@pytest.mark.parametrize("frames", [{}, {"1": [1, 2], "2": [1, 2, 3]}, {"1": np.ones((2, 3))}])
def test_frames_of_a_clip_are_vectors_of_one_length(tmp_path, frames):
    (tmp_path / "clip").mkdir()
    for name, value in frames.items():
        np.save(tmp_path / "clip" / name, value)
    with pytest.raises(AvjaxError, match="expected one vector for each frame, all as long"):
        readers.frames(tmp_path / "clip")
