"""Portable programs: what they answer is what the run answers, whatever the number of clips and steps."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from jax import export

from avjax import config as configs
from avjax import models
from avjax.errors import AvjaxError
from avjax.evaluation.predictor import Caches
from avjax.inference import predict as prediction
from avjax.inference import run as runs
from avjax.inference import stablehlo
from avjax.models.fusions.registry import FUSIONS
from tests import portable, tiny_raw

CLOSE = 1e-6
# Models that cut steps into groups, or ask for a least number of them.
GROUPED = ("avt_ca", "avtca_released", "mmer_ia", "mmer_it", "mmer_lt")
QUICK = ("mag", "bc_lstm", "avt_ca")
thorough = pytest.mark.thorough


def exported(run: runs.Run) -> export.Exported:
    return stablehlo.exported(run, stablehlo.weights_of(run))


def answers(run, clips, portable_program, multiple: int = 1) -> np.ndarray:
    """Of the program, by way of its bytes, as another machine gets it."""
    again = export.deserialize(portable_program.serialize())
    return np.asarray(again.call(stablehlo.weights_of(run), portable.streams_of(run, clips, multiple)))


def same(run, clips, multiple: int = 1) -> export.Exported:
    """Whether both answer the same; the program."""
    expected = prediction.probabilities(run, clips)
    assert np.ptp(expected, 0).max() > 0.001, "clips that get the same answer test nothing"
    made = exported(run)
    found = answers(run, clips, made, multiple)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=CLOSE)
    return made


# ---- Models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=thorough) for n in FUSIONS])
def test_a_program_answers_as_its_run(name):
    same(portable.fusion(name), portable.features(7), 16 if name in GROUPED else 1)


@pytest.mark.parametrize("task", ["multilabel", "regression", pytest.param("soft", marks=thorough)])
def test_answers_are_of_the_task(task):
    same(portable.fusion("mag", task=task), portable.features(3))


@pytest.mark.parametrize("variant", ["full", pytest.param("no_hlo,summary_query", marks=thorough)])
def test_etg_aver(variant):
    config = configs.settings(f"configs/etg_folder.py:{variant}", model__width=16)
    same(portable.run_of(models.build(config.model, 3), portable.features(2)), portable.features(5))


def test_features_that_are_not_standardised():
    run = dataclasses.replace(portable.fusion("mag"), stats={})
    assert not any(name.startswith("stats/") for name in stablehlo.weights_of(run))
    same(run, portable.features(3))


def pictures(clips: int):
    rng = np.random.default_rng(1)
    few = portable.features(clips)
    video = rng.integers(0, 256, (clips, 5, 32, 32, 3), np.uint8)
    mask = np.arange(5)[None] < rng.integers(2, 6, clips)[:, None]
    return dataclasses.replace(few, arrays=few.arrays | {"video": video}, masks=few.masks | {"video": mask})


@thorough
def test_pictures():
    small = {"model__settings__width": 16, "model__settings__heads": 2}
    config = configs.settings("configs/avtca_folder.py", **small)
    model = models.build(config.model, 3)
    made = same(portable.run_of(model, pictures(2)), pictures(3), 16)
    assert stablehlo.inputs(made)["video"] == {"shape": ["clips", "16*video_steps", 32, 32, 3], "dtype": "uint8"}


@pytest.mark.parametrize(("variant", "preset"), [("lora", "tiny_raw"), ("finetune", "tiny_waves")])
@thorough
def test_encoders_that_were_trained_along(variant, preset, monkeypatch):
    tiny_raw.register(monkeypatch)
    model = models.build(tiny_raw.settings(variant, preset).model, 3)
    few = tiny_raw.features(8, preset)
    run = portable.run_of(model, few)
    weights = stablehlo.weights_of(run)
    assert any(name.startswith("constants/pretrained/audio/") for name in weights)
    made = same(run, few)
    assert stablehlo.inputs(made)["text"] == {"shape": ["clips", 7, 1], "dtype": "int32"}


def without_votes(run: runs.Run) -> runs.Run:
    silent = [dataclasses.replace(c, alpha=dict.fromkeys(c.alpha, 0.0)) for c in run.predictor.caches]
    return dataclasses.replace(run, predictor=Caches(tuple(silent)))


@pytest.mark.budget(10)
@pytest.mark.parametrize("sizes", [(4, 7), pytest.param((0, 3), marks=thorough)])
def test_caches_vote_in_the_program(sizes):
    run, clips = portable.recalled(portable.features(2), sizes), portable.features(5)
    voted, silent = (prediction.probabilities(r, clips) for r in (run, without_votes(run)))
    assert np.abs(voted - silent).max() > 0.001
    same(run, clips)


# ---- Sizes -----------------------------------------------------------------------------------------------------------


@functools.cache
def etg() -> tuple[runs.Run, export.Exported]:
    config = configs.settings("configs/etg_folder.py", model__width=16)
    run = portable.run_of(models.build(config.model, 3), portable.features(2))
    return run, exported(run)


@pytest.mark.parametrize(("clips", "more"), [(1, 0), pytest.param(7, 0, marks=thorough), (7, 30)])
def test_any_number_of_clips_and_steps(clips, more):
    run, made = etg()
    np.testing.assert_allclose(
        answers(run, portable.features(clips, more=more), made),
        prediction.probabilities(run, portable.features(clips)),
        rtol=0,
        atol=CLOSE,
    )


def test_neighbours_and_what_is_masked_change_nothing():
    run, made = etg()
    streams = portable.streams_of(run, portable.features(5))
    alone = [
        made.call(stablehlo.weights_of(run), {key: value[i : i + 1] for key, value in streams.items()})
        for i in range(5)
    ]
    assert all(np.isnan(streams[s]).any() for s in run.model.streams)
    together = np.asarray(made.call(stablehlo.weights_of(run), streams))
    np.testing.assert_allclose(np.concatenate(alone), together, rtol=0, atol=CLOSE)
    clean = {key: np.nan_to_num(value) for key, value in streams.items()}
    np.testing.assert_array_equal(made.call(stablehlo.weights_of(run), clean), together)


def test_a_program_is_for_all_platforms_and_names_its_sizes():
    _, made = etg()
    assert export.deserialize(made.serialize()).platforms == ("cpu", "cuda", "tpu")
    assert stablehlo.inputs(made) == {
        "audio": {"shape": ["clips", "audio_steps", 7], "dtype": "float32"},
        "audio_mask": {"shape": ["clips", "audio_steps"], "dtype": "bool"},
        "text": {"shape": ["clips", "text_steps", 12], "dtype": "float32"},
        "text_mask": {"shape": ["clips", "text_steps"], "dtype": "bool"},
        "video": {"shape": ["clips", "video_steps", 9], "dtype": "float32"},
        "video_mask": {"shape": ["clips", "video_steps"], "dtype": "bool"},
    }


def test_a_program_does_not_say_where_it_was_made():
    assert b".py" not in etg()[1].serialize()


def test_products_are_full_float32_on_every_platform():
    text = etg()[1].mlir_module()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert products
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)


# ---- What cannot be exported -----------------------------------------------------------------------------------------


def test_a_run_that_does_not_say_how_wide_its_streams_are():
    run, _ = etg()
    with pytest.raises(AvjaxError, match=r"has no width of text, audio, video\); train again"):
        exported(dataclasses.replace(run, streams={}))


def test_a_model_that_cannot_be_traced_is_named_with_the_reason():
    run, _ = etg()
    streams = run.streams | {"video": ((8, 10), "float32")}
    with pytest.raises(AvjaxError, match=r"run made up: no portable program of its model \(TypeError: .*\(1, 8, 10\)"):
        exported(dataclasses.replace(run, streams=streams))


def test_settings_of_jax_stay_as_they_were():
    before = jax.config.jax_traceback_in_locations_limit
    assert before != 0
    etg()
    assert jax.config.jax_traceback_in_locations_limit == before
