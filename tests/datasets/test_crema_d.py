"""CREMA-D, intended emotions and the crowd's, on a miniature of its download and on the real lists and votes."""

import csv
import gzip
from collections import Counter

import pytest

from avjax.datasets import crema_d as reader
from avjax.datasets import registry
from avjax.datasets.base import Clip
from avjax.datasets.folds import natural_folds
from avjax.datasets.metadata import metadata
from avjax.errors import AvjaxError
from tests.conftest import REAL

CODES = ("ANG", "DIS", "FEA", "HAP", "NEU", "SAD")
CLASSES = ("anger", "disgust", "fear", "happiness", "neutral", "sadness")
FIRST, LAST = ("1001", "1019", "1037", "1055", "1073"), ("1018", "1036", "1054", "1072", "1091")
BROKEN = ["1040_ITH_SAD_XX", "1064_IEO_DIS_MD", "1064_TIE_SAD_XX", "1076_MTI_NEU_XX", "1076_MTI_SAD_XX"]
VOTES = REAL / "cremad_labels_splits"


def write(path, content="x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def media(root, name):
    write(root / "VideoFlash" / f"{name}.flv")
    write(root / "AudioWAV" / f"{name}.wav")


@pytest.fixture
def crema_d(tmp_path):
    """Makes all emotions of each block's first and last actor, faulty clips, and audio for all videos but one."""
    for name in [f"{actor}_DFA_{code}_XX" for actor in FIRST + LAST for code in CODES] + BROKEN[1:]:
        media(tmp_path, name)
    for name in ("1001_IEO_HAP_LO", "1001_IEO_HAP_HI", "1040_ITH_SAD_X", "._1001_DFA_ANG_XX"):
        media(tmp_path, name)
    (tmp_path / "AudioWAV/1091_DFA_SAD_XX.wav").unlink()
    write(tmp_path / "VideoFlash/.DS_Store")
    write(
        tmp_path / "VideoDemographics.csv",
        '"ActorID","Age","Sex","Race"\r\n1001,51,"Male",""\r\n1018,25,"Female",""\r\n1091,29,,""\r\n',
    )
    return tmp_path


def test_intended_emotions(crema_d):
    corpus = registry.index("crema_d", str(crema_d))
    clips = {c.id: c for c in corpus.clips}
    assert (corpus.name, corpus.task.kind, corpus.task.classes) == ("crema_d", "single", CLASSES)
    assert len(clips) == 62
    name = "1018_DFA_NEU_XX"
    film, wav = crema_d / f"VideoFlash/{name}.flv", crema_d / f"AudioWAV/{name}.wav"
    assert clips[name] == Clip(name, film, "neutral", wav, "1018", "Don't forget a jacket", fold="1", gender="female")
    assert [clips[f"1091_DFA_{e}_XX"].label for e in CODES] == list(CLASSES)
    assert clips["1001_IEO_HAP_HI"].transcript == "It's eleven o'clock"
    assert [clips[f"{a}_DFA_ANG_XX"].gender for a in ("1001", "1019", "1091")] == ["male", None, None]
    assert clips["1091_DFA_SAD_XX"].audio is None, "the audio of the video"
    assert sorted(name for name, _ in corpus.rejected) == BROKEN, "one of which is called 1040_ITH_SAD_X on the disk"
    assert dict(corpus.rejected) == dict(metadata("crema_d").broken)


def test_folds_are_five_blocks_of_actors(crema_d):
    corpus = registry.index("crema_d", str(crema_d))
    folds, how = natural_folds(corpus.clips, corpus.folds, "given")
    assert ([f.name for f in folds], how) == (["1", "2", "3", "4", "5"], "5 given folds")
    actors = {c.id: c.speaker for c in corpus.clips}
    assert [{actors[i] for i in f.test} for f in folds] == [{*pair} for pair in zip(FIRST, LAST, strict=True)]


@pytest.mark.parametrize(
    "name",
    [
        "1001_DFA_ANG",
        "1001_DFA_JOY_XX",
        "1001_DFA_ANG_XXX",
        "101_DFA_ANG_XX",
        "1092_DFA_ANG_XX",
        "1001_ABC_ANG_XX",
        "a",
    ],
)
def test_films_that_are_no_clips(crema_d, name):
    write(crema_d / "VideoFlash" / f"{name}.flv")
    assert len(registry.index("crema_d", str(crema_d)).clips) == 62


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("VideoFlash/1001_DFA_ANG_XX.flv", b"", "an empty file"),
        ("VideoFlash/1001_DFA_ANG_XX.flv", b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer, not"),
        ("AudioWAV/1001_DFA_ANG_XX.wav", b"version https://git-lfs.github.com/spec/v1\n", "its audio file: a Git LFS"),
    ],
)
def test_files_that_cannot_be_read(crema_d, file, content, reason):
    write(crema_d / file, content)
    corpus = registry.index("crema_d", str(crema_d))
    assert len(corpus.clips) == 61
    assert dict(corpus.rejected)["1001_DFA_ANG_XX"].startswith(reason)


