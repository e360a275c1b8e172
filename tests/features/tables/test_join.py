"""Tables that others measured become a feature store: rows meet by key, and whatever does not fit is said."""

import csv
import json
import pickle

import h5py
import numpy as np
import pytest

from avjax import config as configs
from avjax.datasets.folds import natural_folds
from avjax.errors import AvjaxError
from avjax.evaluation import baselines
from avjax.features import store
from avjax.features.tables import join
from avjax.training import batches, data
from avjax.training import lanes as lane_plans
from tests.conftest import REAL

EMOTIONS = ("sad", "angry", "sad", "happy")
PLAIN = {
    "files": {"face": {"path": "face.csv", "key": "name"}, "voice": {"path": "voice.npz", "key": "id"}},
    "streams": {"video": ("face:AU1..AU3",), "audio": ("voice:mfcc",)},
    "facts": {
        "label": {"of": "face:emotion"},
        "speaker": {"of": "key", "pattern": r"(s\d+)_.*"},
        "fold": {"of": "key", "pattern": r"(s\d+)_.*", "names": (("s0", "a"), ("s1", "b"))},
    },
}
IDS = tuple(f"s{i % 2}_{i}" for i in range(4))


def changed(where: str = "", **entries):
    """Returns `PLAIN` with entries added at a dotted key."""
    plain = json.loads(json.dumps(PLAIN))
    at = plain
    for part in filter(None, where.split(".")):
        at = at.setdefault(part, {})
    at.update(entries)
    return plain


def write_csv(path, rows, separator=","):
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=separator).writerows(rows)


@pytest.fixture
def root(tmp_path):
    """face.csv of four clips; voice.npz of the same in another order."""
    rows = [(i, e, n, 2 * n, -n) for n, (i, e) in enumerate(zip(IDS, EMOTIONS, strict=True), 1)]
    write_csv(tmp_path / "face.csv", [("name", "emotion", "AU1", "AU2", "AU3"), *rows], ";")
    np.savez(tmp_path / "voice.npz", id=np.array(IDS[::-1]), mfcc=np.arange(4 * 2 * 5.0).reshape(4, 2, 5)[::-1])
    return tmp_path


def read(root, plain=PLAIN):
    corpus, steps = join.read("mine", join.Description.of(plain), root)
    return corpus, dict(zip([c.id for c in corpus.clips], steps, strict=True))


def test_rows_of_two_files_meet_by_key(root):
    corpus, steps = read(root)
    assert [(c.id, c.label, c.speaker, c.fold) for c in corpus.clips] == [
        ("s0_0", "sad", "s0", "a"),
        ("s1_1", "angry", "s1", "b"),
        ("s0_2", "sad", "s0", "a"),
        ("s1_3", "happy", "s1", "b"),
    ]
    assert corpus.task.classes == ("angry", "happy", "sad")
    assert corpus.rejected == ()
    np.testing.assert_array_equal(steps["s0_2"]["video"][0], [[3, 6, -3]])  # a vector is one step
    np.testing.assert_array_equal(steps["s0_2"]["audio"][0], np.arange(20.0, 30).reshape(2, 5))
    assert all(x.dtype == np.float32 and mask.all() for s in steps.values() for x, mask in s.values())


def test_several_references_are_put_side_by_side(root):
    _, steps = read(root, changed("streams", video=("face:AU3", "face:AU1..AU2"), audio=("voice:mfcc", "voice:mfcc")))
    np.testing.assert_array_equal(steps["s1_1"]["video"][0], [[-2, 2, 4]])
    assert steps["s1_1"]["audio"][0].shape == (2, 10)


def columns(root, file, value):
    """The same three arrays by clip in different files."""
    if file.endswith(".npz"):
        np.savez(root / file, **value)
    elif file.endswith(".h5"):
        with h5py.File(root / file, "w") as made:
            for name, array in value.items():
                made[f"deep/er/{name}"] = array
    else:
        (root / file).write_bytes(pickle.dumps({"deep": {"er": value}}))


