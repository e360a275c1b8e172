"""DFEW: lists that count from 0 or from 1, numbers padded with zeros or not, on miniatures and on the real lists."""

import csv
from collections import Counter

import pytest

from avjax.datasets import registry
from avjax.datasets.base import Clip
from avjax.datasets.metadata import metadata
from avjax.errors import AvjaxError
from tests.conftest import REAL

CLASSES = ("happy", "sad", "neutral", "angry", "surprise", "disgust", "fear")
LISTS = [(fold, part) for fold in range(1, 6) for part in ("train", "test")]
REAL_LISTS = REAL / "dfew_mafw_msp_ravdess_folds/S2D/DFEW/EmoLabel_DataSplit"


def listed(root, fold, part, name="set_{fold}.csv"):
    return root / "EmoLabel_DataSplit" / f"{part}(single-labeled)" / name.format(fold=fold, part=part)


def write(
    root, base=1, name="set_{fold}.csv", film="Clip/original/{i}.mp4", number="{i:05d}", header="video_name,label"
):
    """Makes two clips of each class, five lists that test each of them once, and unrelated files."""
    for i in range(1, 15):
        path = root / film.format(i=i, part=1 + i // 8)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    for stray in (".DS_Store", "._3.mp4", "notes.mp4", "readme.txt"):
        (path.parent / stray).write_bytes(b"x")
    for fold, part in LISTS:
        chosen = [i for i in range(1, 15) if (i % 5 == fold - 1) == (part == "test")]
        lines = [header, *(f"{number.format(i=i)},{base + (i - 1) % 7}" for i in chosen), ""]
        path = listed(root, fold, part, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes("\r\n".join(lines).encode("utf-8"))
    return root


@pytest.mark.parametrize(
    "quirks",
    [
        {},
        {"base": 0},
        {"base": 0, "name": "{part}_set_{fold}.csv"},
        {"number": "{i}"},
        {"film": "Clip/original/{i:05d}.mp4", "number": "{i}"},
        {"film": "Clip/original/part_{part}/{i}.MP4"},
        {"header": "\ufeff video_name , label "},
    ],
    ids=["official", "from-0", "public-names", "plain-numbers", "padded-films", "part-folders", "header"],
)
def test_the_official_folds(tmp_path, quirks):
    corpus = registry.index("dfew", str(write(tmp_path, **quirks)))
    assert (corpus.name, corpus.task.kind, corpus.task.classes) == ("dfew", "single", CLASSES)
    assert [(c.id, c.label) for c in corpus.clips] == [(f"{i:05d}", CLASSES[(i - 1) % 7]) for i in range(1, 15)]
    film = quirks.get("film", "Clip/original/{i}.mp4").format(i=12, part=2)
    assert corpus.clips[11] == Clip("00012", tmp_path / film, "surprise")
    assert [(f.name, len(f.train), len(f.test)) for f in corpus.folds] == [
        ("1", 12, 2), ("2", 11, 3), ("3", 11, 3), ("4", 11, 3), ("5", 11, 3)
    ]  # fmt: skip
    assert sorted(i for f in corpus.folds for i in f.test) == [c.id for c in corpus.clips]
    assert corpus.rejected == ()


def test_clips_that_are_not_there_are_stated_and_leave_their_folds(tmp_path):
    write(tmp_path)
    (tmp_path / "Clip/original/3.mp4").unlink()
    (tmp_path / "Clip/original/4.mp4").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    for fold, part in LISTS:
        path = listed(tmp_path, fold, part)
        path.write_text(path.read_text().replace("00005,5", "00005,9"))
    corpus = registry.index("dfew", str(tmp_path))
    assert corpus.rejected == (
        ("00003", "no such file"),
        ("00004", "a Git LFS pointer, not the file: fetch it with git lfs pull"),
        ("00005", f"label '9'; expected one of {', '.join(CLASSES)}"),
    )
    assert len(corpus.clips) == 11
    assert not any({"00003", "00004", "00005"} & {*f.train, *f.test} for f in corpus.folds)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("../../x,1", r"set_1\.csv: video_name is '../../x'; expected a number such as 02522"),
        ("1.5,1", "expected a number"),
        ("٣,1", "expected a number"),
        (",1", "expected a number"),
        ("9" * 20 + ",1", "expected a number"),
        ("3,2", "00003 is '2', but another list has '3'"),
        ("3,3", "fold 1: in train and test of one fold, or listed twice: 00003"),
    ],
)
def test_a_row_that_is_refused(tmp_path, row, message):
    path = listed(write(tmp_path), 1, "test")
    path.write_text(path.read_text() + row + "\n")
    with pytest.raises(AvjaxError, match=message):
        registry.index("dfew", str(tmp_path))