# ---- the crowd -------------------------------------------------------------------------------------------------------

HEADER = "FileName,angry,sad,disgust,fear,neutral,happy,SpkrID,Gender,Split_Set"
# Clip → votes in the order of the header.
SOFT = {
    "1001_DFA_ANG_XX": "0.856,0.01,0.01,0.104,0.01,0.01",
    "1001_IEO_HAP_LO": "1,0,0,0,2,5",
    "1018_DFA_SAD_XX": "0.1,0.2,0,0,0.7,0",
    "1076_MTI_SAD_XX": "0,0.6,0,0,0.4,0",
    "1091_DFA_FEA_XX": "0,0,0.4,0.6,0,0",
}
PARTS = ["Train", "Train", "Development", "Test", "Test"]


def partition(root, i, rows, folder="labels", name="label_consensus_{}.csv"):
    table = [HEADER, *(f"{n}.wav,{soft},{n[:4]},Male,{part}" for n, soft, part in rows)]
    return write(root / folder / name.format(i), "\n".join(table))


def listed(part_of=PARTS, soft=SOFT):
    return [(name, soft[name], part) for name, part in zip(soft, part_of, strict=True)]


@pytest.fixture
def crowd(crema_d):
    for i in range(1, 6):
        partition(crema_d, i, listed(PARTS if i < 5 else PARTS[::-1]))
    write(crema_d / "labels/labels_consensus_1.csv", "of another corpus")
    return crema_d


def test_what_the_crowd_saw(crowd):
    corpus = registry.index("crema_d:crowd", str(crowd))
    assert (corpus.name, corpus.task.kind, corpus.task.classes) == ("crema_d:crowd", "single", CLASSES)
    assert [c.label for c in corpus.clips] == ["anger", "happiness", "neutral", "sadness", "fear"]
    name = "1018_DFA_SAD_XX"
    film, wav = crowd / f"VideoFlash/{name}.flv", crowd / f"AudioWAV/{name}.wav"
    assert corpus.clips[2] == Clip(name, film, "neutral", wav, "1018", "Don't forget a jacket", gender="female")
    assert (corpus.overlapping, corpus.rejected) == (True, ())
    assert [f.name for f in corpus.folds] == ["1", "2", "3", "4", "5"]
    ids = tuple(SOFT)
    assert (corpus.folds[0].train, corpus.folds[0].val, corpus.folds[0].test) == (ids[:2], ids[2:3], ids[3:])
    assert (corpus.folds[4].train, corpus.folds[4].val, corpus.folds[4].test) == (ids[3:], ids[2:3], ids[:2])


