"""Prediction: for a clip of the data it says what training stored, whoever is asked about beside it."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from scipy.special import softmax

from avjax.datasets.base import Clip
from avjax.errors import AvjaxError
from avjax.evaluation.predictor import Heads
from avjax.features import store as stores
from avjax.inference import predict as prediction
from avjax.inference import run as runs
from avjax.inference import tables as prediction_tables
from avjax.models.base import Model
from tests import clips, tiny_run

pytestmark = pytest.mark.weights
REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
CLOSE = 1e-5  # of a probability; 2e-7 was measured


def command(*arguments, **env) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", *map(os.fspath, arguments)],
        cwd=REPOSITORY,
        env={**os.environ, "COLUMNS": "80", **env},
        capture_output=True,
        text=True,
        timeout=300,
    )


def measure(paths) -> tuple[list[Clip], Console]:
    return prediction.find_clips(map(str, paths)), Console(quiet=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return tiny_run.make(tmp_path_factory)


@pytest.fixture(scope="module")
def answered(trained):
    """The answers of all lanes for the files of the data set, by clip id."""
    data, _, workdir = trained
    answers, rejected = prediction.predict(runs.read_run(workdir), *measure([data]))
    assert rejected == []
    return {a.file.removeprefix(f"{data}/").rpartition(".")[0]: a for a in answers}


@pytest.fixture
def copied(trained, tmp_path):
    return pathlib.Path(shutil.copytree(trained[2], tmp_path / "W"))


def stored(workdir, fold, seed) -> dict[str, np.ndarray]:
    """Clip id → probabilities that training stored for it."""
    with np.load(workdir / "predictions.npz") as rows:
        chosen = (rows["fold"] == fold) & (rows["seed"] == seed)
        shares = softmax(rows["logits_fusion"][chosen].astype(np.float64), -1)
        return dict(zip(rows["clip_id"][chosen].tolist(), shares, strict=True))


def shares(answer: prediction.Prediction) -> np.ndarray:
    return np.array(list(answer.scores.values()))


@pytest.mark.budget(40)
def test_the_command_repeats_what_training_stored(trained):
    data, _, workdir = trained
    expected = stored(workdir, "2", 1)
    done = command("avjax.predict", "--workdir", workdir, "--fold=2", "--seed=1", "--json", data)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    metrics = json.loads((workdir / "metrics.json").read_text())
    assert {k: v for k, v in said.items() if k not in ("clips", "rejected")} == {
        "run": "W", "dataset": metrics["dataset"], "protocol": metrics["protocol"], "lanes": 1}  # fmt: skip
    assert [c["file"] for c in said["clips"]] == sorted(str(p) for p in data.rglob("*.*") if p.suffix != ".csv")
    found = {c["file"].removeprefix(f"{data}/").rpartition(".")[0]: c for c in said["clips"]}
    assert len(expected) == 4
    for clip_id, row in expected.items():
        assert list(found[clip_id]["probabilities"]) == sorted(tiny_run.CLASSES)
        np.testing.assert_allclose(list(found[clip_id]["probabilities"].values()), row, rtol=0, atol=CLOSE)
        assert found[clip_id]["predicted"] == sorted(tiny_run.CLASSES)[row.argmax()]


@pytest.mark.slow
def test_real_clips_by_the_real_commands(java_sed, tmp_path):
    data, out, workdir = (tmp_path / name for name in "RFW")
    data.mkdir()
    rows = (java_sed / "labels.csv").read_text().splitlines()[1::4]
    for row in rows:
        shutil.copy(java_sed / row.split(",")[0], data)
    (data / "labels.csv").write_text(
        "\n".join(["file,label", *(",".join(row.removeprefix("mp4/").split(",")[:2]) for row in rows)])
    )
    changes = ("--config.protocol.fold_count=2", "--config.train.seeds=5,6", "--config.train.epochs=10")
    for arguments in (
        ("avjax.extract", "--config=configs/extract_folder.py", f"--config.data.root={data}", "--out", out),
        (
            "avjax.train",
            "--config=configs/etg_folder.py",
            f"--config.data.features={out}",
            *changes,
            "--workdir",
            workdir,
        ),
    ):
        done = command(*arguments)
        assert done.returncode == 0, done.stderr
    for fold, seed in (("1", 6), ("2", 5)):
        done = command("avjax.predict", "--workdir", workdir, f"--fold={fold}", f"--seed={seed}", "--json", data)
        answers = {pathlib.Path(c["file"]).stem: c for c in json.loads(done.stdout)["clips"]}
        assert not any(a["missing"] for a in answers.values())
        for clip_id, row in stored(workdir, fold, seed).items():
            np.testing.assert_allclose(list(answers[clip_id]["probabilities"].values()), row, rtol=0, atol=CLOSE)


def test_every_lane_alone_repeats_what_training_stored(trained):
    _, store, workdir = trained
    features = stores.load(store, "lite")
    for fold, seed in runs.read_run(workdir).lanes:
        run = runs.read_run(workdir, fold, seed)
        assert run.lanes == ((fold, seed),)
        made = dict(zip(features.ids, prediction.probabilities(run, features), strict=True))
        for clip_id, row in stored(workdir, fold, seed).items():
            np.testing.assert_allclose(made[clip_id], row, rtol=0, atol=CLOSE)


@pytest.mark.budget(12)
def test_the_answer_is_the_mean_of_the_lanes(trained, answered):
    """Computed here clip by clip and lane by lane, standardised by NumPy, from the features that extraction packed."""
    _, store, workdir = trained
    features, run = stores.load(store, "lite"), runs.read_run(workdir)
    assert [*run.lanes] == [(fold, seed) for fold in "12" for seed in (1, 2)]
    apply = jax.jit(
        lambda params, batch: run.model.module.apply({"params": params}, batch, train=False).logits["fusion"]
    )
    for i, clip_id in list(enumerate(features.ids))[::3]:
        rows = []
        for lane in range(4):
            batch = {"text": features.arrays["text_both"][i], "text_mask": features.masks["text_both"][i]}
            for name in ("audio", "video"):
                mean, std = (s[lane, 0] for s in run.stats[name])
                mask = features.masks[name][i]
                batch |= {name: np.where(mask[:, None], (features.arrays[name][i] - mean) / std, 0)}
                batch |= {f"{name}_mask": mask}
            params = {k: _lane(v, lane) for k, v in run.best["params"].items()}
            one = {k: jnp.asarray(v)[None] for k, v in batch.items()}
            rows.append(softmax(np.asarray(apply(params, one)[0], np.float64)))
        assert np.ptp(rows, 0).max() > 0.01, "lanes that say the same test nothing"
        np.testing.assert_allclose(shares(answered[clip_id]), np.mean(rows, 0), rtol=0, atol=CLOSE)


def _lane(tree, lane: int):
    return {k: _lane(v, lane) for k, v in tree.items()} if isinstance(tree, dict) else tree[lane]


def test_sentences_and_what_is_missing(trained, answered):
    features = stores.load(trained[1], "lite")
    assert {i: a.sentence for i, a in answered.items()} == dict(
        zip(features.ids, features.sentences["both"], strict=True)
    )
    assert answered["take0/0"].missing == {"video": "no face in any frame"}
    assert answered["take0/4"].missing == {"video": "no video stream"}
    nothing = answered["take1/2"]
    assert nothing.sentence == ""
    assert nothing.missing == {
        "video": "no face in any frame",
        "audio": "no audio stream",
        "sentence": "nothing to describe: no face and no voice was measured",
    }
    assert all(sum(a.scores.values()) == pytest.approx(1) for a in answered.values())


@pytest.mark.thorough
def test_order_company_and_names_of_clips_change_nothing(trained, answered, tmp_path):
    data, _, workdir = trained
    foreign = tmp_path / os.fsdecode(b"caf\xe9 [bold]\n.mp4")
    shutil.copy(data / "take1/1.mp4", foreign)
    shutil.copy(data / "take0/3.mp4", tmp_path / "no suffix")
    paths = [foreign, data / "take1/0.mp4", tmp_path / "no suffix", data / "take0/0.mp4", data / "take1/0.mp4"]
    run = runs.read_run(workdir)
    answers, rejected = prediction.predict(run, *measure(paths))
    assert rejected == []
    assert [a.file.rpartition("/")[2] for a in answers] == ["caf\\xe9 [bold]\\n.mp4", "0.mp4", "no suffix", "0.mp4"]
    for answer, was in zip(answers, ("take1/1", "take1/0", "take0/3", "take0/0"), strict=True):
        np.testing.assert_allclose(shares(answer), shares(answered[was]), rtol=0, atol=CLOSE)
    assert json.loads(prediction_tables.as_json(run, answers, rejected))["clips"][0]["file"] == answers[0].file
    assert "caf\\xe9 [bold]\\n.mp4" in printed(run, answers, width=200)


def test_folders_stand_for_their_media_files(tmp_path):
    for name in ("b/2.MP4", "b/1.mkv", "a.wav", "notes.txt", "c.mp4/0.webm"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = prediction.find_clips([str(tmp_path / "notes.txt"), str(tmp_path), str(tmp_path / "b/1.mkv")])
    names = ["notes.txt", "a.wav", "b/1.mkv", "b/2.MP4", "c.mp4/0.webm"]
    assert [c.id for c in found] == [str(tmp_path / n) for n in names]
    (tmp_path / "empty").mkdir()
    with pytest.raises(AvjaxError, match=r"empty: no media file in this folder; looked for \.3gp, \.avi"):
        prediction.find_clips([str(tmp_path / "empty")])


def test_a_useless_file_gets_a_line_and_nothing_useful_is_an_error(trained, tmp_path):
    data, _, workdir = trained
    (tmp_path / "noise.mp4").write_bytes(b"noise" * 99)
    bad = [tmp_path / "noise.mp4", tmp_path / "gone.mp4"]
    done = command("avjax.predict", "--workdir", workdir, *bad, data / "take0/0.mp4", LC_ALL="C", PYTHONUTF8="0")
    assert done.returncode == 0, done.stderr
    for path, reason in zip(bad, ("not a media file, or one that is damaged", "no such file"), strict=True):
        assert [line.startswith(f"{path}: {reason}") for line in done.stderr.splitlines()].count(True) == 1
    assert "take0/0.mp4: " in done.stdout
    done = command("avjax.predict", "--workdir", workdir, "--json", bad[1])
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"{bad[1]}: no such file\nerror: none of the 1 files can be used\n"


def test_a_clip_that_takes_too_long(trained):
    data, _, workdir = trained
    clips, console = measure([data / "take0/0.mp4"])
    answers, rejected = prediction.predict(runs.read_run(workdir), clips, console, clip_seconds=0.001)
    assert (answers, rejected) == ([], [(str(data / "take0/0.mp4"), "took longer than 0.001 s")])


# ---- Terminal --------------------------------------------------------------------------------------------------------


def made_up(count: int) -> tuple[runs.Run, list[prediction.Prediction]]:
    names = ("disappointment", "happiness", "helplessness", "contempt")
    lanes = (("1", 1), ("2", 1))
    model = Model(None, None, (), ())
    about = ("W", "demo, not MAFW", "5 folds", names, "lite", "both")
    run = runs.Run(*about, model, {}, np.zeros(2), {}, lanes, {}, predictor=Heads(model))
    chances = dict(zip(names, (0.1, 0.7, 0.2, 0.0), strict=True))
    missing = {"audio": "no audio stream"}
    return run, [prediction.Prediction(f"/far/away/{i}.mp4", chances, "They smile.", missing) for i in range(count)]


def printed(run, answers, width=80) -> str:
    console = Console(width=width, file=open(os.devnull, "w"), record=True, markup=False)  # noqa: SIM115
    console.print(prediction_tables.as_table(run, answers))
    console.file.close()
    return console.export_text()


def test_few_clips_are_told_in_full():
    text = printed(*made_up(2))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == "/far/away/0.mp4: happiness 70.0 %"
    assert "“They smile.”" in text
    assert "without audio: no audio stream" in text
    assert [line.split()[0] for line in lines[3:7]] == ["happiness", "helplessness", "disappointment", "contempt"]
    bars = [line.count("━") for line in lines[3:7]]
    assert bars[0] == 28
    assert bars == sorted(bars, reverse=True)
    assert "W: mean of 2 lanes (fold × seed). demo, not MAFW · 5 folds" in text


def test_many_clips_are_a_row_each():
    text = printed(*made_up(9))
    assert text.splitlines()[0].strip() == "/far/away"
    assert "They smile" not in text
    rows = [line.strip("│ ").split("│") for line in text.splitlines() if ".mp4" in line]
    assert [[c.strip() for c in row] for row in rows] == [
        [f"{i}.mp4", "happiness", "70.0", "helplessness", "20.0", "audio"] for i in range(9)
    ]
    assert "demo, not MAFW · 5 folds" in text


def numbered(task: str) -> tuple[runs.Run, list[prediction.Prediction]]:
    """Two clips of a run of values, or of labels."""
    run, answers = made_up(2)
    numbers = {"regression": (0.25, -1.5), "multilabel": (0.9, 0.501)}[task]
    names = ("valence", "arousal")
    said = [dataclasses.replace(a, scores=dict(zip(names, numbers, strict=True))) for a in answers]
    return dataclasses.replace(run, model=run.model.replace(task=task), classes=names), said


@pytest.mark.parametrize(
    ("task", "shown", "as_json"),
    [
        ("regression", ["0.250", "-1.500"], {"values": {"valence": 0.25, "arousal": -1.5}}),
        (
            "multilabel",
            ["90.0", "50.1"],
            {"predicted": ["valence", "arousal"], "probabilities": {"valence": 0.9, "arousal": 0.501}},
        ),
    ],
)
def test_values_and_labels_are_a_row_each(task, shown, as_json):
    run, answers = numbered(task)
    text = printed(run, answers)
    rows = [[c.strip() for c in line.strip("│ ").split("│")] for line in text.splitlines() if ".mp4" in line]
    assert rows == [[f"/far/away/{i}.mp4", *shown, "audio"] for i in range(2)]
    assert "valence" in text
    about = json.loads(prediction_tables.as_json(run, answers, []))["clips"][0]
    rest = {"file": "/far/away/0.mp4", "sentence": "They smile.", "missing": {"audio": "no audio stream"}}
    assert about == rest | as_json


def test_no_label_may_be_likely():
    run, answers = numbered("multilabel")
    unlikely = [dataclasses.replace(a, scores=dict.fromkeys(run.classes, 0.4)) for a in answers]
    assert json.loads(prediction_tables.as_json(run, unlikely, []))["clips"][0]["predicted"] == []


# ---- Runs that cannot answer -----------------------------------------------------------------------------------------


def change(path: pathlib.Path, **changes) -> None:
    content = json.loads(path.read_text())
    for key, value in changes.items():
        *parents, last = key.split("__")
        inner = content
        for parent in parents:
            inner = inner[parent]
        inner[last] = value
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda w: (w / "config.json").unlink(), r"no run of avjax\.train \(it has no config\.json\)"),
        (lambda w: (w / "report.html").unlink(), r"an unfinished run; repeat its avjax\.train command"),
        (lambda w: (w / "metrics.json").unlink(), r"metrics\.json: cannot be read .*No such file"),
        (lambda w: (w / "metrics.json").write_text("{"), r"metrics\.json: cannot be read .*restore a copy"),
        (lambda w: (w / "metrics.json").write_text("[]"), r"metrics\.json: holds a list, not an object"),
        (lambda w: (w / "metrics.json").write_text("{}"), "not of this version of avjax .without 'folds'.; train"),
        (lambda w: change(w / "config.json", model={}), "not of this version of avjax"),
        (lambda w: change(w / "metrics.json", folds=[{"fold": "1", "seed": 1}]), r"has 1 lanes, checkpoints/ \{4\}"),
        (lambda w: shutil.rmtree(w / "checkpoints"), "checkpoints: no checkpoint can be read"),
        (
            lambda w: (w / "checkpoints/2/default/_METADATA").unlink(),
            "checkpoints: no checkpoint can be read",
        ),
        (lambda w: change(w / "config.json", protocol__standardise="speaker"), "'speaker'; .*statistics of the spea"),
        (lambda w: change(w / "config.json", tables={}), "features from tables, which avjax cannot measure in a clip"),
    ],
)
def test_a_run_that_is_none_or_damaged(copied, damage, message):
    damage(copied)
    with pytest.raises(AvjaxError, match=message):
        runs.read_run(copied)


def test_unknown_lanes_are_answered_with_those_there_are(trained):
    with pytest.raises(AvjaxError, match="no fold '7'; its folds are 1, 2"):
        runs.read_run(trained[2], "7")
    with pytest.raises(AvjaxError, match="no seed 42; its seeds are 1, 2"):
        runs.read_run(trained[2], seed=42)
    assert runs.read_run(trained[2], seed=2).lanes == (("1", 2), ("2", 2))


def test_features_made_otherwise_than_in_training_are_refused(trained, tmp_path):
    run = runs.read_run(trained[2])
    other = dataclasses.replace(run, made_by=run.made_by | {"audio": "another key"})
    one = prediction.find_clips([str(clips.write_wav(tmp_path / "voice.wav"))])
    with pytest.raises(AvjaxError, match=r"run W was trained on features that are made differently now \(audio: other"):
        prediction.predict(other, one, Console(quiet=True))
