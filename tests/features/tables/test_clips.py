"""Tables of one file for each clip, labels that are numbers, and steps that a column counts."""

import json
import pickle

import numpy as np
import pytest

from avjax.errors import AvjaxError
from avjax.features import store
from avjax.features.tables import join
from tests.conftest import REAL
from tests.features.tables.test_openface import write_openface

CLIPS = ("a", "b", "c")


def described(path="face/{key}.csv", stream="face:au", **entries):
    """One stream of one file per clip, and classes in labels.csv."""
    return {
        "files": {"face": {"path": path, **entries}, "labels": {"path": "labels.csv", "key": "clip"}},
        "streams": {"video": (stream,)},
        "facts": {"label": {"of": "labels:emotion"}},
    }


@pytest.fixture
def root(tmp_path):
    rows = [
        ("clip", "emotion", "joy", "grief", "length"),
        ("a", "x", 3, 1, 1),
        ("b", "y", 0, 2, 3),
        ("c", "x", 1, 1, 2),
    ]
    (tmp_path / "labels.csv").write_text("\n".join(",".join(map(str, row)) for row in rows))
    (tmp_path / "face").mkdir()
    return tmp_path


def read(root, plain):
    corpus, steps = join.read("mine", join.Description.of(plain), root)
    return corpus, dict(zip([c.id for c in corpus.clips], steps, strict=True))


# ---- One file for each clip ---------------------------------------------------------------------------------------


def test_a_table_of_openface_for_each_clip(root):
    for n, clip in enumerate(CLIPS, 1):
        write_openface(root / "face" / f"{clip}.csv", [{"AU12_r": n}, {"success": 0, "AU12_r": 9}] * n)
    _, steps = read(root, described(format="openface"))
    x, mask = steps["b"]["video"]
    assert (x.shape, x.dtype) == ((4, 17), np.float32)
    assert mask.tolist() == [True, False, True, False]
    assert x.max(-1).tolist() == [2, 0, 2, 0]
    _, steps = read(root, described(stream="face:pose", format="openface"))
    assert steps["c"]["video"][0].shape == (6, 6)


def write_arrays(root, form, clip, value):
    if form == "frames":
        (root / "face" / clip).mkdir()
        for i, row in enumerate(value):
            np.save(root / "face" / clip / f"{i:05d}.npy", row)
    elif form == "csv":
        (root / "face" / f"{clip}.csv").write_text("p,q,said\n" + "".join(f"{p},{q},hm\n" for p, q in value))
    else:
        save = {"npy": np.save, "npz": lambda path, x: np.savez(path, p=x[:, :1], q=x[:, 1:])}[form]
        save(root / "face" / f"{clip}.{form}", value)


@pytest.mark.parametrize(
    ("form", "path", "stream"),
    [
        ("npy", "face/{key}.npy", "face:value"),
        ("npz", "face/{key}.npz", "face:p..q"),
        ("csv", "face/{key}.csv", "face:p..q"),
        ("frames", "face/{key}", "face:value"),
    ],
)
def test_arrays_of_each_clip_in_different_files(root, form, path, stream):
    for n, clip in enumerate(CLIPS, 1):
        write_arrays(root, form, clip, np.arange(2.0 * n).reshape(n, 2) + n)
    corpus, steps = read(root, described(path, stream))
    assert [c.label for c in corpus.clips] == ["x", "y", "x"]
    assert [steps[c]["video"][0].tolist() for c in CLIPS] == [[[1, 2]], [[2, 3], [4, 5]], [[3, 4], [5, 6], [7, 8]]]


def test_a_vector_for_each_clip_is_one_step_and_names_are_cut_by_a_pattern(root):
    for clip in CLIPS:
        np.save(root / "face" / f"03-{clip}.npy", np.arange(4))
    _, steps = read(root, described("face/{key}.npy", "face:value", pattern="03-(.*)"))
    assert steps["a"]["video"][0].tolist() == [[0, 1, 2, 3]]


def test_files_of_splits_say_the_split(root):
    for split, clip in (("train", "a"), ("dev", "b"), ("test", "c")):
        (root / "face" / split).mkdir()
        np.save(root / "face" / split / f"{clip}.npy", np.ones(2))
    plain = described("face/{split}/{key}.npy", "face:value")
    plain["splits"] = tuple((word, word) for word in ("train", "dev", "test"))
    assert [(c.id, c.split) for c in read(root, plain)[0].clips] == [("a", "train"), ("b", "val"), ("c", "test")]


