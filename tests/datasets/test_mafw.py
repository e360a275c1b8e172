"""MAFW: its fold lists with captions and without, of eleven emotions and of 43, on miniatures and on the real lists."""

from collections import Counter

import pytest

from avjax.datasets import registry
from avjax.datasets.base import Clip
from avjax.datasets.folds import natural_folds
from avjax.datasets.metadata import metadata
from avjax.errors import AvjaxError
from tests.conftest import REAL

CLASSES = list(metadata("mafw").classes)
COMPOUND = list(metadata("mafw:compound").classes)
LISTS = [(fold, part) for fold in range(1, 6) for part in ("train", "test")]
# Windows-1252 with an ellipsis, which is a line end in Latin-1, and GBK, whose second bytes are letters and signs.
CAPTIONS = (b"A man shouts \x85 and \x93points\x94.", "他很生气，大喊".encode("gbk"), "café\ttwo".encode("cp1252"))


def listed(root, fold, part, folder="single/no_caption"):
    return root / "Train & Test Set" / folder / f"set_{fold}" / f"{part}.txt"


def write(root, classes, folder, line=lambda i, name, label: f"{name}.mp4 {label}".encode()):
    """Makes two clips of each class, five lists that test each of them once, and unrelated files."""
    names = [f"{i:05d}" for i in range(1, 2 * len(classes) + 1)]
    clips = root / "data/clips"
    clips.mkdir(parents=True, exist_ok=True)
    for name in (*names, "._00001", "99999"):
        (clips / f"{name}.mp4").write_bytes(b"x")
    (clips / ".DS_Store").write_bytes(b"x")
    for fold, part in LISTS:
        chosen = [i for i in range(len(names)) if (i % 5 == fold - 1) == (part == "test")]
        lines = [line(i, names[i], classes[i % len(classes)]) for i in chosen]
        path = listed(root, fold, part, folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\r\n".join([*lines, b""]))
    return root


def captioned(i, name, label):
    return f"{name}.mp4\t{label.capitalize()}\t".encode() + CAPTIONS[i % 3]


@pytest.fixture
def mafw(tmp_path):
    return write(tmp_path, CLASSES, "single/no_caption")


def test_mafw_index(mafw):
    corpus = registry.index("mafw", str(mafw))
    assert corpus.task.classes == tuple(CLASSES)
    assert len(CLASSES) == 11
    assert [c.id for c in corpus.clips] == [f"{i:05d}" for i in range(1, 23)]
    assert corpus.clips[12] == Clip("00013", mafw / "data/clips/00013.mp4", "disgust")
    assert [(f.name, len(f.train), len(f.test)) for f in corpus.folds][:2] == [("1", 17, 5), ("2", 17, 5)]
    assert sorted(i for f in corpus.folds for i in f.test) == [c.id for c in corpus.clips]
    assert (corpus.rejected, corpus.overlapping) == ((), False)
    folds, name = natural_folds(corpus.clips, corpus.folds)
    assert tuple(folds) == corpus.folds
    assert name == "5 folds of the data set"


def test_compound_emotions(tmp_path):
    write(tmp_path, COMPOUND, "compound/no_caption")
    corpus = registry.index("mafw:compound", str(tmp_path))
    assert (corpus.name, corpus.task.classes, len(COMPOUND)) == ("mafw:compound", tuple(COMPOUND), 43)
    assert [c.label for c in corpus.clips] == COMPOUND * 2
    with pytest.raises(AvjaxError, match=r"no MAFW; missing: Train & Test Set/single/no_caption/set_1/train\.txt"):
        registry.index("mafw", str(tmp_path))


@pytest.mark.parametrize(("name", "folder"), [("mafw", "single"), ("mafw:compound", "compound")])
def test_lists_with_captions_say_the_same_as_those_without(tmp_path, name, folder):
    classes = list(metadata(name).classes)
    write(tmp_path / "plain", classes, f"{folder}/no_caption")
    write(tmp_path / "captioned", classes, f"{folder}/with_caption", captioned)
    plain, from_captioned = (registry.index(name, str(tmp_path / kind)) for kind in ("plain", "captioned"))
    assert [(c.id, c.label) for c in from_captioned.clips] == [(c.id, c.label) for c in plain.clips]
    assert from_captioned.folds == plain.folds
    assert {c.transcript for c in from_captioned.clips} == {None}, "a caption is never an input"


def test_captions_beside_plain_lists_must_agree(mafw):
    before = registry.index("mafw", str(mafw))
    write(mafw, CLASSES, "single/with_caption", captioned)
    assert registry.index("mafw", str(mafw)) == before
    path = listed(mafw, 2, "test", "single/with_caption")
    was = path.read_bytes()
    for now, message in (
        (was.replace(b"00007.mp4\tSurprise", b"00007.mp4\tFear"), "00007 is fear, but surprise in .*no_caption.set_2"),
        (was[was.index(b"00007") :], "00002 is not listed, but disgust in"),
        (was + b"00001.mp4\tanger\tx", "00001 is anger, but not listed in"),
    ):
        path.write_bytes(now)
        with pytest.raises(AvjaxError, match=rf"with_caption/set_2/test\.txt: {message}"):
            registry.index("mafw", str(mafw))
    path.unlink()
    assert registry.index("mafw", str(mafw)) == before, "a missing list is ignored"


def test_class_names_with_capital_letters(tmp_path):
    write(
        tmp_path, CLASSES, "single/no_caption", lambda i, n, label: f"{n}.mp4 {(label, label.title())[i % 2]}".encode()
    )
    corpus = registry.index("mafw", str(tmp_path))
    assert [c.label for c in corpus.clips] == CLASSES * 2


def test_mafw_clip_that_is_not_on_disk_is_stated_and_leaves_its_folds(mafw):
    (mafw / "data/clips/00003.mp4").unlink()
    (mafw / "data/clips/00004.mp4").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n")
    corpus = registry.index("mafw", str(mafw))
    assert corpus.rejected == (
        ("00003", "no such file"),
        ("00004", "a Git LFS pointer, not the file: fetch it with git lfs pull"),
    )
    assert len(corpus.clips) == 20
    assert not any({"00003", "00004"} & {*f.train, *f.test} for f in corpus.folds)


def relabel(root, change):
    for path in root.rglob("t*.txt"):
        path.write_text("\n".join(map(change, path.read_text().splitlines())))


def test_mafw_clip_with_an_unknown_label_is_stated_and_leaves_its_folds(mafw):
    relabel(
        mafw, lambda line: {"00003.mp4 fear": "00003.mp4 feer", "00004.mp4 happiness": "00004.mp4 quux"}.get(line, line)
    )
    corpus = registry.index("mafw", str(mafw))
    assert [i for i, _ in corpus.rejected] == ["00003", "00004"]
    assert corpus.rejected[0][1] == "label 'feer'; did you mean 'fear'?"
    assert corpus.rejected[1][1].startswith("label 'quux'; expected one of anger, disgust, fear")
    assert len(corpus.clips) == 20
    assert not any({"00003", "00004"} & {*f.train, *f.test} for f in corpus.folds)
    assert corpus.task.classes == tuple(CLASSES)


def test_mafw_lists_of_another_set_of_labels(mafw):
    relabel(mafw, lambda line: line.split()[0] + " 3")
    with pytest.raises(AvjaxError, match="not one label of these lists is one of anger, disgust"):
        registry.index("mafw", str(mafw))


def test_mafw_missing_parts_are_all_named(mafw):
    listed(mafw, 4, "test").unlink()
    (mafw / "data/clips").rename(mafw / "data/klips")
    with pytest.raises(AvjaxError, match=r"missing: data/clips, .*set_4/test\.txt\. Set --config\.data\.root"):
        registry.index("mafw", str(mafw))
    with pytest.raises(AvjaxError, match=r"no MAFW; missing: data/clips, .*set_1/train"):
        registry.index("mafw", str(mafw / "data"))


def test_mafw_lists_without_any_clip(mafw):
    for clip in (mafw / "data/clips").iterdir():
        clip.unlink()
    with pytest.raises(AvjaxError, match="holds none of the 22 clips"):
        registry.index("mafw", str(mafw))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"../x.mp4 anger", "line 6: '../x.mp4 anger'; expected a clip and its label"),
        (b"/etc/passwd anger", "expected a clip and its label"),
        (b"a/b.mp4 anger", "expected a clip and its label"),
        (b"..\\x.mp4 anger", "expected a clip and its label"),
        (b"00003.mp4", "expected a clip and its label"),
        (b"00003.mp4 anger management", "expected a clip and its label"),
        (b"00003.mp4 rage", "00003 is 'rage', but another list has 'fear'"),
        (b"00003.mp4 anger", "00003 is 'anger', but another list has 'fear'"),
        (b"00003.mp4 fear", "fold 1: in train and test of one fold, or listed twice: 00003"),
        (b"00001.mp4 anger", "fold 1: in train and test of one fold, or listed twice: 00001"),
        (b"00099.mp4 \xe4rger", r"line 6: '00099.mp4 \\xe4rger'; expected a clip"),
    ],
)
def test_mafw_refuses_a_line(mafw, line, message):
    path = listed(mafw, 1, "test")
    path.write_bytes(path.read_bytes() + line + b"\r\n")
    with pytest.raises(AvjaxError, match=message.replace("\\", "\\\\")):
        registry.index("mafw", str(mafw))