def test_shares_of_the_votes(crowd):
    hard, corpus = (registry.index(f"crema_d:{target}", str(crowd)) for target in ("crowd", "soft"))
    assert (corpus.name, corpus.task.kind, corpus.task.classes) == ("crema_d:soft", "soft", CLASSES)
    assert corpus.clips[1].label == (1 / 8, 0, 0, 5 / 8, 2 / 8, 0)
    assert corpus.clips[0].label == pytest.approx((0.856, 0.01, 0.104, 0.01, 0.01, 0.01))
    assert all(sum(c.label) == pytest.approx(1) for c in corpus.clips)
    assert ([c.id for c in corpus.clips], corpus.folds) == ([c.id for c in hard.clips], hard.folds)
    assert corpus.overlapping


@pytest.mark.parametrize(
    ("name", "soft", "reasons"),
    [
        ("1001_DFA_ANG_XX", "0.4,0.4,0.2,0,0,0", ["no majority: anger and sadness have as many votes", None]),
        ("1001_DFA_ANG_XX", "0.4,a,0.2,0,0,0", ["expected numbers"] * 2),
        ("1001_DFA_ANG_XX", "0.4,nan,0.2,0,0,0", ["expected numbers"] * 2),
        ("1001_DFA_ANG_XX", "inf,0,0,0,0,0", ["expected numbers"] * 2),
        ("1001_DFA_ANG_XX", "1,-1,0,0,0,1", ["expected proportions or votes, one above 0 and none below"] * 2),
        ("1001_DFA_ANG_XX", "0,0,0,0,0,0", ["expected proportions or votes, one above 0 and none below"] * 2),
        ("1002_DFA_ANG_XX", "1,0,0,0,0,0", ["no such file"] * 2),
        ("../1001_DFA_ANG_XX", "1,0,0,0,0,0", ["no name of a clip of CREMA-D"] * 2),
    ],
)
def test_rows_that_are_rejected(crowd, name, soft, reasons):
    rows = {name if n == "1001_DFA_ANG_XX" else n: soft if n == "1001_DFA_ANG_XX" else s for n, s in SOFT.items()}
    for i in range(1, 6):
        partition(crowd, i, listed(soft=rows))
    for target, reason in zip(("crowd", "soft"), reasons, strict=True):
        corpus = registry.index(f"crema_d:{target}", str(crowd))
        assert [(i, why.rpartition("; ")[2]) for i, why in corpus.rejected] == ([(name, reason)] if reason else [])
        assert len(corpus.clips) == (4 if reason else 5)
        assert {i for f in corpus.folds for i in f.train + f.val + f.test} == {c.id for c in corpus.clips}


OTHER = SOFT | {"1091_DFA_FEA_XX": "1,0,0,0,0,0"}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda root: (root / "labels/label_consensus_3.csv").unlink(),
            r"got none; expected one list label_consensus_3\.csv .* github\.com/ilucasgoncalves/VAVL, .*: put them",
        ),
        (
            lambda root: partition(root, 3, listed(), "old"),
            r"labels/\S+ and \S+/old/label_consensus_3\.csv; expected one",
        ),
        (lambda root: partition(root, 1, []), "label_consensus_2.csv: 1001_DFA_ANG_XX is not as in partition 1"),
        (lambda root: partition(root, 3, [*listed(), *listed()[:1]]), "6 rows of 5 clips; expected each clip once"),
        (lambda root: partition(root, 3, listed()[1:]), "1001_DFA_ANG_XX is not as in partition 1"),
        (lambda root: partition(root, 3, listed(soft=OTHER)), "1091_DFA_FEA_XX is not as in partition 1"),
        (
            lambda root: partition(root, 3, listed(["Dev", *PARTS[1:]])),
            "of 1001_DFA_ANG_XX.wav is 'Dev'; expected Train",
        ),
        (
            lambda root: write(root / "labels/label_consensus_3.csv", "FileName,fear\n"),
            "no column angry, disgust, happy",
        ),
    ],
)
def test_lists_that_are_wrong_as_a_whole(crowd, spoil, message):
    spoil(crowd)
    with pytest.raises(AvjaxError, match=message):
        registry.index("crema_d:crowd", str(crowd))