@pytest.mark.parametrize("file", ["a.npz", "a.h5", "a.pkl"])
def test_arrays_by_clip_may_be_of_unequal_length(root, file):
    columns(root, file, {i: np.full((n, 2), n) for n, i in enumerate(IDS, 1)})
    path = file if file.endswith(".npz") else f"{file}#deep/er"
    _, steps = read(root, changed("files.voice", path=path, key="*") | {"streams": {"audio": ("voice:value",)}})
    assert [len(steps[i]["audio"][1]) for i in IDS] == [1, 2, 3, 4]
    assert steps["s1_3"]["audio"][0].tolist() == [[4, 4]] * 4


def test_clips_of_a_pickle_may_have_arrays_by_name(root):
    (root / "a.pkl").write_bytes(pickle.dumps({i: {"x": np.ones(2), "label": "sad"} for i in IDS}))
    plain = changed("files.voice", path="a.pkl", key="*") | {"streams": {"audio": ("voice:x",)}}
    plain["facts"] = {"label": {"of": "voice:label"}}
    assert [c.label for c in read(root, plain)[0].clips] == ["sad"] * 4


def test_a_hostile_pickle_is_refused(root):
    (root / "a.pkl").write_bytes(b"cos\nsystem\n(Vtrue\ntR.")
    with pytest.raises(AvjaxError, match=r"a\.pkl: refused: os\.system"):
        read(root, changed("files.voice", path="a.pkl"))


def test_keys_may_stand_in_another_file_of_the_same_rows(root):
    write_csv(root / "names.txt", [[f"03-{i}"] for i in IDS])
    np.savez(root / "voice.npz", mfcc=np.arange(4.0))
    plain = changed("files.voice", key="names:0", pattern=r"03-(.*)")
    plain["files"]["names"] = {"path": "names.txt", "header": False}
    _, steps = read(root, plain)
    assert [s["audio"][0].item() for s in steps.values()] == [0, 1, 2, 3]
    write_csv(root / "names.txt", [["03-s0_0"]])
    with pytest.raises(AvjaxError, match=r"voice: rows \{'': 4\}, but \{'': 1\} in names:0"):
        read(root, plain)


def conversation(root):
    """Two parts of rows without keys, a dialogue of three turns and one of one; a word's zeros are padding."""
    for part, rows in (("fit", ["d1_10", "d1_2", "d2_1"]), ("eval", ["d1_1"])):
        words = np.ones((len(rows), 3, 2)) * np.array([0, 1, 1])[None, :, None]
        np.savez(root / f"words_{part}.npz", words=words, said=np.array(rows), score=np.arange(len(rows)) + 3.25)
    turn = {
        "dialogue": {"of": "words:said", "pattern": r"(.*)_\d+"},
        "turn": {"of": "words:said", "pattern": r".*_(.*)"},
    }
    return {
        "files": {"words": {"path": "words_{split}.npz", "padding": "zeros"}},
        "streams": {"text": ("words:words",)},
        "facts": {"label": {"of": "words:score", "at_least": 4.25, "names": (("0", "low"), ("1", "high"))},
                  "transcript": {"of": "words:said"}, **turn},
        "splits": (("fit", "train"), ("eval", "test")),
    }  # fmt: skip


def test_splits_dialogues_turns_and_padding(tmp_path):
    corpus, steps = read(tmp_path, conversation(tmp_path))
    assert [(c.id, c.split, c.dialogue, c.turn, c.label) for c in corpus.clips] == [
        ("fit-0", "train", "d1", 10, "low"), ("fit-1", "train", "d1", 2, "high"),
        ("fit-2", "train", "d2", 1, "high"), ("eval-0", "test", "d1", 1, "low"),
    ]  # fmt: skip
    assert corpus.task.classes == ("low", "high")
    assert steps["fit-1"]["text"][1].tolist() == [False, True, True]


def test_store_keeps_splits_dialogues_and_text(tmp_path):
    join.make("talk", "tables", join.Description.of(conversation(tmp_path)), tmp_path, tmp_path / "F")
    features = store.load(tmp_path / "F", "tables")
    assert [(c.split, c.dialogue, c.turn) for c in features.clips][:2] == [("train", "d1", 10), ("train", "d1", 2)]
    assert features.arrays["text_given"].shape == (4, 2, 2)  # without the padding
    assert features.sentences == {"given": ["d1_10", "d1_2", "d2_1", "d1_1"]}
    assert features.arrays.keys() == {"text_given"}
    assert features.counts == {"used": 4, "quarantined": 0, "masked_audio": 4, "masked_video": 4}


