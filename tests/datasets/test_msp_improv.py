"""MSP-IMPROV, on a miniature of its download and on the clip names of the public lists."""

import gzip
import itertools
from collections import Counter

import pytest

from avjax.datasets import registry
from avjax.datasets.base import Clip
from avjax.datasets.folds import natural_folds
from avjax.errors import AvjaxError
from tests.conftest import REAL

VALUES = ("valence", "arousal", "dominance")


def write(path, content=b"x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def turns():
    """Yields (pair, path without prefix and suffix) of two turns of each of twelve actors."""
    for pair, (gender, turn) in itertools.product(range(1, 7), itertools.product("FM", ("P-FM01", "R-FF01"))):
        yield pair, f"session{pair}/S01A/{turn[0]}/", f"IMPROV-S01A-{gender}0{pair}-{turn}"


# The line of a turn, and lines of single raters, which the reader skips, in no valid encoding.
RATERS = b"xy1; N; A:1.000; V:1.000; D:1.000; \xe9t\xe9\nUTD-rater; A:1;V:1;D:1;\n\n"


def rate(root, lines, name="Evalution.txt"):
    return write(root / "Labels" / name, b"".join(line.encode() + b"\r\n" + RATERS for line in lines))


def line(name, values="A:2.4; V:2.6; D:3.0;"):
    return f"UTD-{name}.avi; N; {values}"


@pytest.fixture
def msp(tmp_path):
    """Makes videos and audio in separate folders, and unrelated files; the second pair's videos are MP4."""
    for pair, folder, name in turns():
        write(tmp_path / "Video" / folder / f"MSP-{name}.{'mp4' if pair == 2 else 'avi'}")
        write(tmp_path / "Audio" / folder / f"MSP-{name}.wav")
    write(tmp_path / "Video/session1/.DS_Store")
    write(tmp_path / "Video/session1/._MSP-IMPROV-S01A-F01-P-FM02.avi")
    write(tmp_path / "Video/session1/MSP-IMPROV-S01A-F07-P-FM02.avi")
    (tmp_path / "Audio/session6/S01A/R/MSP-IMPROV-S01A-M06-R-FF01.wav").unlink()
    rate(tmp_path, [line(name) for *_, name in turns()])
    return tmp_path


def test_values_of_all_turns(msp):
    corpus = registry.index("msp_improv", str(msp))
    assert (corpus.name, corpus.task.kind, corpus.task.classes) == ("msp_improv", "regression", VALUES)
    assert (len(corpus.clips), corpus.rejected, corpus.folds) == (24, (), ())
    name, subfolder = "MSP-IMPROV-S01A-F02-P-FM01", "session2/S01A/P/"
    (clip,) = [c for c in corpus.clips if c.id == name]
    assert clip.label == pytest.approx((0.4, 0.65, 0.5))
    film, wav = msp / f"Video/{subfolder}{name}.mp4", msp / f"Audio/{subfolder}{name}.wav"
    assert clip == Clip(name, film, clip.label, wav, "F02", fold="2", gender="female")
    assert Counter((c.speaker, c.gender) for c in corpus.clips if c.fold == "6") == {
        ("F06", "female"): 2,
        ("M06", "male"): 2,
    }
    assert [c.audio for c in corpus.clips].count(None) == 1


@pytest.mark.parametrize(("kind", "count", "actors"), [("given", 6, {2}), ("speaker", 5, {2, 3})])
def test_folds_of_pairs_and_of_actors(msp, kind, count, actors):
    corpus = registry.index("msp_improv", str(msp))
    folds, _ = natural_folds(corpus.clips, corpus.folds, kind)
    speaker = {c.id: c.speaker for c in corpus.clips}
    tested = [{speaker[i] for i in f.test} for f in folds]
    assert len(folds) == count
    assert {len(who) for who in tested} == actors
    assert sum(map(len, tested)) == len(set.union(*tested)) == 12
    assert kind == "speaker" or all(
        {name[1:] for name in who} == {f"0{f.name}"} for f, who in zip(folds, tested, strict=True)
    )


@pytest.mark.parametrize(
    ("values", "label"),
    [
        ("A:1; V:1; D:1;", (0, 1, 0)),
        ("A:5.000000; V:5.000000; D:5.000000;", (1, 0, 1)),
        ("V:2;A:4;D:3; N:4.2", (0.25, 0.25, 0.5)),
    ],
)
def test_arousal_is_stored_flipped(msp, values, label):
    rate(msp, [line("IMPROV-S01A-F02-P-FM01", values).replace("UTD", "MSP")], "Evaluation.txt")
    (msp / "Labels/Evalution.txt").unlink()
    corpus = registry.index("msp_improv", str(msp))
    assert [c.label for c in corpus.clips] == [pytest.approx(label)]
    assert {reason for _, reason in corpus.rejected} == {"no line in Evalution.txt"}
    assert len(corpus.rejected) == 23


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ("A:0.9; V:2; D:3;", "arousal is 0.9; expected a number from 1 to 5"),
        ("A:2; V:5.1; D:3;", "valence is 5.1; expected a number from 1 to 5"),
        ("A:2; V:2; D:NaN;", "dominance is NaN; expected a number from 1 to 5"),
        ("A:2; V:2;", "dominance is missing; expected a number from 1 to 5"),
        ("A:2; V:; D:3;", "valence is ; expected a number from 1 to 5"),
        ("", "valence is missing; expected a number from 1 to 5"),
    ],
)
def test_ratings_that_are_missing_or_outside_the_scale(msp, values, reason):
    first, *rest = [name for *_, name in turns()]
    rate(msp, [line(first, values), *map(line, rest)])
    corpus = registry.index("msp_improv", str(msp))
    assert corpus.rejected == ((f"MSP-{first}", reason),)
    assert len(corpus.clips) == 23


