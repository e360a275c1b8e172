"""Bundles of every kind of model: what is written and read back answers as what was trained."""

import dataclasses

import numpy as np
import pytest

from avjax import config as configs
from avjax import models
from avjax.inference import bundle
from avjax.inference import predict as prediction
from avjax.inference import run as runs
from avjax.models.fusions import registry as fusions
from avjax.settings import FusionSettings
from tests import portable, tiny_raw


def checked(run: runs.Run, clips, config, folder) -> runs.Run:
    """The run out of a bundle that was written of it, when it was seen to answer as that does."""
    workdir = portable.finished(run, config, folder / "W")
    bundle.write(workdir, folder / "B")
    back = bundle.read(folder / "B")
    np.testing.assert_array_equal(prediction.probabilities(back, clips), prediction.probabilities(run, clips))
    assert back.model.prediction_heads == run.model.prediction_heads
    return back


@pytest.mark.parametrize(
    "name", ["mag", *(pytest.param(name, marks=pytest.mark.thorough) for name in ("avt_ca", "de_iii"))]
)
def test_fusions(name, tmp_path):
    run = portable.fusion(name)
    own = fusions.settings(name) | portable.SMALL.get(name, {})
    model = FusionSettings(name, streams=fusions.FUSIONS[name].streams, settings=own)
    config = dataclasses.replace(configs.settings("configs/fusion_folder.py"), model=model)
    checked(run, portable.features(3), config, tmp_path)


@pytest.mark.thorough
def test_caches(tmp_path):
    back = checked(portable.recalled(portable.features(2), (3, 5)), portable.features(3), portable.emoasst(), tmp_path)
    assert [len(cache.ids) for cache in back.predictor.caches] == [3, 5]
    assert {path.name for path in (tmp_path / "B" / "caches").iterdir()} == {"1-1.npz", "2-1.npz"}
    assert "ids, labels and features of 5 training clips" in (tmp_path / "B" / "model_card.md").read_text()
    assert bundle.read(tmp_path / "B", "2").predictor.caches[0].ids == back.predictor.caches[1].ids


@pytest.mark.thorough
def test_encoders_that_were_trained_along_come_with_the_bundle(tmp_path, monkeypatch):
    tiny_raw.register(monkeypatch)
    config, clips = tiny_raw.settings("lora"), tiny_raw.features(8)
    back = checked(portable.run_of(models.build(config.model, 3), clips, random=True), clips, config, tmp_path)
    assert isinstance(back.model.constants["pretrained"]["video"], dict), "they are not fetched again"
    text = (tmp_path / "B" / "model_card.md").read_text()
    assert "RANDOM WEIGHTS" in text
    assert "as many steps as below" in text
    assert "token ids for tiny_text" in (tmp_path / "B" / "provenance.json").read_text()
