"""Java-SED, on a miniature of its repository and on real clips."""

from collections import Counter

import pytest

from avjax.datasets import registry
from avjax.datasets.base import Clip
from tests.conftest import REAL

CLASSES = ("neutral", "sad", "happy", "surprised", "fearful", "angry")


@pytest.fixture
def clone(tmp_path):
    """Makes all 240 clips, and unrelated files."""
    folder = tmp_path / "dataset-resize"
    folder.mkdir()
    (tmp_path / ".git/lfs").mkdir(parents=True)
    names = [f"{a:02d}-{s:02d}-{e:02d}_01" for a in range(1, 11) for s in range(1, 5) for e in range(1, 7)]
    for name in (*names, "._01-01-01_01", "01-01-07_01", "01-01-01", "demo"):
        (folder / f"{name}.mp4").write_bytes(b"x")
    (tmp_path / ".git/lfs/01-01-01_01.mp4").write_bytes(b"x")
    (folder / ".DS_Store").write_bytes(b"x")
    return tmp_path


def test_java_sed(clone):
    corpus = registry.index("java_sed", str(clone))
    assert (corpus.name, corpus.task.kind, corpus.task.classes) == ("java_sed", "single", CLASSES)
    assert (len(corpus.clips), corpus.rejected, corpus.folds) == (240, (), ())
    path = clone / "dataset-resize/06-02-04_01.mp4"
    assert next(c for c in corpus.clips if c.path == path) == Clip(
        "06-02-04_01", path, "surprised", speaker="06", gender="male"
    )
    assert Counter(c.label for c in corpus.clips) == dict.fromkeys(CLASSES, 40)
    genders = {c.speaker: c.gender for c in corpus.clips}
    assert list(genders.values()) == ["female"] * 5 + ["male"] * 5


def test_real_clips(java_sed):
    corpus = registry.index("java_sed", str(REAL / "java_sed_open"))
    assert (len(corpus.clips), corpus.rejected) == (96, ())
    assert Counter(c.label for c in corpus.clips) == dict.fromkeys(CLASSES, 16)
    table = registry.index("folder", str(java_sed))
    assert {c.path: (c.label, c.speaker) for c in corpus.clips} == {c.path: (c.label, c.speaker) for c in table.clips}