def test_files_that_are_not_there_or_not_fetched(msp):
    folder = "session1/S01A/P/MSP-IMPROV-S01A"
    (msp / f"Video/{folder}-F01-P-FM01.avi").unlink()
    write(msp / f"Video/{folder}-M01-P-FM01.avi", b"version https://git-lfs.github.com/spec/v1\n")
    rate(
        msp, [line(name) for *_, name in turns()] + [line("IMPROV-S01A-F01-P-FM09"), line("IMPROV-../../x-F01-P-FM09")]
    )
    corpus = registry.index("msp_improv", str(msp))
    assert dict(corpus.rejected) == {
        "MSP-IMPROV-S01A-F01-P-FM01": "no such file",
        "MSP-IMPROV-S01A-F01-P-FM09": "no such file",
        "MSP-IMPROV-S01A-M01-P-FM01": "a Git LFS pointer, not the file: fetch it with git lfs pull",
    }
    assert len(corpus.clips) == 22


def test_nothing_that_can_be_used(msp):
    for film in (msp / "Video").rglob("*.*"):
        film.unlink()
    with pytest.raises(
        AvjaxError, match="none of 24 clips can be used; the first: MSP-IMPROV-S01A-F01-P-FM01: no such"
    ):
        registry.index("msp_improv", str(msp))
    write(msp / "Labels/Evalution.txt")
    with pytest.raises(AvjaxError, match=r"Evalution\.txt: rates no video, and there is none; set --config.data.root"):
        registry.index("msp_improv", str(msp))


def test_real_names(tmp_path):
    """Uses the listed clips of four emotions: the session is the number of the actor's pair."""
    lists = REAL / "dfew_mafw_msp_ravdess_folds/HiCMAE/msp-improv/audio_visual"
    if not lists.is_dir():
        pytest.skip(f"HiCMAE's lists are not at {lists}")
    names = set()
    for path in lists.glob("split*/*.csv.gz"):
        rows = gzip.decompress(path.read_bytes()).decode().splitlines()
        names |= {row.split()[1].partition("audio_16k/")[2].removesuffix(".wav") for row in rows}
    film = write(tmp_path / "film", b"x" * 1000)
    for folder in {name.rpartition("/")[0] for name in names}:
        (tmp_path / folder).mkdir(parents=True)
    for name in names:
        (tmp_path / f"{name}.avi").hardlink_to(film)
    rate(tmp_path, [line(name.rpartition("/MSP-")[2]) for name in sorted(names)])
    corpus = registry.index("msp_improv", str(tmp_path))
    assert (len(corpus.clips), corpus.rejected) == (7787, ())
    assert len({c.speaker for c in corpus.clips}) == 12
    assert all(c.path.relative_to(tmp_path).parts[0] == f"session{c.fold}" for c in corpus.clips)
