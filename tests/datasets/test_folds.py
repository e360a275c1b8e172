"""Folder data sets: labels.csv as users write it, folds, and validation clips."""

import dataclasses
import os
from collections import Counter

import pytest

from avjax.datasets import registry
from avjax.datasets.base import Clip, Fold
from avjax.datasets.folds import hold_out, natural_folds
from avjax.errors import AvjaxError

NAMES = ["crema_d", "crema_d:crowd", "crema_d:soft", "demo", "dfew", "folder", "java_sed", "mafw", "mafw:compound",
         "meld", "msp_improv", "ravdess"]  # fmt: skip

# ---- folder ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Writes labels.csv and the files a.mp4 to d.mp4 and indexes the folder."""

    def write(table, encoding="utf-8"):
        root = tmp_path / "data"
        (root / "sub").mkdir(parents=True, exist_ok=True)
        for name in ("a.mp4", "b.mp4", "c.mp4", "sub/d.mp4", "a.wav", "../outside.mp4"):
            (root / name).write_bytes(b"x")
        (root / "labels.csv").write_bytes(table if isinstance(table, bytes) else table.encode(encoding))
        return registry.index("folder", str(root))

    return write


def test_folder_reads_all_columns(folder, tmp_path):
    corpus = folder(
        "file,label,id,speaker,split,fold,transcript,audio,start,end\n"
        "a.mp4,sad,one,ann,Train,f1,Oh no.,a.wav,0.5,2\n"
        "sub/d.mp4,angry,,,dev,,,,,\n"
    )
    root = tmp_path / "data"
    assert corpus.clips == (
        Clip("one", root / "a.mp4", "sad", root / "a.wav", "ann", "Oh no.", 0.5, 2.0, "train", "f1"),
        Clip("sub/d", root / "sub/d.mp4", "angry", split="val"),
    )
    assert corpus.task.classes == ("angry", "sad")
    assert corpus.rejected == ()
    assert corpus.folds == ()


@pytest.mark.parametrize(
    "table",
    [
        'file,label,transcript\na.mp4,sad,"One,\ntwo; ""three"""\nb.mp4,happy,\n',
        '\ufefffile,label,transcript\r\na.mp4,sad,"One,\r\ntwo; ""three"""\r\nb.mp4,happy\r\n',
        'File; Label ;Transcript\na.mp4;sad;"One,\ntwo; ""three"""\nb.mp4;happy;\n',
        ' label\ttranscript\tfile\n sad \t"One,\ntwo; ""three"""\ta.mp4\nhappy\t\t b.mp4\n\n',
    ],
    ids=["plain", "bom-crlf-short-row", "semicolons", "tabs-reordered"],
)
def test_folder_reads_tables_as_people_write_them(folder, table):
    first, second = folder(table).clips
    assert (first.id, first.label, first.transcript) == ("a", "sad", 'One,\ntwo; "three"')
    assert (second.id, second.label, second.transcript) == ("b", "happy", None)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("b.mp4,", "no label"),
        (",sad", "no file name"),
        ("nope.mp4,sad", "no such file"),
        ("sub,sad", "a folder, not a file"),
        ("loop.mp4,sad", "a symbolic link that leads in a circle"),
        ("../outside.mp4,sad", "file lies outside the data folder"),
        ("sub/../../outside.mp4,sad", "file lies outside the data folder"),
        ("/etc/hostname,sad", "file lies outside the data folder"),
        ("link.mp4,sad", "file lies outside the data folder"),
        (f"{'long' * 100},sad", "no such file: the name is too long"),
        ("nul\0.mp4,sad", "no such file: the name has a null byte"),
        ("b.mp4,sad,,,,,,../outside.mp4", "file lies outside the data folder"),
        ("b.mp4,sad,,,,,,gone.wav", "its audio file: no such file"),
        ("a.mp4,sad", "duplicate clip id"),
        ("b.mp4,sad,first", "duplicate clip id"),
        ("b.mp4,sad,,,testing", "split is 'testing'; expected train, val or test"),
        ('b.mp4,sad,,,,,,,"1,5"', "start or end is not a number: '1,5'"),
        ("b.mp4,sad,,,,,,,2,1", "expected 0 <= start < end"),
        ("b.mp4,sad,,,,,,,-1", "expected 0 <= start < end"),
        ("b.mp4,sad,,,,,,,nan", "expected 0 <= start < end"),
        ("b.mp4,sad,,,,,,,,nan", "expected 0 <= start < end"),
        ("b.mp4,sad,,,,,,,,0", "expected 0 <= start < end"),
        ("b.mp4,sad,,,,,Well, then,,,", "more cells than columns"),
    ],
)
def test_folder_rejects_a_row_and_keeps_the_rest(folder, tmp_path, row, reason):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/link.mp4").symlink_to(tmp_path / "outside.mp4")
    (tmp_path / "data/loop.mp4").symlink_to("loop.mp4")
    header = "file,label,id,speaker,split,fold,transcript,audio,start,end\n"
    corpus = folder(f"{header}a.mp4,sad,,,,,,,,\nc.mp4,happy,first\n{row}\n")
    assert [c.id for c in corpus.clips] == ["a", "first"]
    ((_, why),) = corpus.rejected
    assert reason in why


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("", "labels.csv: is empty; expected a table"),
        ("path,label\na.mp4,sad\n", "no column file; got path, label; expected file"),
        ("file,name\na.mp4,sad\n", "no column label; got file, name; expected file, label"),
        ("file,label\n", "none of its 0 rows can be used"),
        ("file,label\nno.mp4,sad\n", "none of its 1 rows can be used; the first: no: no such file"),
        ('file,label,transcript\na.mp4,sad,"never ends\nb.mp4,sad,\n', "labels.csv, line 3: unexpected end of data"),
        ('file,label,transcript\na.mp4,sad,"Say "what" now"\n', "line 2: .* a cell with a quote in it is written"),
        ("file,label\na.mp4,fröhlich\n".encode("latin-1"), "labels.csv, line 2: not UTF-8; save the table as UTF-8"),
        ("file,label\na.mp4,sad\n".encode("utf-16"), "not UTF-8"),
    ],
)
def test_folder_says_what_is_wrong_with_its_table(folder, table, message):
    with pytest.raises(AvjaxError, match=message):
        folder(table)


