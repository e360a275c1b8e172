"""The feature store: what is written is whole, what is read is what was written, and confusion is refused."""

import json
import os
import pathlib
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from avjax.datasets.base import Clip, Corpus, Fold, Task
from avjax.errors import AvjaxError
from avjax.features import clip as clip_features
from avjax.features import presets, tfds
from avjax.features import store as stores


def corpus(count=4, labels=("angry", "sad"), **changes):
    clips = tuple(
        Clip(f"sub/clip {i}", None, labels[i % len(labels)], speaker=f"s{i % 2}", split="train") for i in range(count)
    )
    folds = (Fold("1", tuple(c.id for c in clips[1:]), (clips[0].id,)),)
    return Corpus("folder", Task("single", tuple(sorted(set(labels)))), clips, folds, **changes)


def example(clip, steps=3):
    """A packed record; clip 1 has neither video nor text."""
    rng = np.random.default_rng(int(clip.id[-1]))
    t = 0 if clip.id.endswith("1") else steps
    video_features = {"video": rng.normal(size=(t, 5)).astype(np.float32), "video_mask": np.arange(t) != 1,
               "au": np.ones((t, 2), np.float32), "times": np.arange(t) / 2}  # fmt: skip
    audio_features = {"audio": rng.normal(size=(7, 4)).astype(np.float32), "audio_mask": np.arange(7) < 6,
             "prosody": np.array([200, 4, 0], np.float32), "seconds": np.array(2.5),
             "surface": np.array((0.1, -20), np.float32)}  # fmt: skip
    text = {s: rng.normal(size=(t, 6)).astype(np.float32) for s in clip_features.TEXTS}
    staged = {"video": video_features, "audio": audio_features, "text": text}
    return clip_features.example(
        clip, presets.PRESETS["lite"], staged, {s: f"{s} of {clip.id}: “é”" for s in clip_features.TEXTS}
    )


def pack(root, data=None, preset="lite", make=example):
    data = data or corpus()
    with stores.Store(root, data.name).locked() as store:
        keys = {c.id: {feature: (feature[0], "s") for feature in ("video", "audio", "text")} for c in data.clips}
        recipe = stores.recipe(data, data.clips, keys)
        entries = {"rejected": (), "keys": keys, "made_by": {}}
        store.pack(data, data.clips, preset, [lambda: map(make, data.clips)], recipe, entries)
        assert store.is_packed(preset, recipe)
        assert not store.is_packed(preset, "other")
    return stores.read_index(root)["presets"][preset]["content"]


def leftovers(root):
    return [p for p in root.rglob("*") if p.name.endswith(".part") or "incomplete" in p.name]


def test_packed_view_gives_back_what_was_packed(tmp_path):
    content = pack(tmp_path)
    loaded = stores.load(tmp_path, "lite")
    data = corpus()
    assert loaded.ids == [c.id for c in data.clips]
    assert loaded.folds == data.folds
    assert loaded.content == content
    assert loaded.classes == ("angry", "sad")
    assert loaded.label.tolist() == [0, 1, 0, 1]
    assert loaded.label.dtype == np.int32
    assert loaded.speakers == ["s0", "s1", "s0", "s1"]
    assert [c.split for c in loaded.clips] == ["train"] * 4
    assert loaded.sentences["both"][1] == "both of sub/clip 1: “é”"
    for i, clip in enumerate(data.clips):
        packed = example(clip)
        for name in ("video", "audio"):
            steps, mask = packed[name], packed[f"{name}_mask"]
            assert loaded.arrays[name].dtype == np.float32
            np.testing.assert_array_equal(loaded.masks[name][i], np.pad(mask, (0, (3, 7)[name == "audio"] - len(mask))))
            np.testing.assert_array_equal(loaded.arrays[name][i][: len(steps)][mask], steps[mask])
            assert not loaded.arrays[name][i][~loaded.masks[name][i]].any(), "zeros where masked"
        np.testing.assert_array_equal(loaded.arrays["text_audio"][i][loaded.masks["text_audio"][i]],
                                      packed["text"]["audio"])  # fmt: skip
    assert not loaded.masks["video"][1].any()
    assert not loaded.masks["text_both"][1].any()
    assert not leftovers(tmp_path)


