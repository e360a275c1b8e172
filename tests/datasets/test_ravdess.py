"""RAVDESS, on miniatures of its download."""

import gzip
import itertools
from collections import Counter

import pytest

from avjax.datasets import registry
from avjax.datasets.base import Clip
from avjax.datasets.folds import natural_folds
from avjax.errors import AvjaxError
from tests.conftest import REAL

CLASSES = ("neutral", "calm", "happy", "sad", "angry", "fearful", "disgust", "surprised")
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123456\n"


def write(path, content=b"x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.fixture
def ravdess(tmp_path):
    """Makes all emotions of two actors, and unrelated files: songs, videos without audio, audio, files of macOS."""
    for actor in (1, 12):
        folder = tmp_path / f"Actor_{actor:02d}"
        for emotion in range(1, 9):
            for kind in ("01-01", "01-02", "02-01", "._01-01"):
                write(folder / f"{kind}-{emotion:02d}-01-02-01-{actor:02d}.mp4")
            write(folder / f"03-01-{emotion:02d}-01-02-01-{actor:02d}.wav")
        write(folder / ".DS_Store")
    write(tmp_path / ".Trash/01-01-01-01-01-01-07.mp4")
    return tmp_path


def test_ravdess(ravdess):
    corpus = registry.index("ravdess", str(ravdess))
    assert (corpus.name, corpus.task.kind, corpus.task.classes) == ("ravdess", "single", CLASSES)
    assert len(corpus.clips) == 16, "only speech with video and audio"
    assert {c.id[:5] for c in corpus.clips} == {"01-01"}
    assert corpus.clips[5] == Clip(
        "01-01-06-01-02-01-01",
        ravdess / "Actor_01/01-01-06-01-02-01-01.mp4",
        "fearful",
        speaker="01",
        gender="male",
        transcript="Dogs are sitting by the door",
    )
    assert [c.label for c in corpus.clips] == [*CLASSES, *CLASSES]
    assert Counter((c.speaker, c.gender) for c in corpus.clips) == {("01", "male"): 8, ("12", "female"): 8}
    assert corpus.rejected == corpus.folds == ()
    folds, _ = natural_folds(corpus.clips, (), "speaker")
    assert [len(f.test) for f in folds] == [8, 8]


def takes():
    """Yields the names of all speech clips without modality: neutral has one intensity, all others two."""
    for actor, emotion, level, statement, again in itertools.product(range(1, 25), range(1, 9), (1, 2), (1, 2), (1, 2)):
        if emotion > 1 or level == 1:
            yield f"01-{emotion:02d}-{level:02d}-{statement:02d}-{again:02d}-{actor:02d}"


@pytest.mark.parametrize("folder", ["Actor_{}", "ACTOR{}", "Video_Speech_Actor_{0}/Actor_{0}"])
def test_all_of_ravdess(tmp_path, folder):
    for take in takes():
        actor = folder.format(take[-2:])
        write(tmp_path / actor / f"01-{take}.{'MP4' if take.endswith('24') else 'mp4'}")
        write(tmp_path / actor / f"02-{take}.mp4")
        write(tmp_path / "Audio_Speech_Actors_01-24" / f"Actor_{take[-2:]}" / f"03-{take}.wav")
    corpus = registry.index("ravdess", str(tmp_path))
    assert (len(corpus.clips), len({c.id for c in corpus.clips}), corpus.rejected) == (1440, 1440, ())
    assert Counter(c.label for c in corpus.clips) == {name: 96 if name == "neutral" else 192 for name in CLASSES}
    assert Counter(c.gender for c in corpus.clips) == {"male": 720, "female": 720}
    assert Counter(c.transcript[:4] for c in corpus.clips) == {"Kids": 720, "Dogs": 720}
    assert {c.audio for c in corpus.clips} == {None}


def test_video_and_audio_in_two_files_are_one_clip(ravdess):
    folder = ravdess / "Actor_12"
    for take in ("01-03-01-02-01-12", "01-04-01-02-01-12"):
        (folder / f"01-{take}.mp4").unlink()
    (folder / "03-01-04-01-02-01-12.wav").unlink()
    corpus = registry.index("ravdess", str(ravdess))
    (pair,) = [c for c in corpus.clips if c.audio]
    assert (pair.id, pair.label) == ("02-01-03-01-02-01-12", "happy")
    assert (pair.path, pair.audio) == (folder / f"{pair.id}.mp4", folder / f"03{pair.id[2:]}.wav")
    assert len(corpus.clips) == 15, "a video without audio is not a clip"
    pair.audio.write_bytes(POINTER)
    ((name, reason),) = registry.index("ravdess", str(ravdess)).rejected
    assert (name, reason[:36]) == (pair.id, "its audio file: a Git LFS pointer, n")


def test_real_list_of_ravdess(tmp_path):
    lists = REAL / "dfew_mafw_msp_ravdess_folds/HiCMAE/ravdess/audio_visual"
    if not lists.is_dir():
        pytest.skip(f"HiCMAE's lists are not at {lists}")
    for path in lists.glob("split*/test.csv.gz"):
        for line in gzip.decompress(path.read_bytes()).decode().splitlines():
            frames, wav, _ = line.split()
            write(tmp_path / "Video" / f"{frames.split('/')[-1]}.mp4")
            write(tmp_path / "Audio" / wav.split("/")[-1])
    corpus = registry.index("ravdess", str(tmp_path))
    assert (len(corpus.clips), len({c.audio for c in corpus.clips}), corpus.rejected) == (1440, 1440, ())
    assert {c.id[3:] for c in corpus.clips} == {*takes()}


@pytest.mark.parametrize(
    "name",
    [
        "01-01-09-01-02-01-01.mp4",
        "01-01-00-01-02-01-01.mp4",
        "01-01-03-01-03-01-01.mp4",
        "01-01-03-01-02-01.mp4",
        "01-01-03-01-02-01-01-01.mp4",
        "01-01-03-01-02-01-01 (1).mp4",
        "01-01-03-01-02-01-01.avi",
        "film.mp4",
    ],
)
def test_a_name_that_is_none_of_ravdess_is_passed_over(ravdess, name):
    write(ravdess / "Actor_01" / name)
    corpus = registry.index("ravdess", str(ravdess))
    assert (len(corpus.clips), corpus.rejected) == (16, ())


def test_a_file_that_cannot_be_read_is_rejected_with_a_reason(ravdess):
    write(ravdess / "Actor_01/01-01-01-01-02-01-01.mp4", b"")
    gone = ravdess / "Actor_12/01-01-01-01-02-01-12.mp4"
    gone.unlink()
    gone.symlink_to("nowhere.mp4")
    corpus = registry.index("ravdess", str(ravdess))
    assert len(corpus.clips) == 14
    assert corpus.rejected == (
        ("01-01-01-01-02-01-01", "an empty file"),
        ("01-01-01-01-02-01-12", "no such file"),
    )
    assert corpus.task.classes == CLASSES


def test_a_second_copy_of_a_clip_is_rejected(ravdess):
    write(ravdess / "Video_Speech_Actor_01/Actor_01/01-01-03-01-02-01-01.mp4")
    corpus = registry.index("ravdess", str(ravdess))
    assert len(corpus.clips) == 16
    assert corpus.rejected == (("01-01-03-01-02-01-01", "duplicate clip id: another file has this name"),)


def test_a_clone_without_its_large_files_says_so(ravdess):
    for path in ravdess.rglob("01-01*.mp4"):
        path.write_bytes(POINTER)
    with pytest.raises(AvjaxError, match=r"none of 16 clips can be used; the first: 01-.*: a Git LFS pointer, not the"):
        registry.index("ravdess", str(ravdess))