def test_a_file_that_cannot_be_used_rejects_its_clip_alone(root, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "secret.npy"
    np.save(outside, np.ones((1, 2)))
    for clip in ("a", "c"):
        np.save(root / "face" / f"{clip}.npy", np.ones((1, 2)))
    (root / "face/b.npy").write_bytes(b"no numpy")
    (root / "face/d.npy").symlink_to(outside)
    np.save(root / "face/e.npy", np.ones((1, 3)))
    np.save(root / "face/.hidden.npy", np.ones((1, 2)))
    with (root / "labels.csv").open("a") as file:
        file.writelines(f"\n{clip},x,1,1,1" for clip in "def")
    corpus, _ = read(root, described("face/{key}.npy", "face:value"))
    assert [c.id for c in corpus.clips] == ["a", "c"]
    reasons = dict(corpus.rejected)
    assert reasons.keys() == set("bdef")
    assert "expected an .npy of numbers" in reasons["b"]
    assert "lies outside the data folder" in reasons["d"]
    assert reasons["e"] == "face/e.npy: holds other columns or widths than the most of these files"
    assert reasons["f"] == "video has no row in face:value"


def test_a_folder_of_frames_may_not_lead_outside(root, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "secret.npy"
    np.save(outside, np.ones(2))
    for clip in "ab":
        write_arrays(root, "frames", clip, np.ones((2, 2)))
    (root / "face/b/00009.npy").symlink_to(outside)
    corpus, _ = read(root, described("face/{key}", "face:value"))
    assert "lies outside" in dict(corpus.rejected)["b"]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"path": "face/{key}.npy"}, r"face/\{key\}\.npy: no such file"),
        ({"path": "../{key}.csv"}, "expected one {key}, below the data root"),
        ({"path": "{key}/{key}.csv"}, "expected one {key}, below the data root"),
        ({"path": "/{key}.csv"}, "expected one {key}, below the data root"),
        ({"key": "x"}, r"tables\.files\.face: has a key, and {key} in its path"),
        ({"format": "openfac"}, r"tables\.formats: 'openfac' is unknown; expected mmsa, mosei, openface"),
    ],
)
def test_paths_that_do_not_fit_are_clear_errors(root, entries, message):
    with pytest.raises(AvjaxError, match=message):
        read(root, described(**entries))


def test_the_store_is_made_anew_where_a_file_of_a_clip_changed(root):
    def packed():
        description = join.Description.of(described("face/{key}.npy", "face:value"))
        join.make("mine", "tables", description, root, root / "F")
        return store.read_index(root / "F")["presets"]["tables"]

    for clip in CLIPS:
        np.save(root / "face" / f"{clip}.npy", np.ones((2, 2)))
    first = packed()
    assert packed() == first
    np.save(root / "face/b.npy", np.zeros((2, 2)))
    assert packed()["content"] != first["content"]
    record = json.loads((root / "F/provenance" / f"{first['made_by']['video']}.json").read_text())
    assert set(record["sources"]) == {"labels.csv", "face/a.npy", "face/b.npy", "face/c.npy"}


def test_tables_of_py_feat():
    folder = REAL / "openface_pyfeat_csv"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there (set AVJAX_TEST_DATA)")
    files = {
        "face": {"path": "news_sample/{key}.csv"},
        "clips": {"path": "news_sample/clip_attrs.csv", "key": "clipN"},
    }
    plain = {"files": files, "streams": {"video": ("face:AU01..AU43",)}, "facts": {"label": {"of": "clips:class"}}}
    corpus, steps = read(folder, plain)
    assert sorted({c.label for c in corpus.clips}) == ["gn", "ists"]
    assert len(corpus.clips) == 20
    reasons = dict(corpus.rejected)
    assert reasons.pop("clip_attrs").endswith("holds other columns or widths than the most of these files")
    assert set(reasons.values()) == {"video has no row in face:AU01..AU43"}  # 280 clips that are not in the sample
    assert {s["video"][0].shape[1] for s in steps.values()} == {20}


# ---- Labels that are numbers, and steps that a column counts ------------------------------------------------------


def numbers(task, root, **facts):
    for clip in CLIPS:
        np.save(root / "face" / f"{clip}.npy", np.ones((2, 2)))
    plain = described("face/{key}.npy", "face:value") | {"facts": {}, "task": task}
    targets = {"joy": {"of": "labels:joy"}, "grief": {"of": "labels:grief"}}
    return plain | {"targets": {name: fact | facts for name, fact in targets.items()}}