def relabel(root, change):
    for fold, part in LISTS:
        path = listed(root, fold, part)
        head, *rows = path.read_text().splitlines()
        path.write_text("\n".join([head, *(f"{n},{change(label)}" for n, label in (r.split(",") for r in rows))]))


@pytest.mark.parametrize(
    ("change", "numbers"),
    [
        (lambda label: "0" if label == "1" else label, "0, 2, 3, 4, 5, 6, 7"),
        (lambda label: "2" if label in "17" else label, "2, 3, 4, 5, 6"),
        (lambda label: CLASSES[int(label) - 1], "angry, disgust, fear, happy, neutral, sad, surprise"),
    ],
)
def test_labels_whose_first_number_is_not_clear(tmp_path, change, numbers):
    relabel(write(tmp_path), change)
    with pytest.raises(AvjaxError, match=rf"labels are {numbers}; expected 1 to 7 \(official\) or 0 to 6 \(S2D\)"):
        registry.index("dfew", str(tmp_path))


def test_lists_without_their_first_class_still_say_where_they_begin(tmp_path):
    relabel(write(tmp_path), lambda label: "2" if label == "1" else label)
    assert {c.label for c in registry.index("dfew", str(tmp_path)).clips} == {*CLASSES} - {"happy"}


def test_a_layout_that_is_not_dfew(tmp_path):
    write(tmp_path)
    listed(tmp_path, 4, "test").unlink()
    with pytest.raises(AvjaxError, match=r"no DFEW; missing: .*test\(single-labeled\)/set_4\.csv\. Set --config"):
        registry.index("dfew", str(tmp_path))
    (tmp_path / "Clip/original").rename(tmp_path / "Clip/clip_224x224_16f")
    with pytest.raises(AvjaxError, match=r"has only frames .*; the videos of Clip/original are needed"):
        registry.index("dfew", str(tmp_path))
    with pytest.raises(AvjaxError, match=r"no DFEW; missing: Clip/original, .*set_1\.csv"):
        registry.index("dfew", str(tmp_path / "Clip"))


def test_a_list_that_is_no_such_table(tmp_path):
    listed(write(tmp_path), 2, "train").write_text("id,emotion\n00001,1\n")
    with pytest.raises(AvjaxError, match=r"set_2\.csv: no column video_name, label; got id, emotion; expected"):
        registry.index("dfew", str(tmp_path))


def test_real_lists(tmp_path):
    if not REAL_LISTS.is_dir():
        pytest.skip(f"DFEW's fold lists are not at {REAL_LISTS}")
    (tmp_path / "EmoLabel_DataSplit").symlink_to(REAL_LISTS)
    (tmp_path / "Clip/original").mkdir(parents=True)
    for path in REAL_LISTS.glob("test*/*.csv"):
        for row in csv.DictReader(path.read_text().splitlines()):
            (tmp_path / "Clip/original" / f"{int(row['video_name'])}.mp4").write_bytes(b"x")
    corpus = registry.index("dfew", str(tmp_path))
    assert len(corpus.clips) == 11697 == metadata("dfew").clips
    assert (len(corpus.folds[0].train), len(corpus.folds[0].test)) == (9356, 2341)
    assert Counter(c.label for c in corpus.clips) == metadata("dfew").classes
    assert corpus.rejected == ()