def rejections(root, plain=PLAIN):
    return dict(read(root, plain)[0].rejected)


def test_rows_that_cannot_be_used_are_counted_with_their_reasons(root):
    rows = [("s0_0", "sad", 1, 2, 3), ("s1_1", "angry", "nan", "x", 3), ("s0_2", "", 1, 2, 3), ("s1_9", "sad", 1, 2, 3),
            ("s7_1", "sad", 1, 2, 3)]  # fmt: skip
    write_csv(root / "face.csv", [("name", "emotion", "AU1", "AU2", "AU3"), *rows])
    assert rejections(root) == {
        "s1_1": "video has 2 values that are no finite numbers",
        "s0_2": "no label",
        "s1_9": "audio has no row in voice:mfcc",
        "s7_1": "fold is 's7'; expected one of s0, s1",
        "s1_3": "label has no row in face",
    }


@pytest.mark.parametrize(
    ("fact", "entry", "reason"),
    [
        ("label", {"of": "face:emotion", "names": (("sad", "sad"),)}, "label is 'angry'; expected one of sad"),
        ("label", {"of": "face:emotion", "pattern": "(s.*)"}, r"label is 'angry'; expected (s.*)"),
        ("label", {"of": "face:emotion", "at_least": 1.0}, "label is 'angry'; expected a number"),
        ("split", {"of": "face:emotion", "names": (("sad", "Train"), ("happy", "dev"), ("angry", "x"))},
         "split is 'x'; expected train, val or test"),
    ],
)  # fmt: skip
def test_facts_that_are_not_as_described_reject_the_row(root, fact, entry, reason):
    plain = changed("facts", **{fact: entry})
    if "at_least" in entry:
        with pytest.raises(AvjaxError, match="none of 4 rows can be used; the first: s0_0: label is 'sad'"):
            read(root, plain)
    else:
        assert rejections(root, plain)["s1_1"] == reason


def test_a_row_in_two_splits_or_with_an_odd_turn_is_rejected(tmp_path):
    plain = conversation(tmp_path)
    np.savez(tmp_path / "other.npz", k=np.array(["eval-0", "fit-0", "fit-1", "fit-2"]), x=np.ones(4))
    plain["files"]["other"] = {"path": "other.npz", "key": "k"}
    plain["facts"]["turn"] = {"of": "words:said", "pattern": r".(.*)"}
    with pytest.raises(AvjaxError, match="turn is '1_10'; expected a whole number"):
        read(tmp_path, plain)
    np.savez(tmp_path / "again_fit.npz", k=np.array(["eval-0"]), x=np.ones(1))
    np.savez(tmp_path / "again_eval.npz", k=np.array(["fit-0"]), x=np.ones(1))
    plain = conversation(tmp_path)
    plain["files"]["again"] = {"path": "again_{split}.npz", "key": "k"}
    plain["streams"]["audio"] = ("again:x",)
    with pytest.raises(AvjaxError, match="fit-0: is in the splits eval and fit"):
        read(tmp_path, plain)


def test_parts_of_a_stream_with_other_numbers_of_steps_reject_the_row(root):
    with pytest.raises(AvjaxError, match="audio has 2 in voice:mfcc, 1 in face:AU1 steps"):
        read(root, changed("streams", audio=("voice:mfcc", "face:AU1")))


@pytest.mark.parametrize(
    ("where", "entries", "message"),
    [
        ("files.face", {"path": "nowhere.csv"}, r"nowhere\.csv: no such file; set --config\.data\.root"),
        ("files.face", {"key": "emotion"}, "face: 1 keys stand there twice, such as 'sad'"),
        ("files.face", {"pattern": "(x.*)"}, r"face: 's0_0' is no key; expected \(x"),
        ("files.face", {"pth": "x"}, "unexpected keyword argument 'pth'"),
        ("files.voice", {"path": "voice.mat"}, r"voice\.mat: expected \.csv, \.tsv, \.txt, \.npz, \.h5, \.pkl"),
        ("files.voice", {"key": "nmes:0"}, "'nmes' is unknown; expected face, voice"),
        ("streams", {"video": ("face:AU1..AU9",)}, "no column 'AU9' in face; it has name, emotion, AU1, AU2, AU3"),
        ("streams", {"video": ("fce:AU1",)}, "'fce' is unknown; expected face, voice"),
        ("streams", {"voice": ("voice:mfcc",)}, "'voice' is unknown; expected video, flow, audio, text"),
        ("facts", {"actor": {"of": "key"}}, "'actor' is unknown; expected label, id"),
        ("facts", {"turn": {"of": "key"}}, "dialogue and turn both or neither"),
        ("facts", {"id": {"of": "face:emotion"}}, "1 times two clips have one id, such as sad"),
        ("facts", {"label": {"of": "face:emotoin"}}, "no column 'emotoin' in face"),
        ("", {"splits": (), "more": 1}, "unexpected keyword argument 'more'"),
    ],
)
def test_descriptions_that_do_not_fit_are_clear_errors(root, where, entries, message):
    (root / "voice.mat").touch()
    with pytest.raises(AvjaxError, match=message):
        join.make("mine", "tables", join.Description.of(changed(where, **entries)), root, root / "F")