def with_images(clip):
    """A packed record of raw images, whose second one is masked."""
    made = example(clip)
    rng = np.random.default_rng(int(clip.id[-1]))
    t = 0 if clip.id.endswith("1") else 3
    images = rng.integers(0, 256, (t, 4, 5, 3), np.uint8)
    return made | {"video": images, "video_mask": np.arange(t) != 1}


def test_images_stay_bytes(tmp_path):
    pack(tmp_path, make=with_images)
    loaded = stores.load(tmp_path, "lite")
    video, mask = loaded.arrays["video"], loaded.masks["video"]
    assert (video.shape, video.dtype) == ((4, 3, 4, 5, 3), np.uint8)
    assert mask.tolist() == [[True, False, True], 3 * [False], [True, False, True], [True, False, True]]
    for i, clip in enumerate(corpus().clips):
        np.testing.assert_array_equal(video[i][mask[i]], with_images(clip)["video"][[0, 2][: mask[i].sum()]])
    assert not video[~mask].any(), "zeros where masked"
    record = next(r for r in tfds.read(tmp_path, "folder", "lite") if r["clip_id"] == b"sub/clip 2")
    assert record["video"].dtype == np.uint8


def test_dense_keeps_images_and_makes_all_else_float32():
    masks = [np.array([True, False]), np.zeros(0, bool)]
    for given, dtype in ((np.uint8, np.uint8), (np.float16, np.float32), (np.float64, np.float32)):
        steps = [np.arange(6).reshape(2, 3).astype(given), np.zeros((0, 3), given)]
        made, mask = stores.dense(steps, masks)
        assert made.dtype == dtype
        assert made.tolist() == [[[0, 1, 2], [0, 0, 0]], [[0, 0, 0], [0, 0, 0]]]
        assert mask.tolist() == [[True, False], [False, False]]
    steps = [np.array([[1.0], [np.nan]])]
    assert stores.dense(steps, masks[:1])[0].tolist() == [[[1], [0]]], "what is masked does not matter"
    assert stores.dense([np.zeros((0, 2, 2, 3), np.uint8)], masks[1:])[0].shape == (1, 1, 2, 2, 3)


@pytest.mark.parametrize(
    ("kind", "labels", "dtype"),
    [
        ("regression", [(0.5, -0.25), (1.0, 0.0), (0.1, 2.0)], np.float32),
        ("multilabel", [(1, 0), (0, 0), (1, 1)], bool),
    ],
)
def test_labels_of_other_tasks_are_given_back(tmp_path, kind, labels, dtype):
    clips = tuple(Clip(f"c{i}", None, tuple(map(float, label)), speaker="s") for i, label in enumerate(labels))
    data = Corpus("folder", Task(kind, ("x", "y")), clips, (Fold("1", ("c0", "c1"), ("c2",)),))
    content = pack(tmp_path, data)
    loaded = stores.load(tmp_path, "lite")
    assert (loaded.task, loaded.classes) == (kind, ("x", "y"))
    assert (loaded.label.dtype, loaded.label.shape) == (dtype, (3, 2))
    np.testing.assert_array_equal(loaded.label, np.array(labels, dtype))
    assert [c.label for c in loaded.clips] == [c.label for c in clips]
    assert stores.Store(tmp_path).read_measured("lite")[0].task == data.task
    changed = Corpus("folder", data.task, (Clip("c0", None, (0.0, 1.0), speaker="s"), *clips[1:]), data.folds)
    assert pack(tmp_path, changed) != content, "a label counts"


def test_packed_record_has_all_that_the_design_names(tmp_path):
    pack(tmp_path)
    record = next(r for r in tfds.read(tmp_path, "folder", "lite") if r["clip_id"] == b"sub/clip 2")
    assert set(record) == {"clip_id", "label", "speaker", "duration", "video", "video_mask", "au", "times", "audio",
                           "audio_mask", "prosody", "surface", "sentence", "text"}  # fmt: skip
    assert record["duration"] == np.float32(2.5)
    assert record["prosody"].tolist() == [200, 4, 0]
    assert record["sentence"]["constant"].decode() == "constant of sub/clip 2: “é”"


