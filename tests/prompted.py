"""Made-up features with prompts for tests, and small EmoAsst runs on them."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np

from avjax import config as configs
from avjax import models
from avjax.datasets.base import Fold
from avjax.evaluation import fewshot
from avjax.features.store import Features
from avjax.settings import Settings
from avjax.training import lanes as lane_plans
from avjax.training import loop, streamed_batches
from tests import synthetic

SMALL = {"label_in_query": True, "width": 8, "heads": 2, "inner": 8, "shots": 2, "tune_steps": 5}


def make(**more) -> Features:
    """Calls `synthetic.make` with prompts that name the class, and `classes`."""
    made = synthetic.make(**more)
    rng, width = np.random.default_rng(1), synthetic.SIZES["text"][1]
    classes = np.eye(len(made.classes), width, dtype=np.float32)
    prompts = classes[made.label][:, None] + 0.2 * rng.normal(size=(len(made.ids), 6, width)).astype(np.float32)
    present = np.ones(prompts.shape[:2], bool)
    return dataclasses.replace(
        made,
        arrays=made.arrays | {"prompts": prompts},
        masks=made.masks | {"prompts": present},
        constants={"classes": classes},
    )


def folds(ids: list[str]) -> tuple[Fold, ...]:
    """Makes folds of 48 clips with unequal training parts, so that the second lane is padded, and validation clips."""
    return (
        Fold("long", tuple(ids[:26]), tuple(ids[36:]), tuple(ids[26:36])),
        Fold("short", tuple(ids[:12]), tuple(ids[38:]), ()),
    )


def settings(**more):
    """Returns the settings of a small run."""
    chosen = {f"model__settings__{k}": v for k, v in SMALL.items()}
    chosen |= {"train__epochs": 2, "train__epochs_per_call": 2, "train__batch_size": 8, "train__seeds": (1,)}
    return configs.settings("configs/emoasst_folder.py", **chosen | more)


@functools.cache
def compiled(chosen: str, classes: int):
    """Makes the model and the trainer of a configuration, compiled once for all runs with equal settings."""
    config = Settings.of(json.loads(chosen))
    model = models.build(config.model, classes)
    return model, loop.make(model, config)


class Run:
    """A protocol that is trained in one call."""

    def __init__(self, features: Features, **more):
        self.config, self.features = settings(**more), features
        self.model, self.trainer = compiled(json.dumps(self.config.to_dict()), len(features.classes))
        protocol = self.config.protocol
        self.plan = lane_plans.plan(features, folds(features.ids), self.config.train.seeds, protocol)
        self.data = streamed_batches.choose(features, self.config, self.model.constants)
        self.state = self.trainer.init(self.plan.lanes, self.data)

    def train(self) -> "Run":
        """Trains all epochs; returns itself."""
        self.state, self.sums = self.trainer.epochs(self.state, self.plan.lanes, self.data, jnp.int32(1))
        return self

    def represented(self, data=None, **how) -> dict[str, np.ndarray]:
        """Returns `fewshot.represent` of the run."""
        return fewshot.represent(self.model, self.state, self.data if data is None else data, **how)


def equal(a, b) -> None:
    """Asserts that two trees of arrays are equal."""
    jax.tree.map(np.testing.assert_array_equal, a, b)
