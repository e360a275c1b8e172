"""Bundles answer as their run does, with JAX alone and with avjax from clips, by the code that the model card shows."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import venv

import jax
import numpy as np
import pytest

import avjax
from avjax.evaluation import fewshot
from avjax.evaluation import fewshot_cache as caches
from avjax.features import store
from avjax.inference import bundle, model_card
from avjax.inference import predict as prediction
from avjax.inference import run as runs
from tests import exported, portable, tiny_run

CLOSE = 1e-5
# All that is needed, and what jax brings.
ALLOWED = {"jax", "jaxlib", "numpy", "flatbuffers", "ml_dtypes", "opt_einsum", "scipy"}
BLOCK = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("avjax", "flax", "orbax", "optax", "safetensors", "tensorstore"):
            raise ImportError(f"{name} is not for this test")

sys.meta_path.insert(0, Block())
"""
# Follows the code of the card, whose names it uses.
THEN = """
with np.load("streams.npz") as file:
    np.save("answers.npy", program.call(weights, dict(file)))
print(json.dumps(program.platforms))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a bundle, with streams of clips, and with what its run answers for these."""
    whole = exported.bundled(tmp_path_factory)
    root = tmp_path_factory.mktemp("elsewhere")
    shutil.copytree(whole, root / "B")
    run, clips = runs.read_run(whole.with_name("W")), store.load(whole.with_name("F"), "lite")
    np.savez(root / "streams.npz", **portable.streams_of(run, clips))
    np.save(root / "expected.npy", prediction.probabilities(run, clips))
    return root