def test_folder_with_values(folder, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/classes.txt").write_text("not used")
    corpus = folder("value:valence;FILE; Value:Arousal ;speaker\n0.5;a.mp4;-1e-2;ann\n1;b.mp4; 0 ;ben\n")
    assert (corpus.task.kind, corpus.task.classes, corpus.rejected) == ("regression", ("valence", "arousal"), ())
    assert [(c.id, c.label, c.speaker) for c in corpus.clips] == [("a", (0.5, -0.01), "ann"), ("b", (1.0, 0.0), "ben")]


def test_folder_with_yes_or_no(folder):
    corpus = folder("file,is:happy,is:sad\na.mp4,1,0\nb.mp4,1.0,1\nc.mp4,0,0\n")
    assert (corpus.task.kind, corpus.task.classes, corpus.rejected) == ("multilabel", ("happy", "sad"), ())
    assert [c.label for c in corpus.clips] == [(1, 0), (1, 1), (0, 0)]


@pytest.mark.parametrize(
    ("columns", "cells", "reason"),
    [
        ("value:x,value:y", "0.5,", "value:x, value:y: 0.5, nothing; expected numbers"),
        ("value:x,value:y", "high,2", "value:x, value:y: high, 2; expected numbers"),
        ("value:x,value:y", "nan,2", "value:x, value:y: nan, 2; expected numbers"),
        ("value:x,value:y", "1,-inf", "value:x, value:y: 1, -inf; expected numbers"),
        ("is:x,is:y", "0.5,1", "is:x, is:y: 0.5, 1; expected 1 or 0"),
        ("is:x,is:y", "yes,no", "is:x, is:y: yes, no; expected numbers"),
    ],
)
def test_folder_rejects_what_is_no_number_and_keeps_the_rest(folder, columns, cells, reason):
    corpus = folder(f"file,{columns}\na.mp4,1,0\nb.mp4,{cells}\n")
    assert [c.label for c in corpus.clips] == [(1, 0)]
    assert corpus.rejected == (("b", reason),)


@pytest.mark.parametrize("columns", ["value:x,is:y", "label,value:x", "is:x,label"])
def test_folder_takes_one_kind_of_label(folder, columns):
    with pytest.raises(AvjaxError, match=rf"labels\.csv: columns {columns.replace(',', ', ')}; expected one kind of"):
        folder(f"file,{columns}\na.mp4,1,0\n")


def test_folder_with_a_list_of_classes(folder, tmp_path):
    (tmp_path / "data").mkdir()
    path = tmp_path / "data/classes.txt"
    path.write_text("\ufeffsad\n\n happy \nangry", encoding="utf-8")
    corpus = folder("file,label\na.mp4,happy\nb.mp4,Happy\nc.mp4,zzz\nsub/d.mp4,sad\n")
    assert corpus.task.classes == ("sad", "happy", "angry"), "in the order of the list, also those without a clip"
    assert corpus.rejected == (
        ("b", "label 'Happy'; did you mean 'happy'?"),
        ("c", "label 'zzz'; expected one of sad, happy, angry"),
    )
    for content, message in ((b"sad\nsad", "got sad, sad; expected each class once"), (b"\n", "got no line; expected"),
                             (b"fr\xf6h", "not UTF-8")):  # fmt: skip
        path.write_bytes(content)
        with pytest.raises(AvjaxError, match=message):
            registry.index("folder", str(tmp_path / "data"))


def test_folder_with_file_names_that_are_not_utf8(folder, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / os.fsdecode(b"fr\xf6h.mp4")).write_bytes(b"x")
    corpus = folder(b"file,label\nfr\xf6h.mp4,sad\na.mp4,sad\nf\xf6rt.mp4,sad\n")
    assert [c.id for c in corpus.clips] == ["fr\\xf6h", "a"]
    assert corpus.clips[0].path.read_bytes()
    assert corpus.rejected == (("f\\xf6rt", "no such file"),)


def test_folder_without_table_and_missing_roots(tmp_path, monkeypatch):
    with pytest.raises(AvjaxError, match=r"labels\.csv: not found; .* columns file,label"):
        registry.index("folder", str(tmp_path))
    with pytest.raises(AvjaxError, match=f"choose one of {', '.join(NAMES)}; did you mean 'mafw'"):
        registry.index("mawf")
    monkeypatch.setenv("AVJAX_DATA", str(tmp_path))
    with pytest.raises(AvjaxError, match=rf"{tmp_path}/mafw: no such folder; set --config.data.root"):
        registry.index("mafw")


def test_folder_on_real_clips(java_sed):
    corpus = registry.index("folder", str(java_sed))
    assert (len(corpus.clips), len(corpus.task.classes), len({c.speaker for c in corpus.clips})) == (96, 6, 4)


# ---- folds -----------------------------------------------------------------------------------------------------------


def made(count, classes=3, speakers=0, **columns):
    """Makes `count` clips; each column is a function of the clip's number."""
    return [
        Clip(f"c{i:02d}", None, f"class{i % classes}", speaker=f"s{i % speakers}" if speakers else None,
             **{name: value(i) for name, value in columns.items()})
        for i in range(count)
    ]  # fmt: skip


def check_partition(folds, clips):
    ids = [c.id for c in clips]
    assert sorted(i for f in folds for i in f.test) == ids, "every clip is tested exactly once"
    for fold in folds:
        assert sorted(fold.train + fold.test + fold.val) == ids


def test_auto_takes_the_first_that_the_data_admit():
    official = [Fold("x", ("c00",), ("c01",))]
    rich = made(12, speakers=3, fold=lambda i: f"f{i % 2}", split=lambda i: ("train", "val", "test")[i % 3])
    assert natural_folds(rich, official) == (official, "1 folds of the data set")
    folds, name = natural_folds(rich, ())
    assert ([f.name for f in folds], name) == (["f0", "f1"], "2 given folds")
    check_partition(folds, rich)
    split = [dataclasses.replace(c, fold=None) for c in rich]
    (fold,), name = natural_folds(split, ())
    assert name == "given train/test split"
    assert fold == Fold("split", ("c00", "c03", "c06", "c09"), ("c02", "c05", "c08", "c11"),
                        ("c01", "c04", "c07", "c10"))  # fmt: skip
    plain = [dataclasses.replace(c, split=None) for c in split]
    assert natural_folds(plain, ())[1] == "leave one speaker out (3 speakers)"
    nameless = [dataclasses.replace(c, speaker=None) for c in plain]
    assert natural_folds(nameless, ())[1].startswith("5 stratified folds")
    half_named = [dataclasses.replace(plain[0], speaker=None), *plain[1:]]
    assert natural_folds(half_named, ())[1].startswith("5 stratified folds")


@pytest.mark.parametrize(("speakers", "count"), [(3, 3), (5, 5), (9, 5)])
def test_speaker_folds_are_disjoint_in_speakers(speakers, count):
    clips = made(36, speakers=speakers)
    folds, _ = natural_folds(clips, (), "speaker")
    assert len(folds) == count
    check_partition(folds, clips)
    who = {c.id: c.speaker for c in clips}
    for fold in folds:
        assert not {who[i] for i in fold.train} & {who[i] for i in fold.test}
    assert natural_folds(clips, (), "speaker") == natural_folds(clips, (), "speaker")


def test_stratified_folds_are_balanced_and_follow_the_seed():
    clips = made(30, classes=3)
    folds, _ = natural_folds(clips, (), "stratified", count=5)
    check_partition(folds, clips)
    label = {c.id: c.label for c in clips}
    for fold in folds:
        assert set(Counter(label[i] for i in fold.test).values()) == {2}
    assert folds == natural_folds(clips, (), "stratified", count=5)[0]
    assert folds != natural_folds(clips, (), "stratified", count=5, seed=1)[0]


def valued(count):
    """Makes clips whose first target rises, in random order of ids."""
    return [Clip(f"c{i:02d}", None, (float(i * 7 % count), 0.5)) for i in range(count)]


def test_stratified_folds_of_values_are_alike_in_the_first_of_them():
    clips = valued(30)
    folds, _ = natural_folds(clips, (), "stratified", count=5)
    check_partition(folds, clips)
    value = {c.id: c.label[0] for c in clips}
    assert all(sorted(value[i] // 5 for i in f.test) == list(range(6)) for f in folds), "one of every five"


@pytest.mark.parametrize(
    ("clips", "kind", "count", "message"),
    [
        (made(12), "given", 5, "needs official folds, or a split or fold for every clip"),
        (made(12), "speaker", 5, "needs a speaker for every clip"),
        (made(12, speakers=1), "speaker", 5, "at least two speakers"),
        (made(3), "auto", 5, "needs at least 5 clips"),
        (made(12, split=lambda i: "train" if i else None), "auto", 5, "1 of 12 clips have no split and 12 no fold"),
        (made(12, split=lambda i: "train"), "auto", 5, "splits: train; folds: none.*set protocol.folds to speaker"),
        (made(12, fold=lambda i: "f1"), "given", 5, "expected train and test, or two folds or more"),
        (made(12, fold=lambda i: f"f{i % 2}" if i else None), "auto", 5, "12 of 12 clips have no split and 1 no fold"),
    ],
)
def test_folds_that_the_data_do_not_admit(clips, kind, count, message):
    with pytest.raises(AvjaxError, match=message):
        natural_folds(clips, (), kind, count)


def test_half_a_split_can_be_set_aside_on_purpose():
    assert natural_folds(made(12, split=lambda i: "train"), (), "stratified")[1].startswith("5 stratified")


# ---- validation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.99])
@pytest.mark.parametrize("clips", [made(40, classes=3), made(24, speakers=4), made(2, speakers=2), made(7, classes=6)])
def test_hold_out_divides_the_training_clips(clips, share):
    train, val, _ = hold_out(clips, share, seed=1)
    ids = [c.id for c in clips]
    assert (train, val) == ([i for i in ids if i in train], [i for i in ids if i in val]), "the order is kept"
    assert sorted(train + val) == ids
    assert train
    assert val
    assert hold_out(clips, share, seed=1)[:2] == (train, val)


def test_hold_out_takes_whole_speakers():
    clips = made(40, speakers=5)
    who = {c.id: c.speaker for c in clips}
    train, val, how = hold_out(clips, 0.4, seed=0)
    assert how == "whole training speakers held out"
    assert len({who[i] for i in val}) == 2
    assert not {who[i] for i in train} & {who[i] for i in val}
    assert len({tuple(hold_out(clips, 0.4, seed=s)[1]) for s in range(6)}) > 1


def test_hold_out_is_balanced_and_leaves_every_class_something_to_learn_from():
    clips = [*made(40, classes=2), Clip("lone", None, "rare")]
    label = {c.id: c.label for c in clips}
    _, val, how = hold_out(clips, 0.25, seed=0)
    assert how == "stratified part of the training clips held out"
    assert Counter(label[i] for i in val) == {"class0": 5, "class1": 5}
    for share in (0.25, 0.9, 0.99):
        assert {label[i] for i in hold_out(clips, share, seed=0)[0]} == {"class0", "class1", "rare"}


def test_hold_out_of_values_is_a_share_of_all():
    clips = valued(40)
    train, val, how = hold_out(clips, 0.25, seed=0)
    assert how == "stratified part of the training clips held out"
    assert (len(train), len(val)) == (30, 10)
    assert sorted([*train, *val]) == [c.id for c in clips]
    assert hold_out([Clip(c.id, None, (1.0, 0.0)) for c in clips], 0.25, seed=0)[1] == val, "whatever the values"


def test_hold_out_of_nothing():
    clips = made(6)
    assert hold_out(clips, 0, seed=0) == ([c.id for c in clips], [], "no validation part")
    lone = made(3, classes=3)
    assert hold_out(lone, 0.5, seed=0) == (["c00", "c01", "c02"], [], "no validation part (too few clips)")
    assert hold_out([], 0.5, seed=0)[:2] == ([], [])
    for share in (1, 20, -0.1):
        with pytest.raises(AvjaxError, match=f"protocol.validation is {share}; expected a share"):
            hold_out(clips, share, seed=0)
