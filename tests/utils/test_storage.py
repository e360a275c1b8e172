"""Files are written atomically, and no temporary files remain."""

import pathlib
import pickle

import numpy as np
import pytest
from etils import epath

from avjax.errors import AvjaxError
from avjax.features import spool
from avjax.utils import storage


def test_a_file_is_replaced_whole_and_folders_are_made(tmp_path):
    path = tmp_path / "new" / "a.txt"
    storage.write_text(path, "one")
    with storage.replacing(path, "w") as file:
        file.write("two")
        file.flush()
        assert path.read_text() == "one"
    assert path.read_text() == "two"
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(TypeError), storage.replacing(path, "wb") as file:
        file.writelines([b"new", None])
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_pile_gives_back_in_blocks_what_was_put_on_it_in_others(tmp_path):
    rows = np.arange(60, dtype=np.float16).reshape(10, 3, 2)
    pile = spool.Spool.create(tmp_path / "new", (3, 2), "float16")
    assert list(pile.blocks(4)) == []
    for part in (rows[:1], rows[:0], rows[1:7], rows[7:]):
        pile.add(part)
    assert [len(block) for block in pile.blocks(4)] == [4, 4, 2]
    np.testing.assert_array_equal(np.concatenate(list(pile.blocks(4))), rows)
    remote = pickle.loads(pickle.dumps(pile))
    np.testing.assert_array_equal(next(remote.blocks(99)), rows)
    pile.discard()
    pile.discard()
    assert not list((tmp_path / "new").iterdir())


def test_a_pile_that_nobody_discards_is_swept_away(tmp_path):
    spool.Spool.create(tmp_path / "room", (1,), "uint8").add(np.ones((3, 1)))
    with storage.only_writer(tmp_path, "wait"):
        assert not list((tmp_path / "room").iterdir())


def test_a_pile_without_room_says_so(tmp_path):
    pile = spool.Spool(pathlib.Path("/dev/full"), (1000,), "float64")
    with pytest.raises(AvjaxError, match="No space left"):
        pile.add(np.ones((9, 1000)))


def test_a_folder_on_cloud_storage_is_filled_with_its_last_file_last(tmp_path, monkeypatch):
    remote, copied = epath.Path(tmp_path / "there"), []
    remote.mkdir()
    (remote / "old.json").write_text("old")
    copy = type(remote).copy
    monkeypatch.setattr(type(remote), "copy", lambda a, b, **how: (copied.append(b.name), copy(a, b, **how)))
    with storage.filled(remote, last="a.html") as local:
        assert (local / "old.json").read_text() == "old"
        (local / "a.html").write_text("done")
        (local / "sub").mkdir()
        (local / "sub" / "z.bin").write_bytes(b"z")
        assert not (remote / "a.html").exists()
    assert copied[-1] == "a.html"
    assert (remote / "sub" / "z.bin").read_bytes() == b"z"
    assert sorted(p.name for p in remote.iterdir()) == ["a.html", "old.json", "sub"]


def test_a_folder_on_this_machine_is_filled_itself(tmp_path):
    with storage.filled(tmp_path, last="a") as local:
        assert local == tmp_path