def test_votes(tmp_path):
    table = write(
        tmp_path / "summaryTable.csv",
        '"","FileName","VoiceVote","MultiModalVote","MultiModalLevel"\n'
        '"1","1001_IEO_NEU_XX","N","N","64.78"\n"2","1001_IEO_HAP_LO","N","H:N","5:6"\n"3","1001_IEO_HAP_MD","N","",""\n',
    )
    assert reader.votes(table) == {
        "1001_IEO_NEU_XX": {"neutral": 1.0},
        "1001_IEO_HAP_LO": {"happiness": 0.5, "neutral": 0.5},
        "1001_IEO_HAP_MD": {},
    }
    with pytest.raises(AvjaxError, match="no column MultiModalVote"):
        reader.votes(write(tmp_path / "other.csv", "FileName,VoiceVote\n"))


# ---- real lists ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def downloaded(tmp_path_factory):
    """Makes a file for every clip, with the real lists."""
    if not (VOTES / "summaryTable.csv").is_file():
        pytest.skip(f"labels of CREMA-D are not at {VOTES}")
    root = tmp_path_factory.mktemp("crema_d")
    (root / "labels").mkdir()
    for path in VOTES.glob("*.csv"):
        (root / "labels" / path.name).symlink_to(path)
    with (VOTES / "summaryTable.csv").open() as file:
        names = [row["FileName"] for row in csv.DictReader(file)]
    (root / "VideoFlash").mkdir()
    for name in names:
        (root / "VideoFlash" / f"{name}.flv").write_bytes(b"x")
    return root


def test_real_clips_of_the_intended_emotions(downloaded):
    corpus = registry.index("crema_d", str(downloaded))
    assert (len(corpus.clips), len(corpus.rejected)) == (7437, 5)
    assert len(corpus.clips) + len(corpus.rejected) == metadata("crema_d").clips
    assert Counter(c.gender for c in {c.speaker: c for c in corpus.clips}.values()) == {"male": 48, "female": 43}
    folds, _ = natural_folds(corpus.clips, corpus.folds, "given")
    lists = REAL / "dfew_mafw_msp_ravdess_folds/HiCMAE/crema-d/audio_visual"
    for fold, count in zip(folds, (1463, 1470, 1475, 1474, 1555), strict=True):
        lines = gzip.decompress((lists / f"split0{fold.name}/test.csv.gz").read_bytes()).decode().splitlines()
        assert {line.split()[0].rpartition("/")[2] for line in lines} == {*fold.test}
        assert len(fold.test) == count


def test_real_partitions_of_the_crowd(downloaded):
    corpus = registry.index("crema_d:crowd", str(downloaded))
    assert len(corpus.clips) == 5820 == metadata("crema_d:crowd").clips
    assert (corpus.rejected, corpus.overlapping) == ((), True)
    assert Counter(c.label for c in corpus.clips) == metadata("crema_d:crowd").classes
    intended = {code: name for code, name in zip(CODES, CLASSES, strict=True)}
    agree = sum(c.label == intended[c.id.split("_")[2]] for c in corpus.clips)
    assert agree / len(corpus.clips) == pytest.approx(0.822, abs=5e-4)
    actor = {c.id: c.speaker for c in corpus.clips}
    tested = [{actor[i] for i in f.test} for f in corpus.folds]
    assert ([len(t) for t in tested], len(set.union(*tested))) == ([14] * 5, 55)
    for fold in corpus.folds:
        train, val, test = ({actor[i] for i in ids} for ids in (fold.train, fold.val, fold.test))
        assert not (train & val | train & test | val & test)
        assert len(fold.train) + len(fold.val) + len(fold.test) == 5820


def test_real_votes(downloaded):
    votes = reader.votes(downloaded / "labels/summaryTable.csv")
    assert len(votes) == 7442
    assert all(sum(soft.values()) == pytest.approx(1) for soft in votes.values())
    assert Counter(len(soft) for soft in votes.values()) == {1: 7022, 2: 378, 3: 40, 4: 2}
