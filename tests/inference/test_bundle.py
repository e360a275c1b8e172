"""Bundles: written whole or not at all, read only if they are what was written."""

import dataclasses
import doctest
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file

import avjax
from avjax.errors import AvjaxError
from avjax.features import store
from avjax.inference import bundle, model_card, stablehlo
from avjax.inference import predict as prediction
from avjax.inference import run as runs
from avjax.utils.storage import only_writer
from tests import exported

FILES = {
    "config.json",
    "labels.json",
    "manifest.json",
    "model.stablehlo",
    "model_card.md",
    "params",
    "provenance.json",
    "weights.safetensors",
}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return exported.run(tmp_path_factory)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return exported.bundled(tmp_path_factory)


@pytest.fixture
def copied(whole, tmp_path):
    return pathlib.Path(shutil.copytree(whole, tmp_path / "B"))


def test_the_example_of_load_runs(whole):
    results = doctest.testmod(avjax, extraglobs={"bundle_folder": whole})
    assert (results.attempted, results.failed) == (1, 0)


def read_json(folder, name):
    return json.loads((folder / name).read_text())


# ---- Content ---------------------------------------------------------------------------------------------------------


@pytest.mark.budget(30)
def test_what_is_in_a_bundle(workdir, whole):
    assert {path.name for path in whole.iterdir()} == FILES
    assert read_json(whole, "labels.json") == {"task": "single", "classes": ["class0", "class1", "class2"]}
    config, trained = read_json(whole, "config.json"), read_json(workdir, "config.json")
    assert trained["data"]["features"]
    assert config == trained | {"data": trained["data"] | {"root": "", "features": ""}}
    assert list(whole.parent.glob(".*")) == []


def test_no_file_says_where_it_was_made(whole):
    for path in whole.rglob("*"):
        assert path.is_dir() or str(whole.parent).encode() not in path.read_bytes(), path


def test_weights_stand_there_twice_and_are_those_of_the_run(workdir, whole):
    expected = stablehlo.weights_of(runs.read_run(workdir))
    plain = load_file(whole / "weights.safetensors")
    restored = flatten_dict(ocp.PyTreeCheckpointer().restore(whole / "params"), sep="/")
    assert expected.keys() == plain.keys() == restored.keys()
    assert {"best_head", "stats/audio/mean", "stats/video/std", "best/params/head_fusion/kernel"} <= expected.keys()
    for name, array in expected.items():
        for found in (plain[name], restored[name]):
            assert type(found) is np.ndarray
            assert found.dtype == array.dtype
            np.testing.assert_array_equal(found, array)
            assert len(found) == 6


def test_provenance_names_data_protocol_features_and_versions(workdir, whole):
    says, metrics = read_json(whole, "provenance.json"), read_json(workdir, "metrics.json")
    machine = read_json(workdir, "environment.json")
    features = machine.pop("features")
    assert (says["run"], says["model"], says["dataset"]) == ("W", "etg_aver", "synthetic")
    assert says["protocol"] == metrics["protocol"]
    assert [(lane["fold"], lane["seed"]) for lane in says["lanes"]] == [
        (lane["fold"], lane["seed"]) for lane in metrics["folds"]
    ]
    assert (says["lanes_of_run"], says["random_weights"]) == (6, False)
    assert says["trained_with"] == machine
    assert says["exported_with"] == {"avjax": avjax.__version__, "jax": machine["packages"]["jax"]}
    assert says["features"] == {
        "content": features["content"],
        "made_by": {"video": "v", "audio": "a", "text": "t"},
        "records": {"v": {"feature": "video", "code": 2}},  # all that the store has
    }
    made = says["preprocessing"]
    assert (made["preset"], made["settings"]["frames"]) == ("lite", 16)
    assert made["streams"]["video"] == {
        "what": "face measurements (blendshapes, action units, head pose) in at most 16 evenly spaced frames",
        "longest": [6, 9],
        "dtype": "float32",
    }
    assert says["inputs"]["audio"] == {"shape": ["clips", "audio_steps", 7], "dtype": "float32"}
    assert says["pretrained"]["minilm"]["licence"] == "Apache-2.0"