def check_answers(place: pathlib.Path, python, before: str, **env) -> None:
    (place / "script.py").write_text(before + exported.code(place / "B")[0] + THEN)
    done = subprocess.run([python, "script.py"], cwd=place, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    *rows, last = done.stdout.splitlines()
    assert json.loads(last) == ["cpu", "cuda", "tpu"]
    for row in rows:
        assert sum(json.loads(row.replace("'", '"')).values()) == pytest.approx(1)
    assert len(rows) == 2
    found, expected = np.load(place / "answers.npy"), np.load(place / "expected.npy")
    assert np.ptp(expected, 0).max() > 0.01
    np.testing.assert_allclose(found, expected, rtol=0, atol=CLOSE)


@pytest.mark.budget(40)
def test_the_code_of_the_card_needs_jax_alone(place):
    paths = os.pathsep.join(p for p in sys.path if p.endswith("-packages"))
    check_answers(place, sys.executable, BLOCK, PYTHONPATH=paths, JAX_PLATFORMS="cpu")


@pytest.mark.slow
def test_the_code_of_the_card_in_an_environment_with_nothing_else(place, tmp_path):
    venv.create(tmp_path / "v", with_pip=True)
    python = tmp_path / "v" / "bin" / "python"
    packages = [f"jax=={jax.__version__}", "numpy", "flatbuffers"]
    done = subprocess.run([python, "-m", "pip", "install", "-q", *packages], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"packages cannot be had: {done.stderr[-200:]}")
    listed = subprocess.run([python, "-m", "pip", "list", "--format=freeze"], capture_output=True, text=True).stdout
    there = {line.partition("==")[0].replace("-", "_") for line in listed.splitlines()}
    assert there <= ALLOWED | {"pip", "setuptools"}
    check_answers(place, python, "", JAX_PLATFORMS="cpu")


def test_the_code_of_the_card_for_the_weights(place):
    (place / "weights.py").write_text(exported.code(place / "B")[1])
    env = os.environ | {"PYTHONPATH": ""}
    done = subprocess.run([sys.executable, "weights.py"], cwd=place, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "'head_fusion'" in done.stdout


# ---- The card --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def told(place, tmp_path_factory):
    """What the card is made of."""
    metrics = exported.run(tmp_path_factory) / "metrics.json"
    return json.loads((place / "B" / "provenance.json").read_text()), json.loads(metrics.read_text())


def test_a_card_has_protocol_figures_and_classes(place, told):
    metrics = told[1]
    text = (place / "B" / "model_card.md").read_text()
    assert metrics["protocol"] in text
    for key in ("war", "uar"):
        assert f"{100 * metrics['mean'][key]:.1f} ± {100 * metrics['std'][key]:.1f}" in text
    for at, name in enumerate(metrics["classes"]):
        tested = sum(metrics["confusion"][at])
        assert f"| {name} | {tested} | {100 * metrics['confusion'][at][at] / tested:.1f} |" in text
    assert "The networks of this bundle come from 3 folds" in text
    assert "minilm`: MiniLM-L6 English sentence encoder" in text
    assert "RANDOM WEIGHTS" not in text
    assert "{" not in "".join(text.split("```")[::2])


PARAMS = {"head": {"kernel": np.zeros((2, 3), np.float32)}}  # of a made-up network, for cards


def test_a_card_names_a_public_data_set_and_random_weights(told):
    from avjax.datasets.metadata import metadata

    says, metrics = told
    text = model_card.markdown("B", says | {"random_weights": True}, metrics, metadata("mafw"), PARAMS)
    assert "Licence of the data: Research only, under a signed agreement; not to be passed on." in text
    assert "**RANDOM WEIGHTS**" in text


@pytest.mark.parametrize("lengths", ["16*{}_steps", 32])
def test_made_up_streams_have_sizes_that_the_program_takes(told, lengths):
    says, metrics = told
    fixed = isinstance(lengths, int)
    inputs = {
        key: about | {"shape": ["clips", lengths if fixed else lengths.format("x"), *about["shape"][2:]]}
        for key, about in says["inputs"].items()
    }
    text = model_card.markdown("B", says | {"inputs": inputs}, metrics, None, PARAMS)
    assert f'"audio": np.zeros((2, {32 if fixed else 16}, 7), np.float32),' in text
    assert ("as many steps as below" if fixed else "any multiple of 16") in text


@pytest.mark.parametrize("name", ["it's", 'a "b"; rm -rf', "x`y`\\n", "a {{ b }} <i>"])
def test_names_are_shown_and_not_obeyed(told, name):
    says, metrics = told
    classes = [name, *metrics["classes"][1:]]
    text = model_card.markdown(name, says, metrics | {"classes": classes}, None, PARAMS)
    blocks = [block for block in text.split("```")[1::2] if block.startswith("python\n")]
    for block in blocks:
        compile(block.removeprefix("python\n"), "card", "exec")
    assert f"folder = {name!r}" in blocks[0]
    prose = re.sub(r"`[^`]*`", "", "".join(text.split("```")[::2]))
    assert re.search(r"(?<!\\)<i>", prose) is None


@pytest.mark.parametrize(("task", "says_so"), [("multilabel", "the probability of each of"), ("regression", "a value")])
def test_cards_of_other_tasks(told, task, says_so):
    says, metrics = told
    scores = {"multilabel": ("wa", "f1"), "regression": ("ccc", "pearson", "rmse")}[task]
    figures = {key: dict.fromkeys(scores, 0.25) for key in ("mean", "std", "pooled")}
    folds = [fold | dict.fromkeys(scores, 0.25) for fold in metrics["folds"]]
    values = {"values": {name: dict.fromkeys(scores, 0.125) for name in metrics["classes"]}}
    other = {key: value for key, value in metrics.items() if key not in ("confusion", "f1", "together")}
    text = model_card.markdown(
        "B", says, other | {"task": task, "folds": folds, "reference": {}} | figures | values, None, PARAMS
    )
    assert says_so in text
    assert "| class0 | 0.125 | 0.125" in text


# ---- From clips ------------------------------------------------------------------------------------------------------


def answered(folder, *arguments, module="avjax.predict") -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "COLUMNS": "80"}
    line = [sys.executable, "-m", module, "--workdir", folder, *arguments]
    return subprocess.run([*map(os.fspath, line)], env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.thorough
@pytest.mark.budget(120)
@pytest.mark.weights
def test_a_clip_gets_the_answer_of_the_run(tmp_path_factory, tmp_path):
    data, _, workdir = tiny_run.make(tmp_path_factory)
    bundle.write(workdir, tmp_path / "B")
    for lanes in ((), ("--fold=2", "--seed=1")):
        of_run, of_bundle = (
            answered(folder, "--json", *lanes, data / "take0", tmp_path / "gone.mp4")
            for folder in (workdir, tmp_path / "B")
        )
        assert of_bundle.returncode == 0, of_bundle.stderr
        assert of_bundle.stdout == of_run.stdout
        assert "gone.mp4: no such file" in of_bundle.stderr
    said = json.loads(answered(tmp_path / "B", "--json", data / "take0").stdout)["clips"]
    answers, rejected = avjax.load(tmp_path / "B").predict([data / "take0", str(tmp_path / "gone.mp4")])
    assert rejected == [(str(tmp_path / "gone.mp4"), "no such file")]
    assert [a.file for a in answers] == [clip["file"] for clip in said]
    for answer, clip in zip(answers, said, strict=True):
        np.testing.assert_allclose([*answer.scores.values()], [*clip["probabilities"].values()], rtol=0, atol=1e-6)


@pytest.mark.thorough
@pytest.mark.weights
def test_the_code_of_the_card_from_a_real_clip(java_sed, tmp_path_factory, tmp_path):
    _, _, workdir = tiny_run.make(tmp_path_factory)
    bundle.write(workdir, tmp_path / "B")
    shutil.copy(min((java_sed / "mp4").iterdir()), tmp_path / "clip.mp4")
    (tmp_path / "from_clips.py").write_text(exported.code(tmp_path / "B")[2])
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "from_clips.py"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    line = exported.code(tmp_path / "B", "bash")[0].split()
    assert line[:3] == ["python", "-m", "avjax.predict"]
    shown = subprocess.run(
        [sys.executable, *line[1:], "--json"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    said = json.loads(shown.stdout)["clips"][0]
    best = max(said["probabilities"].items(), key=lambda item: item[1])
    assert done.stdout.startswith(f"clip.mp4 [('{best[0]}', {best[1]:.4f}"[:-2])
    assert said["missing"] == {}
    bundle.check(tmp_path / "B")


@pytest.mark.thorough
@pytest.mark.weights
def test_a_cache_that_a_run_was_taught_answers_for_its_bundle(tmp_path_factory, tmp_path):
    data, features, trained = tiny_run.make(tmp_path_factory)
    clips, made_by = store.load(features, "lite"), runs.read_run(trained).made_by
    run = portable.recalled(clips, (3, 6))
    workdir = portable.finished(run, portable.emoasst(), tmp_path / "W", **made_by)
    text = fewshot.joined({"text": np.stack([c.text for c in run.predictor.caches])})["text"]
    found = fewshot.joined(prediction.read_outputs(run, clips))
    taught = caches.empty(run.classes, text, tuple(found), run.predictor.caches[0].origin)
    labels = [clips.classes[label] for label in clips.label]
    caches.save(caches.add(taught, clips.ids, labels, found), tmp_path / "C")
    bundle.write(workdir, tmp_path / "B")
    one = ("--json", "--cache", tmp_path / "C", data / "take0/1.mp4")
    of_run, of_bundle = (answered(folder, *one) for folder in (workdir, tmp_path / "B"))
    assert of_bundle.returncode == 0, of_bundle.stderr
    assert of_bundle.stdout == of_run.stdout
    assert json.loads(of_bundle.stdout)["cache_entries"] == 9
    refused = answered(tmp_path / "B", "--cache", tmp_path / "C", module="avjax.adapt")
    assert "a bundle of avjax.export, not a run of avjax.train" in refused.stderr
    bundle.write(workdir, tmp_path / "one", fold="1")
    refused = answered(tmp_path / "one", *one)
    assert "C: made for all lanes of the run; this bundle has 1 of them" in refused.stderr
