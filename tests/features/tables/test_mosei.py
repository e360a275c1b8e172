"""CMU-MOSEI on generated miniatures: MMSA's pickles and the files of the CMU Multimodal SDK."""

import json
import pickle

import h5py
import numpy as np
import pytest
from rich.console import Console

from avjax import config as configs
from avjax import train
from avjax.errors import AvjaxError
from avjax.features.tables import mosei
from avjax.training import data

SPEC = "configs/mosei.py"
WIDTHS = {"text": 768, "audio": 74, "vision": 35}
TRAINING = {
    "train__epochs": 2,
    "train__epochs_per_call": 2,
    "train__seeds": (1, 2),
    "model__settings__width": 8,
    "model__settings__hidden": 8,
}


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("AVJAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "R").mkdir()
    return tmp_path / "R"


def obtained(root, variants=""):
    config = configs.settings(f"{SPEC}:{variants}", data__root=str(root))
    return data.obtain(config, Console(quiet=True))


# ---- MMSA ---------------------------------------------------------------------------------------------------------


def write_mmsa(root, name, steps):
    """Eight utterances of two videos in each part; of the first one all steps but the last are padding."""
    rng = np.random.default_rng(0)
    parts = {}
    for part in ("train", "valid", "test"):
        label = rng.integers(-9, 10, 8) / 3
        streams = {s: rng.normal(size=(8, n, WIDTHS[s])).astype(np.float32) for s, n in steps.items()}
        for values in streams.values():
            values[0, :-1] = 0
        streams["audio"][1, 0, :3] = -np.inf
        ids = [f"{part}-_{i // 4}$_${3 * (i % 4)}" for i in range(8)]
        lengths = {f"{s}_lengths": [3] * 8 for s in ("audio", "vision")}
        parts[part] = streams | lengths | {"id": ids, "raw_text": [f"said {i}" for i in ids]}
        parts[part] |= {"regression_labels": label.astype(np.float32), "classification_labels": np.sign(label)}
        parts[part] |= {"text_bert": np.ones((8, 3, 5), np.float32), "annotations": ["Neutral"] * 8}
    (root / name).write_bytes(pickle.dumps(parts, 4))


def test_an_aligned_file(root):
    write_mmsa(root, "aligned_50.pkl", dict.fromkeys(WIDTHS, 5))
    features = obtained(root)
    assert (features.dataset, features.task, features.classes) == ("mosei:sentiment", "regression", ("sentiment",))
    assert [(sum(c.split == s for c in features.clips)) for s in ("train", "val", "test")] == [8, 8, 8]
    last = features.clips[7]
    assert (last.id, last.dialogue, last.turn, last.speaker) == ("train-_1$_$9", "train-_1", 9, None)
    assert last.transcript == "said train-_1$_$9"
    shapes = {name: array.shape for name, array in features.arrays.items()}
    assert shapes == {"audio": (24, 5, 74), "video": (24, 5, 35), "text_given": (24, 5, 768)}
    assert features.masks["video"][0].tolist() == [False] * 4 + [True]
    assert features.masks["text_given"][0].tolist() == [True] + [False] * 4  # padding is left out of texts
    assert features.arrays["audio"][1, 0, :4].tolist()[:3] == [0, 0, 0]
    assert features.masks["audio"][1].all()
    assert features.counts["quarantined"] == 0


def test_lengths_of_an_unaligned_file_limit_its_steps(root):
    write_mmsa(root, "unaligned_50.pkl", {"text": 5, "audio": 9, "vision": 7})
    features = obtained(root, "unaligned")
    shapes = {name: array.shape[1] for name, array in features.arrays.items()}
    assert shapes == {"audio": 3, "video": 3, "text_given": 5}


@pytest.mark.thorough
def test_training_measures_sentiment_as_the_field_does(root, tmp_path, capsys):
    write_mmsa(root, "aligned_50.pkl", dict.fromkeys(WIDTHS, 5))
    workdir = train.train(configs.settings(SPEC, data__root=str(root), **TRAINING), tmp_path / "W")
    result = json.loads((workdir / "metrics.json").read_text())
    with np.load(workdir / "predictions.npz") as rows:
        y, x = rows["label"][:, 0].astype(float), rows["logits_fusion"][:, 0].astype(float)
    assert result["dataset"] == "mosei:sentiment"
    assert result["folds"][0]["speaker_overlap"] is None
    assert set(result["sentiment"]) == {
        *("acc2_has0", "acc2_non0", "f1_has0", "f1_non0"),
        *("acc5", "acc7", "mae", "corr"),
    }
    assert result["sentiment"]["acc2_has0"] == pytest.approx(np.mean((y >= 0) == (x >= 0)))
    assert result["sentiment"]["acc7"] == pytest.approx(np.mean(np.round(y.clip(-3, 3)) == np.round(x.clip(-3, 3))))
    assert result["sentiment"]["mae"] == pytest.approx(np.mean(np.abs(y - x)))
    expected = f"mean absolute error {result['sentiment']['mae']:.3f}"
    assert expected in (workdir / "report.html").read_text()
    assert "Sentiment, pooled: two-class accuracy" in " ".join(capsys.readouterr().out.split())


# ---- The SDK ------------------------------------------------------------------------------------------------------

FOLDS = {"train": ("va", "vb"), "valid": ("vc",), "test": ("vd", "-4")}


def write_sequence(path, name, videos):
    """`videos`: video → (features, intervals)."""
    with h5py.File(path, "w") as file:
        file[f"{name}/metadata/version"] = 1
        for video, (features, intervals) in videos.items():
            file[f"{name}/data/{video}/features"] = features
            file[f"{name}/data/{video}/intervals"] = np.asarray(intervals, float).reshape(-1, 2)


def ticks(count, step):
    start = np.arange(count) * step
    return np.stack([start, start + step], -1)


def write_sdk(root, videos=("va", "vb", "vc", "vd", "-4", "stray")):
    """Two utterances of each video, 0 to 2 and 2 to 4 s, the later first; audio at 50, video at 10 steps per second."""
    rng = np.random.default_rng(0)
    label = np.array([[1, 0, 2 / 3, 0, 0, 0, 0], [-2, 0.5, 0, 0, 0, 0, 1 / 3]])
    write_sequence(root / "CMU_MOSEI_Labels.csd", "All Labels", {v: (label, [(2.0, 4.0), (0.0, 2.0)]) for v in videos})
    audio = {v: (rng.normal(size=(200, 74)), ticks(200, 0.02)) for v in videos}
    audio["va"][0][:, 0] = np.arange(200)
    audio["vb"][0][7, 1] = -np.inf
    del audio["vc"]
    write_sequence(root / "CMU_MOSEI_COVAREP.csd", "COVAREP", audio)
    video = {v: (np.full((40, 35), 1.0) * np.arange(1, 41)[:, None], ticks(40, 0.1)) for v in videos}
    write_sequence(root / "CMU_MOSEI_VisualFacet42.csd", "FACET 4.2", video)
    words = {v: (rng.normal(size=(4, 300)), ticks(4, 1.0)) for v in videos}
    write_sequence(root / "CMU_MOSEI_TimestampedWordVectors.csd", "glove_vectors", words)
    words_said = {v: (np.array([[b"well"], [b"sp"], [b"good"], [b"bye"]]), ticks(4, 1.0)) for v in videos}
    write_sequence(root / "CMU_MOSEI_TimestampedWords.csd", "words", words_said)
    lists = "".join(f"standard_{part}_fold = {list(names)!r}\n" for part, names in FOLDS.items())
    (root / "cmu_mosei_std_folds.py").write_text(f"import nothing_of_that_name\n{lists}")


def test_an_utterance_is_an_interval_of_the_labels(root):
    write_sdk(root)
    features = obtained(root, "emotions")
    assert (features.dataset, features.task, features.classes) == ("mosei", "multilabel", mosei.EMOTIONS)
    by_id = {c.id: i for i, c in enumerate(features.clips)}
    first, second = by_id["va$_$0"], by_id["va$_$1"]
    assert features.label[first].tolist() == [True, False, False, False, False, True]
    assert features.label[second].tolist() == [False, True, False, False, False, False]
    assert [features.clips[i].transcript for i in (first, second)] == ["well", "good bye"]
    assert [(features.clips[i].dialogue, features.clips[i].turn) for i in (first, second)] == [("va", 0), ("va", 1)]
    assert {c.dialogue: c.split for c in features.clips} == {
        video: {"valid": "val"}.get(part, part) for part, videos in FOLDS.items() for video in videos
    }
    with (root.parent / "cache/features/mosei/quarantine.csv").open() as file:
        assert [line.split(",")[0] for line in file][1:] == ["stray$_$0", "stray$_$1"]


def test_steps_are_those_of_the_interval_in_at_most_fifty_windows(root):
    write_sdk(root)
    result = mosei.read(root / "CMU_MOSEI_Labels.csd")
    at = result["id"].index("va$_$1")
    # 100 steps of audio in two seconds, two in each window.
    np.testing.assert_allclose(result["audio"][at][:, 0], 100.5 + 2 * np.arange(50))
    assert result["vision"][at][:, 0].tolist() == list(range(21, 41))
    assert result["text"][at].shape == (2, 300)
    assert result["audio"][result["id"].index("vc$_$0")].shape == (0, 74)
    assert all(np.isfinite(x).all() for x in result["audio"])
    assert (result["audio"][result["id"].index("vb$_$0")][3, 1]) == pytest.approx(_kept(root, "vb", 6)[1] / 2, rel=1e-6)


def _kept(root, video, step):
    with h5py.File(root / "CMU_MOSEI_COVAREP.csd") as file:
        return file[f"COVAREP/data/{video}/features"][step]


def test_windows_without_a_step_are_none(root):
    write_sdk(root)
    with h5py.File(root / "CMU_MOSEI_COVAREP.csd", "a") as file:
        times = file["COVAREP/data/va/intervals"]
        times[:100] = times[:100] / 2  # all in the first second of the first utterance
    result = mosei.read(root / "CMU_MOSEI_Labels.csd")
    np.testing.assert_allclose(result["audio"][result["id"].index("va$_$0")][:, 0], 1.5 + 4 * np.arange(25))


def test_openface_and_no_words_will_do(root):
    write_sdk(root)
    (root / "CMU_MOSEI_VisualFacet42.csd").rename(root / "CMU_MOSEI_VisualOpenFace2.csd")
    (root / "CMU_MOSEI_TimestampedWords.csd").unlink()
    features = obtained(root, "emotions,av")
    assert {c.transcript for c in features.clips} == {None}
    record = next((root.parent / "cache/features/mosei/provenance").iterdir())
    sources = json.loads(record.read_text())["sources"]
    assert "CMU_MOSEI_VisualOpenFace2.csd" in sources
    assert "cmu_mosei_std_folds.py" in sources


@pytest.mark.thorough
def test_emotions_are_trained(root, tmp_path):
    write_sdk(root)
    config = configs.settings(f"{SPEC}:emotions,audio", data__root=str(root), **TRAINING)
    result = json.loads((train.train(config, tmp_path / "W") / "metrics.json").read_text())
    assert list(result["values"]) == list(mosei.EMOTIONS)
    assert all(set(scores) == {"wa", "f1"} for scores in result["values"].values())
    assert "sentiment" not in result


@pytest.mark.parametrize("name", ["cmu_mosei_std_folds.py", "CMU_MOSEI_COVAREP.csd", "CMU_MOSEI_VisualFacet42.csd"])
def test_a_missing_file_is_named(root, name):
    write_sdk(root)
    (root / name).unlink()
    with pytest.raises(AvjaxError, match=f"no {name}.*; it comes with the CMU Multimodal SDK"):
        obtained(root, "emotions")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("standard_train_fold = ['a']", "no list standard_valid_fold, standard_test_fold"),
        ("standard_train_fold = open('RAN', 'w')", "malformed node"),
        ("standard_train_fold = [", "expected the lists standard_train_fold"),
    ],
)
def test_the_folds_are_read_and_never_run(root, monkeypatch, content, message):
    monkeypatch.chdir(root)
    (root / "cmu_mosei_std_folds.py").write_text(content)
    with pytest.raises(AvjaxError, match=message):
        mosei.official(root / "cmu_mosei_std_folds.py")
    assert not (root / "RAN").exists()


@pytest.mark.parametrize(
    ("videos", "message"),
    [
        ({"va": (np.ones((1, 3)), [(0, 1)])}, r"va has labels \(1, 3\); expected \(n, 7\)"),
        (
            {"va": (np.ones((2, 7)), [(0, 1)])},
            r"va has \(2, 7\) and \(1, 2\); expected features \(n, d\) and intervals",
        ),
        ({}, "no videos in it; expected <name>/data/<video>"),
    ],
)
def test_another_layout_is_a_clear_error(root, videos, message):
    write_sdk(root)
    write_sequence(root / "CMU_MOSEI_Labels.csd", "All Labels", videos)
    with pytest.raises(AvjaxError, match=message):
        mosei.read(root / "CMU_MOSEI_Labels.csd")


def test_what_is_no_hdf5_is_a_clear_error(root):
    write_sdk(root)
    (root / "CMU_MOSEI_COVAREP.csd").write_text("no")
    with pytest.raises(AvjaxError, match=r"COVAREP\.csd: .*expected an HDF5 file"):
        mosei.read(root / "CMU_MOSEI_Labels.csd")