@pytest.mark.parametrize(
    ("task", "facts", "wanted"),
    [
        ("regression", {}, [(3, 1), (0, 2), (1, 1)]),
        ("multilabel", {"at_least": 2.0}, [(1, 0), (0, 1), (0, 0)]),
        ("soft", {}, [(0.75, 0.25), (0, 1), (0.5, 0.5)]),
    ],
)
def test_labels_may_be_numbers(root, task, facts, wanted):
    plain = numbers(task, root, **facts)
    join.make("mine", "tables", join.Description.of(plain), root, root / "F")
    features = store.load(root / "F", "tables")
    assert (features.task, features.classes) == (task, ("joy", "grief"))
    assert [c.label for c in features.clips] == wanted
    np.testing.assert_array_equal(features.label, wanted)


def test_targets_may_be_pairs(root):
    plain = numbers("regression", root)
    assert join.Description.of(plain | {"targets": tuple(plain["targets"].items())}) == join.Description.of(plain)


@pytest.mark.parametrize(
    ("task", "row", "reason"),
    [
        ("regression", "b,y,,2,3", "joy, grief: nothing, 2; expected numbers"),
        ("regression", "b,y,nan,2,3", "joy, grief: nan, 2; expected numbers"),
        ("multilabel", "b,y,1,2,3", "joy, grief: 1, 2; expected 1 or 0"),
        ("soft", "b,y,0,0,3", "joy, grief: 0, 0; expected proportions or votes, one above 0 and none below"),
        ("soft", "b,y,2,-1,3", "joy, grief: 2, -1; expected proportions or votes, one above 0 and none below"),
    ],
)
def test_numbers_that_are_no_label_reject_the_row(root, task, row, reason):
    plain = numbers(task, root)
    (root / "labels.csv").write_text(f"clip,emotion,joy,grief,length\na,x,1,0,1\n{row}\n")
    corpus, _ = read(root, plain)
    assert dict(corpus.rejected) == {"b": reason, "c": "joy has no row in labels"}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"facts": {"label": {"of": "labels:emotion"}}}, "the fact label or targets, not both"),
        ({"targets": {}}, "the fact label or targets, not both"),
        ({"task": "single"}, r"tables\.task: 'single' is unknown; expected regression, multilabel, soft"),
        ({"targets": {"joy": {"of": "lables:joy"}}}, "'lables' is unknown; expected face, labels"),
    ],
)
def test_targets_that_do_not_fit_are_clear_errors(root, entries, message):
    with pytest.raises(AvjaxError, match=message):
        join.Description.of(numbers("regression", root) | entries)


def counted(root, lengths, value=1.0):
    steps = np.full((3, 4, 2), 1.0)
    steps[1, 2] = value
    (root / "a.pkl").write_bytes(pickle.dumps({"id": list(CLIPS), "x": steps, "n": lengths}))
    plain = described("a.pkl", "face:x", key="id", lengths={"x": "n"})
    return plain


@pytest.mark.parametrize("lengths", [[1, 4, 9], np.array([1, 4, 9]), np.array([1.0, 4.0, 9.0])])
def test_steps_beyond_a_rows_length_are_none(root, lengths):
    _, steps = read(root, counted(root, lengths))
    assert [len(steps[c]["video"][0]) for c in CLIPS] == [1, 4, 4]


def test_a_clip_without_any_step_is_rejected_and_lengths_are_whole_numbers(root):
    assert dict(read(root, counted(root, [0, 4, 4]))[0].rejected) == {"a": "no stream has a step"}
    with pytest.raises(AvjaxError, match=r"face:x: a length of '1\.5' steps; expected whole numbers"):
        read(root, counted(root, [1.5, 4, 4]))
    plain = counted(root, [1, 4, 4])
    plain["files"]["face"]["lengths"] = (("x", "m"),)
    with pytest.raises(AvjaxError, match="no column 'm' in face"):
        read(root, plain)


@pytest.mark.parametrize("value", [-np.inf, np.nan])
def test_what_is_no_finite_number_is_zero_where_that_is_said(root, value):
    plain = counted(root, [4, 4, 4], value)
    assert dict(read(root, plain)[0].rejected) == {"b": "video has 2 values that are no finite numbers"}
    plain["files"]["face"] |= {"missing": "zeros", "padding": "zeros"}
    _, steps = read(root, plain)
    assert steps["b"]["video"][0][2].tolist() == [0, 0]
    assert steps["b"]["video"][1].tolist() == [True, True, False, True]