def test_a_feature_store_that_is_gone_leaves_the_keys(workdir, tmp_path):
    moved = pathlib.Path(shutil.copytree(workdir, tmp_path / "W"))
    change(moved / "config.json", data__features=str(tmp_path / "nowhere"))
    bundle.write(moved, tmp_path / "B")
    says = read_json(tmp_path / "B", "provenance.json")["features"]
    assert says["records"] == {}
    assert says["made_by"] == {"video": "v", "audio": "a", "text": "t"}


# ---- Reading ---------------------------------------------------------------------------------------------------------


def test_a_bundle_is_the_run(workdir, whole):
    run, back = runs.read_run(workdir), bundle.read(whole)
    # The predictor is that of the model, compared by what it predicts.
    different = ("model", "best", "stats", "best_head", "predictor")
    for field in dataclasses.fields(run):
        if field.name not in different:
            assert getattr(back, field.name) == getattr(run, field.name), field.name
    assert type(back.predictor) is type(run.predictor)
    features = store.load(workdir.with_name("F"), "lite")
    np.testing.assert_array_equal(prediction.probabilities(back, features), prediction.probabilities(run, features))


def test_lanes_are_chosen_when_a_bundle_is_written_and_when_it_is_read(workdir, whole, tmp_path):
    bundle.write(workdir, tmp_path / "B", fold="s1", seed=2)
    features = store.load(workdir.with_name("F"), "lite")
    expected = prediction.probabilities(runs.read_run(workdir, "s1", 2), features)
    for run in (bundle.read(tmp_path / "B"), bundle.read(whole, "s1", 2)):
        assert run.lanes == (("s1", 2),)
        np.testing.assert_allclose(prediction.probabilities(run, features), expected, rtol=0, atol=1e-6)
    card = (tmp_path / "B" / "model_card.md").read_text()
    assert "of 1 of the run's 6 networks" in card
    size = sum(leaf.size for leaf in flatten_dict(run.best["params"]).values())
    assert f"{size:,} in each network:" in card
    assert f"\nTotal: {size:,} -- {4 * size:,} bytes\n" in card
    with pytest.raises(AvjaxError, match="B: no fold 's2'; its folds are s1"):
        bundle.read(tmp_path / "B", "s2")


def test_load_tells_classes_and_lanes(whole):
    loaded = avjax.load(whole)
    assert loaded.classes == ("class0", "class1", "class2")
    assert loaded.lanes == tuple((fold, seed) for fold in ("s0", "s1", "s2") for seed in (1, 2))


def test_a_bundle_is_no_run(whole):
    with pytest.raises(AvjaxError, match=r"B: a bundle of avjax\.export, not a run of avjax\.train"):
        runs.read_run(whole)


# ---- What was changed ------------------------------------------------------------------------------------------------


