"""Files appear whole or not at all, and nothing is left beside them."""

import pytest

from avjax import files


def test_a_file_is_replaced_whole_and_folders_are_made(tmp_path):
    path = tmp_path / "new" / "a.txt"
    files.write_text(path, "one")
    with files.replacing(path, "w") as file:
        file.write("two")
        file.flush()
        assert path.read_text() == "one"
    assert path.read_text() == "two"
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(TypeError), files.replacing(path, "wb") as file:
        file.writelines([b"new", None])
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