def test_content_is_of_the_values_alone(tmp_path):
    def other(clip):
        made = example(clip)
        made["prosody"][0] += (clip.id[-1] == "3") * 1e-4
        return made

    content = pack(tmp_path / "a")
    assert pack(tmp_path / "b") == content == pack(tmp_path / "a")
    assert pack(tmp_path / "c", make=other) != content


def test_no_tensorflow(tmp_path):
    pack(tmp_path)
    code = f"""
        import pathlib, sys
        from avjax.features import store
        assert len(store.load(pathlib.Path({str(tmp_path)!r}), "lite").ids) == 4
        assert "tensorflow" not in sys.modules and "torch" not in sys.modules, "heavy import"
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_load_names_what_is_missing(tmp_path):
    with pytest.raises(AvjaxError, match=r"no finished feature store .*avjax\.extract .*--out"):
        stores.load(tmp_path, "lite")
    pack(tmp_path)
    with pytest.raises(AvjaxError, match=r"with preset 'other' \(it has: lite\); make it with"):
        stores.load(tmp_path, "other")
    with pytest.raises(AvjaxError, match=r"not all clips are measured with preset 'other'"):
        stores.Store(tmp_path).read_measured("other")
    packed = tfds.folder(tmp_path, "folder", "lite")
    packed.rename(tmp_path / "gone")
    with pytest.raises(AvjaxError, match=r"lite/[\d.]+: the packed view is gone; delete .*index\.json and run"):
        stores.load(tmp_path, "lite")


def test_a_pack_that_breaks_off_is_unfinished_and_can_be_done_again(tmp_path):
    def break_off(clip):
        if clip.id.endswith("2"):
            raise KeyboardInterrupt
        return example(clip)

    content = pack(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        pack(tmp_path, make=break_off)
    with pytest.raises(AvjaxError, match="no finished feature store"):
        stores.load(tmp_path, "lite")
    assert not leftovers(tmp_path)
    assert [c.id for c, *_ in stores.Store(tmp_path).read_measured("lite")[1]] == [c.id for c in corpus().clips]
    assert pack(tmp_path) == content
    assert len(stores.load(tmp_path, "lite").ids) == 4


def test_presets_of_a_store_agree_about_its_clips(tmp_path):
    pack(tmp_path)
    pack(tmp_path, preset="other")
    assert stores.load(tmp_path, "lite").ids == stores.load(tmp_path, "other").ids
    pack(tmp_path, corpus(5), preset="other")
    assert len(stores.load(tmp_path, "other").ids) == 5
    with pytest.raises(AvjaxError, match=r"with preset 'lite' \(it has: other\)"):
        stores.load(tmp_path, "lite")
    with pytest.raises(AvjaxError, match="not all clips are measured with preset 'lite'"):
        stores.Store(tmp_path).read_measured("lite")


def test_recipe_depends_on_data_and_ingredients_but_not_on_paths():
    data = corpus()
    original = stores.recipe(data, data.clips, [1])
    moved = [Clip(**vars(c) | {"path": "/elsewhere"}) for c in data.clips]
    assert stores.recipe(data, moved, [1]) == original
    assert stores.recipe(data, data.clips, [2]) != original
    assert stores.recipe(data, data.clips[:-1], [1]) != original
    relabelled = corpus(labels=("sad", "angry"))
    assert stores.recipe(relabelled, relabelled.clips, [1]) != original


def test_a_store_has_one_writer_and_one_data_set(tmp_path):
    code = f"""
        import pathlib, sys
        from avjax.features import store
        with store.Store(pathlib.Path({str(tmp_path)!r}), "folder").locked():
            print("locked", flush=True)
            sys.stdin.read()
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(AvjaxError, match="another process is writing to it"), stores.Store(tmp_path, "x").locked():
            pass
    finally:
        other.kill()
        other.communicate()
    pack(tmp_path)
    with pytest.raises(AvjaxError, match="holds features of folder, not mafw"), stores.Store(tmp_path, "mafw").locked():
        pass