def names(folder: pathlib.Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("where", [0.0, 0.37, 1.0])
def test_one_byte_of_any_file_is_missed(copied, where):
    assert len(names(copied)) > 10
    for name in names(copied):
        path = copied / name
        before = path.read_bytes()
        at = round(where * (len(before) - 1))
        path.write_bytes(before[:at] + bytes([before[at] ^ 1]) + before[at + 1 :])
        with pytest.raises(AvjaxError) as found:
            bundle.read(copied)
        assert str(path) in str(found.value)
        path.write_bytes(before)
    bundle.check(copied)


@pytest.mark.parametrize("bit", [4, *(pytest.param(bit, marks=pytest.mark.thorough) for bit in (1, 32))])
def test_no_byte_of_the_manifest_can_be_another(copied, bit):
    path = copied / "manifest.json"
    before = path.read_bytes()
    for at in range(len(before)):
        path.write_bytes(before[:at] + bytes([before[at] ^ bit]) + before[at + 1 :])
        with pytest.raises(AvjaxError, match=r"manifest\.json: cannot be used"):
            bundle.check(copied)


@pytest.mark.parametrize("name", [*sorted(FILES - {"params"}), "params/_METADATA"])
def test_no_file_may_be_missing(copied, name):
    (copied / name).unlink()
    with pytest.raises(AvjaxError, match=rf"{name}(: cannot be used| is missing)"):
        bundle.read(copied)
    assert runs.is_bundle(copied)


@pytest.mark.parametrize("name", ["notes.txt", ".hidden", "params/more/x", "manifest.json.old"])
def test_no_file_may_be_too_much(copied, name):
    (copied / name).parent.mkdir(exist_ok=True)
    (copied / name).write_text("")
    with pytest.raises(AvjaxError, match=rf"{name} is not part of it; get the bundle again"):
        bundle.read(copied)


def test_links_are_refused_even_to_the_same_content(copied, tmp_path):
    (copied / "labels.json").rename(tmp_path / "labels.json")
    (copied / "labels.json").symlink_to(tmp_path / "labels.json")
    with pytest.raises(AvjaxError, match=r"labels\.json: is a link"):
        bundle.read(copied)


@pytest.mark.parametrize("name", ["../outside.json", "/etc/hostname", "params/../../outside.json", "./labels.json"])
def test_names_that_lead_out_are_refused(copied, tmp_path, name):
    (tmp_path / "outside.json").write_text("{}")
    files = read_json(copied, "manifest.json")["files"]
    files[name] = bundle._entry(tmp_path / "outside.json")
    (copied / "manifest.json").write_text(bundle._sealed(bundle.FORMAT, files))
    with pytest.raises(AvjaxError, match=r"manifest\.json: names .*, which is not in the bundle"):
        bundle.read(copied)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (bundle._sealed("avjax bundle 2", {}), "is a 'avjax bundle 2'; this version of avjax reads 'avjax bundle 1'"),
        ("[]", r"manifest\.json: cannot be used"),
        ('{"format": 1, "files": 2}', r"manifest\.json: cannot be used"),
        ("[" * 100_000, r"manifest\.json: cannot be used"),
        (bundle._sealed(bundle.FORMAT, {"labels.json": 7}), "is missing|is not part of it|has been changed"),
    ],
)
def test_other_manifests(copied, text, message):
    (copied / "manifest.json").write_text(text)
    with pytest.raises(AvjaxError, match=message):
        bundle.read(copied)


def test_a_whole_bundle_of_another_content_is_told(copied):
    (copied / "provenance.json").write_text("{}")
    (copied / "manifest.json").unlink()
    (copied / "manifest.json").write_text(bundle._sealed(bundle.FORMAT, bundle._described(copied)))
    with pytest.raises(AvjaxError, match=r"not of this version of avjax .*; export its run again"):
        bundle.read(copied)


# ---- Writing ---------------------------------------------------------------------------------------------------------


def test_what_is_there_stays(workdir, tmp_path):
    (tmp_path / "B").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for name in ("B", "link"):
        with pytest.raises(AvjaxError, match=rf"{name}: already exists; give another --out, or remove it"):
            bundle.write(workdir, tmp_path / name)
    assert list((tmp_path / "B").iterdir()) == []