def test_two_equal_turns_are_an_error(tmp_path):
    plain = conversation(tmp_path)
    plain["facts"]["turn"] = {"of": "words:said", "pattern": r".*_.*?(\d)"}
    np.savez(tmp_path / "words_eval.npz", words=np.ones((1, 3, 2)), said=np.array(["d1_2"]), score=np.ones(1))
    with pytest.raises(AvjaxError, match=r"two clips have one dialogue and turn, such as \('d1', 2\)"):
        read(tmp_path, plain)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("face.csv", b"", "is empty"),
        ("face.csv", b"name,emotion,AU1,AU2,AU3\n", r"face: no rows in face\.csv"),
        ("face.csv", b"name,AU1,AU1\n", "two columns have one name"),
        ("face.csv", b"name,AU1\ns0_0,1\ns0_1\n", "line 3: 1 cells; expected 2"),
        ("face.csv", b"name,\xff\n", "line 1: not UTF-8; save the table as UTF-8"),
        ("voice.npz", b"PK\x03\x04 cut", "expected an .npz of numbers and text"),
        ("voice.h5", b"no hdf", "expected an HDF5 file"),
        ("voice.pkl", pickle.dumps([1]), "holds list; expected arrays by name"),
        ("voice.pkl", pickle.dumps({"id": np.array(IDS), "mfcc": np.ones((3, 2))}), "arrays of 3, 4 rows"),
        ("voice.pkl", pickle.dumps({"id": np.array(IDS), "mfcc": np.ones((4, 2, 2, 2))}), r"expected \(d,\) or"),
        ("voice.pkl", pickle.dumps({"id": np.array(IDS), "mfcc": np.ones(4, complex)}), "expected numbers"),
    ],
)
def test_files_that_are_no_tables_are_clear_errors(root, file, content, message):
    (root / file).write_bytes(content)
    plain = PLAIN if file == "face.csv" else changed("files.voice", path=file)
    with pytest.raises(AvjaxError, match=message):
        read(root, plain)


def test_arrays_of_objects_in_an_npz_are_not_unpickled(root):
    np.savez(root / "voice.npz", id=np.array(IDS), mfcc=np.array([{}] * 4, object), allow_pickle=True)
    with pytest.raises(AvjaxError, match=r"expected an \.npz of numbers and text"):
        read(root)


def packed(root, plain=PLAIN):
    join.make("mine", "tables", join.Description.of(plain), root, root / "F")
    return store.read_index(root / "F")["presets"]["tables"]["content"]


def test_the_store_is_made_anew_only_where_a_file_or_the_description_changed(root, monkeypatch):
    content = packed(root)
    with monkeypatch.context() as patch:
        patch.setattr(join, "read", None)  # would fail if it were called
        assert packed(root) == content
    face = (root / "face.csv").read_text()
    (root / "face.csv").write_text(face.replace("s0_0;sad;1", "s0_0;sad;7"))
    assert packed(root) != content
    (root / "face.csv").write_text(face)
    assert packed(root, changed("streams", video=("face:AU1",))) != content
    assert packed(root) == content


def test_quarantine_lists_what_was_rejected(root):
    (root / "face.csv").write_text((root / "face.csv").read_text().replace("happy", ""))
    packed(root)
    assert (root / "F/quarantine.csv").read_text().split() == ["clip_id,reason", "s1_3,no", "label"]
    with pytest.raises(AvjaxError, match="expected small letters"):
        join.make("My set", "tables", join.Description.of(PLAIN), root, root / "G")


