"""Files of caches: round trips, and files that lie."""

import dataclasses
import io
import zipfile

import numpy as np
import pytest

from avjax.errors import AvjaxError
from avjax.evaluation import fewshot_cache as caching
from avjax.evaluation.fewshot_cache import Cache, load, save
from tests.evaluation.test_fewshot_cache import filled, same


@pytest.mark.parametrize("entries", [0, 9])
def test_a_file_gives_back_every_bit(entries, tmp_path):
    cache = dataclasses.replace(filled(entries), alpha={"video": 0.1, "audio": 1 / 3}, origin="Lauf ä 1")
    save(cache, tmp_path / "new" / "cache.npz")
    assert same(load(tmp_path / "new" / "cache.npz"), cache)
    save(filled(4), tmp_path / "new" / "cache.npz")
    assert same(load(tmp_path / "new" / "cache.npz"), filled(4))


class Trap:
    def __reduce__(self):
        return exec, ("raise SystemExit('unpickled')",)


def packed(**changes) -> bytes:
    """A cache's file with other members; None leaves one out."""
    file = io.BytesIO()
    members = {**members_of(filled()), **changes}
    np.savez(file, **{k: v for k, v in members.items() if v is not None})
    return file.getvalue()


def members_of(cache: Cache) -> dict[str, np.ndarray]:
    return {
        "format": np.array("avjax cache 1"),
        "classes": np.array(cache.classes),
        "text": cache.text,
        "ids": np.array(cache.ids),
        "label": cache.label,
        "modalities": np.array(cache.modalities),
        "keys": np.stack(list(cache.keys.values())),
        "alpha": np.array(list(cache.alpha.values())),
        "beta": np.array(cache.beta),
        "origin": np.array(cache.origin),
    }


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


KEYS = np.stack(list(filled().keys.values()))
HOSTILE = {
    "pickle": (lambda: packed(ids=np.array([Trap()] * 9, object)), "not a readable cache.*allow_pickle"),
    "truncated": (lambda: packed()[:-200], "BadZipFile"),
    "half": (lambda: packed()[: len(packed()) // 2], "BadZipFile"),
    "damaged": (lambda: packed().replace(KEYS.tobytes(), (KEYS * 0.9).tobytes()), "CRC"),
    "empty": (lambda: b"", "BadZipFile"),
    "text": (lambda: b"a,b\n1,2\n", "BadZipFile"),
    "npy": (lambda: npy(np.eye(3)), "BadZipFile"),
    "other npz": (lambda: packed(format=None), "not 'avjax cache 1'"),
    "other format": (lambda: packed(format=np.array("avjax cache 2")), "not 'avjax cache 1'"),
    "missing": (lambda: packed(label=None), "label is missing or of another kind"),
    "dtype": (lambda: packed(keys=np.float64(KEYS)), "keys is missing or of another kind"),
    "axes": (lambda: packed(keys=KEYS[0]), "keys is missing or of another kind"),
    "structured": (lambda: packed(beta=np.zeros((), "f8,f8")), "beta is missing or of another kind"),
    "shape": (lambda: packed(keys=KEYS[:, :8]), r"features of video are \(8, 6\)"),
    "modalities": (lambda: packed(keys=KEYS[:1]), "damaged"),
    "length": (lambda: packed(keys=KEYS * np.float32(1.1)), "length 1.1"),
    "nan": (lambda: packed(keys=KEYS * np.float32(np.nan)), "length nan"),
    "label": (lambda: packed(label=np.full(9, 3, np.int32)), "integers from 0 to 2"),
    "order": (lambda: packed(ids=np.array(filled().ids[::-1])), "not sorted"),
    "twice": (lambda: packed(ids=np.array(["c0"] * 9)), "comes twice"),
    "beta": (lambda: packed(beta=np.array(np.inf)), "beta inf"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_files_that_are_no_caches_are_refused(case, tmp_path):
    make, match = HOSTILE[case]
    path = tmp_path / "cache.npz"
    path.write_bytes(make())
    with pytest.raises(AvjaxError, match=match) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_a_file_that_swells_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(caching, "_UNPACKED", 1 << 20)
    path = tmp_path / "cache.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("keys.npy", bytes((1 << 20) + 1))
    assert path.stat().st_size < 2000
    with pytest.raises(AvjaxError, match="1048577 bytes when unpacked, above 1048576"):
        load(path)


def test_files_of_the_test_are_good_but_for_their_change(tmp_path):
    (tmp_path / "cache.npz").write_bytes(packed())
    assert same(load(tmp_path / "cache.npz"), filled())


def test_a_file_that_is_not_there_or_cannot_be_written(tmp_path):
    with pytest.raises(AvjaxError, match="FileNotFoundError"):
        load(tmp_path / "none.npz")
    (tmp_path / "file").write_text("")
    with pytest.raises(AvjaxError, match="cannot be written"):
        save(filled(), tmp_path / "file" / "cache.npz")


def test_every_truncation_is_refused(tmp_path):
    content, path = packed(), tmp_path / "cache.npz"
    for size in range(0, len(content), 97):
        path.write_bytes(content[:size])
        with pytest.raises(AvjaxError):
            load(path)