def test_an_error_leaves_nothing(workdir, tmp_path, monkeypatch):
    def fails(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(model_card, "markdown", fails)
    with pytest.raises(KeyboardInterrupt):
        bundle.write(workdir, tmp_path / "B")
    assert list(tmp_path.iterdir()) == []


def test_what_a_kill_left_is_cleared_away_and_another_writer_is_not(workdir, tmp_path):
    left = tmp_path / ".B.unfinished"
    (left / "params").mkdir(parents=True)
    (left / "params" / "half").write_text("x")
    (left / "labels.json").write_text("x")
    with only_writer(left, "x"), pytest.raises(AvjaxError, match="another process is writing to it"):
        bundle.write(workdir, tmp_path / "B")
    bundle.write(workdir, tmp_path / "B")
    bundle.check(tmp_path / "B")
    assert [path.name for path in tmp_path.iterdir()] == ["B"]


@pytest.mark.slow
def test_a_kill_leaves_a_whole_bundle_or_none(workdir, tmp_path):
    out, ended = tmp_path / "B", set()
    line = command("--workdir", workdir, "--out", out)
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    begun = time.monotonic()
    assert subprocess.run(line, env=env, capture_output=True).returncode == 0
    lasts = time.monotonic() - begun
    for share in np.linspace(0.5, 1.0, 8):
        shutil.rmtree(out, ignore_errors=True)
        process = subprocess.Popen(line, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(share * lasts)
        process.send_signal(signal.SIGKILL)
        process.wait()
        ended.add(out.exists())
        if out.exists():
            bundle.check(out)
        for left in tmp_path.glob(".*.unfinished"):
            with pytest.raises(AvjaxError, match=r"cannot be used|is missing|is not part of it"):
                bundle.check(left)
    assert False in ended


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda w: (w / "report.html").unlink(), "an unfinished run"),
        (lambda w: (w / "protocol.json").unlink(), r"protocol\.json: cannot be read"),
        (lambda w: change(w / "config.json", protocol__standardise="speaker"), "'speaker'; .*statistics of the spea"),
        (lambda w: change(w / "config.json", protocol__standardise="enrol"), "'enrol'; .*statistics of the spea"),
        (lambda w: change(w / "environment.json", features__streams={}), "has no width of text, audio, video"),
    ],
)
def test_runs_that_cannot_be_exported(workdir, tmp_path, damage, message):
    moved = pathlib.Path(shutil.copytree(workdir, tmp_path / "W"))
    damage(moved)
    with pytest.raises(AvjaxError, match=message):
        bundle.write(moved, tmp_path / "B")
    assert [path.name for path in tmp_path.iterdir()] == ["W"]


def test_a_bundle_is_not_written_to_the_cloud(workdir, monkeypatch):
    with pytest.raises(AvjaxError, match="a bundle is written on this machine"):
        bundle.write(workdir, pathlib.PurePosixPath("gs://bucket/B"))


def change(path: pathlib.Path, **changes) -> None:
    content = json.loads(path.read_text())
    for key, value in changes.items():
        *parents, last = key.split("__")
        inner = content
        for parent in parents:
            inner = inner[parent]
        inner[last] = value
    path.write_text(json.dumps(content))


def test_features_of_tables_are_exported_and_clips_refused(workdir, tmp_path):
    moved = pathlib.Path(shutil.copytree(workdir, tmp_path / "W"))
    columns = {"video": ["face:AU01..AU45"], "audio": ["sound:mfcc"], "text": ["words:bert"]}
    change(moved / "config.json", preset="tables", tables={"streams": columns})
    bundle.write(moved, tmp_path / "B")
    says = read_json(tmp_path / "B", "provenance.json")
    assert says["preprocessing"]["streams"]["video"]["what"] == "from tables: face:AU01..AU45"
    assert says["pretrained"] == {}
    text = (tmp_path / "B" / "model_card.md").read_text()
    assert "this bundle predicts from\nfeatures only" in text
    assert "avjax.predict" not in text
    assert len(exported.code(tmp_path / "B")) == 2
    with pytest.raises(AvjaxError, match="B: trained on features from tables, which avjax cannot measure in a clip"):
        bundle.read(tmp_path / "B")
    with pytest.raises(AvjaxError, match="B: trained on features from tables"):
        avjax.load(tmp_path / "B").predict(["clip.mp4"])


def command(*arguments) -> list[str]:
    return [sys.executable, "-m", "avjax.export", *map(str, arguments)]


def test_the_command_says_what_it_wrote_and_what_is_wrong(workdir, tmp_path):
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    line = command("--workdir", workdir, "--out", tmp_path / "B", "--fold=s0")
    done = subprocess.run(line, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[0].startswith(f"{tmp_path / 'B'}: W, 2 of 6 lanes, ")
    assert "  video (clips, video_steps, 9) float32" in said
    again = subprocess.run(line, env=env, capture_output=True, text=True)
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr.startswith("error: ")