def real(spec):
    if not (REAL / "mmmo").is_dir():
        pytest.skip(f"the tables are not at {REAL} (set AVJAX_TEST_DATA)")
    return configs.settings(spec, data__root=str(REAL))


def obtained(config):
    from rich.console import Console

    return data.obtain(config, Console(quiet=True))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("AVJAX_CACHE", str(tmp_path))
    return tmp_path


def yardstick(config, features):
    folds, _ = natural_folds(features.clips, features.folds)
    plan = lane_plans.plan(features, folds, (0,), config.protocol)
    given = batches.resident(features, config.model.text_source, config.protocol.standardise)
    return plan, {k: v["mean"]["war"] for k, v in baselines.yardsticks(given, plan).items()}


def test_ravdess(cache):
    config = real("configs/ravdess_features.py:both_aus,speaker_norm")
    features = obtained(config)
    assert features.counts == {"used": 1440, "quarantined": 0, "masked_audio": 0, "masked_video": 0}
    assert {k: v.shape for k, v in features.arrays.items()} == {"audio": (1440, 1, 112), "video": (1440, 1, 70)}
    # Luna's own rows beside the second run's of the same clip: both saw the same faces.
    a, b = np.split(features.arrays["video"][:, 0], 2, -1)
    assert np.corrcoef(a[:, 8], b[:, 8])[0, 1] > 0.8  # AU12, lip corners
    assert features.classes[0] == "neutral"
    assert np.bincount(features.label).tolist() == [96] + [192] * 7
    tested = {
        f.name: {c.speaker for c in features.clips if c.id in f.test} for f in natural_folds(features.clips, ())[0]
    }
    assert tested["4"] == {"01", "04", "09", "22"}
    assert sorted(map(len, tested.values())) == [4, 5, 5, 5, 5]


def test_mosi_is_dialogues_in_the_order_in_which_they_were_spoken(cache):
    features = obtained(real("configs/mosi_utterance.py:tav"))
    assert {k: v.shape[-1] for k, v in features.arrays.items()} == {"audio": 73, "video": 100, "text_given": 100}
    assert [sum(c.split == s for c in features.clips) for s in ("train", "test")] == [1447, 752]
    assert len({c.dialogue for c in features.clips}) == 93
    first = sorted((c for c in features.clips if c.dialogue == "03bSnISJMiM"), key=lambda c: c.turn)
    assert [c.turn for c in first] == list(range(1, 14))  # as text 10 comes before 2
    assert first[0].transcript == "ANYHOW IT WAS REALLY GOOD"
    # The label stands in the feature files, too: it agrees for every row.
    with (REAL / "mosi_utterance/audio_test0.csv").open() as file:
        labels = [float(row[-1]) for row in csv.reader(file)]
    assert labels == [features.classes.index(c.label) for c in features.clips if c.split == "test"]


def test_mmmo_beats_the_majority_with_masked_padding(cache):
    config = real("configs/mmmo.py:av")
    features = obtained(config)
    masked = {s: round(float(1 - features.masks[s].mean()), 3) for s in ("audio", "video")}
    assert masked == {"audio": 0.065, "video": 0.176}
    assert [sum(c.split == s for c in features.clips) for s in ("train", "val", "test")] == [220, 40, 80]
    plan, scores = yardstick(config, features)
    assert plan.counts[0] == {"n_train": 220, "n_val": 40, "n_test": 80, "speaker_overlap": None}
    assert scores.keys() == {"audio", "video", "audio+video"}
    assert scores["audio+video"] > 0.55


def test_without_data_and_without_a_store_the_error_names_the_folder(cache, monkeypatch):
    monkeypatch.setenv("AVJAX_DATA", str(cache))
    with pytest.raises(AvjaxError, match=r"mmmo: no such folder; set --config\.data\.root"):
        obtained(configs.settings("configs/mmmo.py"))
    config = real("configs/mmmo.py")
    content = obtained(config).content
    assert obtained(configs.settings("configs/mmmo.py")).content == content  # the store is enough
    with pytest.raises(AvjaxError, match="nowhere: no such folder"):
        obtained(configs.settings("configs/mmmo.py", data__root="/nowhere"))