def test_mafw_clip_must_be_tested_once(mafw):
    one, two = listed(mafw, 1, "test"), listed(mafw, 2, "test")
    was = one.read_text()
    first, rest = was.split("\n", 1)
    one.write_text(rest)
    with pytest.raises(AvjaxError, match="tested in no fold: 00001"):
        registry.index("mafw", str(mafw))
    one.write_text(was)
    train = listed(mafw, 2, "train")
    train.write_text(train.read_text().replace(first + "\n", ""))
    two.write_text(two.read_text() + first)
    with pytest.raises(AvjaxError, match="tested in two folds, or listed twice: 00001"):
        registry.index("mafw", str(mafw))


@pytest.mark.parametrize(
    ("name", "folder", "tests", "counted"),
    [
        ("mafw", "single", [1839, 1837, 1833, 1832, 1831], 9172),
        ("mafw:compound", "compound", [1818, 1809, 1798, 1788, 1783], 8996),
    ],
)
def test_mafw_real_lists(tmp_path, name, folder, tests, counted):
    source = REAL / "dfew_mafw_msp_ravdess_folds/S2D/MAFW/anno" / folder / "no_caption"
    if not source.is_dir():
        pytest.skip(f"MAFW's fold lists are not at {source}")
    clips = tmp_path / "data/clips"
    clips.mkdir(parents=True)
    (tmp_path / "Train & Test Set" / folder).mkdir(parents=True)
    (tmp_path / "Train & Test Set" / folder / "no_caption").symlink_to(source)
    tested = Counter()
    for fold in range(1, 6):
        for line in (source / f"set_{fold}/test.txt").read_text().splitlines():
            (clips / line.split()[0]).write_bytes(b"x")
            tested[line.split()[0]] += 1
    corpus = registry.index(name, str(tmp_path))
    assert len(corpus.clips) == counted == metadata(name).clips
    assert set(tested.values()) == {1}
    assert len(tested) == counted
    assert [len(f.test) for f in corpus.folds] == tests
    assert all(len(f.train) + len(f.test) == counted for f in corpus.folds)
    assert Counter(c.label for c in corpus.clips) == metadata(name).classes
