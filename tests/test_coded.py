"""Corpora whose file names say everything, on miniatures of their downloads."""

from collections import Counter

import pytest

from avjax import datasets
from avjax.datasets.base import Clip, natural_folds
from avjax.errors import AvjaxError

RAVDESS = ("neutral", "calm", "happy", "sad", "angry", "fearful", "disgust", "surprised")
CODES = ("ANG", "DIS", "FEA", "HAP", "NEU", "SAD")
CREMA_D = ("anger", "disgust", "fear", "happiness", "neutral", "sadness")


def write(path, content=b"x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.fixture
def ravdess(tmp_path):
    """All emotions of two actors, and what lies beside them: songs, films without sound, sound alone."""
    for actor in (1, 12):
        folder = tmp_path / f"Actor_{actor:02d}"
        for emotion in range(1, 9):
            for kind in ("01-01", "01-02", "02-01"):
                write(folder / f"{kind}-{emotion:02d}-01-02-01-{actor:02d}.mp4")
            write(folder / f"03-01-{emotion:02d}-01-02-01-{actor:02d}.wav")
    return tmp_path


def test_ravdess(ravdess):
    corpus = datasets.index("ravdess", str(ravdess))
    assert (corpus.name, corpus.task.kind, corpus.task.classes) == ("ravdess", "single", RAVDESS)
    assert len(corpus.clips) == 16, "speech with picture and sound alone"
    assert {c.id[:5] for c in corpus.clips} == {"01-01"}
    assert corpus.clips[5] == Clip(
        "01-01-06-01-02-01-01", ravdess / "Actor_01/01-01-06-01-02-01-01.mp4", "fearful", speaker="01"
    )
    assert [c.label for c in corpus.clips] == [*RAVDESS, *RAVDESS]
    assert Counter(c.speaker for c in corpus.clips) == {"01": 8, "12": 8}
    assert corpus.rejected == corpus.folds == ()
    folds, _ = natural_folds(corpus.clips, (), "speaker")
    assert [len(f.test) for f in folds] == [8, 8]


@pytest.mark.parametrize(
    "name",
    [
        "01-01-09-01-02-01-01.mp4",
        "01-01-00-01-02-01-01.mp4",
        "01-01-03-01-02-01.mp4",
        "01-01-03-01-02-01-01-01.mp4",
        "01-01-03-01-02-01-01 (1).mp4",
        "01-01-03-01-02-01-01.avi",
        "film.mp4",
    ],
)
def test_a_name_that_is_none_of_ravdess_is_passed_over(ravdess, name):
    write(ravdess / "Actor_01" / name)
    corpus = datasets.index("ravdess", str(ravdess))
    assert (len(corpus.clips), corpus.rejected) == (16, ())


def test_a_file_that_cannot_be_read_is_rejected_with_a_reason(ravdess):
    write(ravdess / "Actor_01/01-01-01-01-02-01-01.mp4", b"")
    gone = ravdess / "Actor_12/01-01-01-01-02-01-12.mp4"
    gone.unlink()
    gone.symlink_to("nowhere.mp4")
    corpus = datasets.index("ravdess", str(ravdess))
    assert len(corpus.clips) == 14
    assert corpus.rejected == (
        ("01-01-01-01-02-01-01", "an empty file"),
        ("01-01-01-01-02-01-12", "no such file"),
    )
    assert corpus.task.classes == RAVDESS


def test_a_second_copy_of_a_clip_is_rejected(ravdess):
    write(ravdess / "Video_Speech_Actor_01/Actor_01/01-01-03-01-02-01-01.mp4")
    corpus = datasets.index("ravdess", str(ravdess))
    assert len(corpus.clips) == 16
    assert corpus.rejected == (("01-01-03-01-02-01-01", "duplicate clip id: another file has this name"),)


@pytest.fixture
def crema_d(tmp_path):
    """All emotions of two actors and two clips that lists of faulty ones name; sound beside all films but one."""
    names = [f"{actor}_DFA_{emotion}_XX" for actor in (1001, 1091) for emotion in CODES]
    names += ["1076_MTI_NEU_XX", "1064_IEO_DIS_MD", "1040_ITH_SAD_X", "1001_IEO_HAP_LO", "1001_IEO_HAP_HI"]
    for name in names:
        write(tmp_path / "VideoFlash" / f"{name}.flv")
        write(tmp_path / "AudioWAV" / f"{name}.wav")
    (tmp_path / "AudioWAV/1091_DFA_SAD_XX.wav").unlink()
    return tmp_path


def test_crema_d(crema_d):
    corpus = datasets.index("crema_d", str(crema_d))
    clips = {c.id: c for c in corpus.clips}
    assert (corpus.name, corpus.task.kind, corpus.task.classes) == ("crema_d", "single", CREMA_D)
    assert len(clips) == 17
    assert [clips[f"1091_DFA_{e}_XX"].label for e in CODES] == list(CREMA_D)
    name = "1076_MTI_NEU_XX"
    film, sound = crema_d / f"VideoFlash/{name}.flv", crema_d / f"AudioWAV/{name}.wav"
    assert clips[name] == Clip(name, film, "neutral", audio=sound, speaker="1076")
    assert (clips["1064_IEO_DIS_MD"].label, clips["1064_IEO_DIS_MD"].speaker) == ("disgust", "1064")
    assert (clips["1040_ITH_SAD_X"].label, clips["1001_IEO_HAP_HI"].label) == ("sadness", "happiness")
    assert clips["1091_DFA_SAD_XX"].audio is None, "the sound of the film"
    assert corpus.rejected == corpus.folds == ()


def test_films_of_crema_d_that_are_no_clips(crema_d):
    for name in ("1001_DFA_ANG", "1001_DFA_JOY_XX", "1001_DFA_ANG_XXX", "101_DFA_ANG_XX", "notes"):
        write(crema_d / "VideoFlash" / f"{name}.flv")
    write(crema_d / "VideoFlash/1001_DFA_ANG_XX.flv", b"")
    corpus = datasets.index("crema_d", str(crema_d))
    assert len(corpus.clips) == 16
    assert corpus.rejected == (("1001_DFA_ANG_XX", "an empty file"),)


@pytest.mark.parametrize(
    ("name", "lacking"), [("ravdess", "no Actor_01/01-01-….mp4"), ("crema_d", "no VideoFlash/1001_DFA_ANG_XX.flv")]
)
def test_a_folder_without_such_files_says_what_was_expected(tmp_path, name, lacking):
    write(tmp_path / "VideoFlash/film.flv")
    with pytest.raises(AvjaxError, match=f"{tmp_path}: {lacking}; set --config.data.root"):
        datasets.index(name, str(tmp_path))