def test_leftovers_of_killed_writers_are_swept_before_and_after(tmp_path):
    def litter():
        (tmp_path / "staged/x").mkdir(parents=True, exist_ok=True)
        (tmp_path / "staged/x/.video-k.npz.123.part").write_bytes(b"half")
        (tmp_path / "tfds/avjax_folder/lite/incomplete.ABC_1.0.0").mkdir(parents=True)
        (tmp_path / "tfds/avjax_folder/lite/incomplete.ABC_1.0.0/file").write_bytes(b"half")

    litter()
    with stores.Store(tmp_path, "folder").locked():
        assert not leftovers(tmp_path)
        litter()
    assert not leftovers(tmp_path)


def test_staged_files(tmp_path):
    store = stores.Store(tmp_path)
    made = {"x": np.arange(3, dtype=np.float32), "why": np.array("nö")}
    for clip_id in ("a/b", "a%2Fb", "..", "x" * 400, "é ü", "A.b"):
        assert not store.has(clip_id, "video", "k1")
        store.put(clip_id, "video", "k1", made)
        assert store.has(clip_id, "video", "k1")
        assert not store.has(clip_id, "video", "k2")
        got = store.get(clip_id, "video", "k1")
        assert got.keys() == made.keys()
        assert got["why"] == "nö"
        np.testing.assert_array_equal(got["x"], made["x"])
        assert store.get(clip_id, "video", "k1", "x").keys() == {"x"}
    files = list(tmp_path.rglob("*.npz"))
    assert len(files) == 6
    assert all(f.parent.parent == tmp_path / "staged" for f in files)


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(AvjaxError, match=r"cannot be written \(No space left on device\); fix that"):
        stores.Store(tmp_path).put("a", "video", "k", {})
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_provenance_is_kept_under_a_key_that_changes_with_it(tmp_path):
    store = stores.Store(tmp_path)
    keys = {store.record({"frames": n, "code": 1}) for n in (16, 17, 16)}
    assert len(keys) == 2
    for key in keys:
        assert json.loads((tmp_path / f"provenance/{key}.json").read_text())["frames"] in (16, 17)


def test_tables(tmp_path):
    store = stores.Store(tmp_path)
    columns = ("clip_id", "reason")
    assert store.read_table("t.csv", columns) == []
    rows = [("a", 'two\nlines, "quoted"; é'), ("b", "")]
    store.write_table("t.csv", columns, rows)
    assert [tuple(r.values()) for r in store.read_table("t.csv", columns)] == rows
    path = tmp_path / "t.csv"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b"c\r\n")
    assert store.read_table("t.csv", columns)[-1] == {"clip_id": "c", "reason": ""}
    path.write_text("clip_id;reason\na;b\n")
    assert store.read_table("t.csv", columns) == [{"clip_id": "a", "reason": "b"}], "as some spreadsheets save it"
    path.write_text("clip,why\n")
    with pytest.raises(AvjaxError, match=r"t\.csv: no column clip_id, reason; got clip, why; expected clip_id, reason"):
        store.read_table("t.csv", columns)
    path.write_bytes("clip_id,reason\nä,x\n".encode("latin-1"))
    with pytest.raises(AvjaxError, match=r"t\.csv, line 2: not UTF-8"):
        store.read_table("t.csv", columns)


def test_default_path(tmp_path, monkeypatch):
    monkeypatch.setenv("AVJAX_CACHE", str(tmp_path))
    assert stores.path_of("mafw") == tmp_path / "features/mafw"
    assert stores.path_of("mafw", "~/F").name == "F"
    assert stores.path_of("mafw", "~/F").is_absolute()


def test_folders_do_not_share_a_default_path(monkeypatch):
    monkeypatch.setenv("AVJAX_CACHE", "/somewhere")
    assert stores.path_of("mafw") == pathlib.Path("/somewhere/features/mafw")
    assert stores.path_of("folder", "F") == pathlib.Path("F")
    with pytest.raises(AvjaxError, match="no feature store named"):
        stores.path_of("folder")
