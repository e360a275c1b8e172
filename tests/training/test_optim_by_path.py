"""Learning rates by path, layer-wise decay, and batches whose gradients are added up piece by piece."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from avjax.errors import AvjaxError
from avjax.layers import masked_mean
from avjax.models import base
from avjax.models.base import Model, Output
from avjax.training import loop, optim
from tests import synthetic
from tests.training.test_loop import Run, small_loss
from tests.training.test_optim import settings
from tests.training.test_streamed import Run as Streamed
from tests.training.test_streamed import chosen

PATHS = (
    "core/head_fusion/kernel",
    "video/patches/kernel",
    "video/block_0/up/kernel",
    "video/block_1/norm/scale",
    "video/norm/scale",
    "audio/position_norm/scale",
    "audio/block_0/attention/query/kernel/down",
)


def test_layers_decay_towards_the_input_by_hand():
    factors = optim.factors(settings(layer_decay=0.5), PATHS)
    # Video has two blocks, audio one.
    assert factors == dict(zip(PATHS, (1, 0.125, 0.25, 0.5, 1, 0.25, 0.5), strict=True))


def test_the_first_rate_that_is_found_counts_and_multiplies_the_decay():
    rates = (("^video/.*kernel", 0.1), ("^video/", 0.0), ("kernel$", 10.0))
    factors = optim.factors(settings(rates=rates), PATHS)
    assert list(factors.values()) == [10, 0.1, 0.1, 0, 0, 1, 1]
    both = optim.factors(settings(rates=rates, layer_decay=0.5), PATHS)
    assert [round(v, 6) for v in both.values()] == [10, 0.0125, 0.025, 0, 0, 0.25, 0.5]


@pytest.mark.parametrize(
    ("changes", "paths", "message"),
    [
        ({"rates": (("^vidio/", 0.1),)}, PATHS, r"train\.rates: '\^vidio/' matches no path .* core/head_fusion"),
        ({"layer_decay": 0.9}, PATHS[:1], r"train\.layer_decay is 0\.9, but no block of an encoder is trained"),
    ],
)
def test_what_finds_nothing_is_a_mistake(changes, paths, message):
    with pytest.raises(AvjaxError, match=message):
        optim.factors(settings(**changes), paths)


def test_patterns_must_be_expressions():
    with pytest.raises(AvjaxError, match=r"train\.rates: '\(' is no regular expression"):
        settings(rates=(("(", 0.1),))


def tree() -> dict:
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    return {"core": {"kernel": draw(3, 2)}, "video": {"block_0": {"up": draw(2, 2)}, "patches": {"kernel": draw(4)}}}


@pytest.mark.parametrize("jitted", [False, True])
def test_a_factor_multiplies_the_whole_direction(jitted):
    """As if every part had an optimizer of its own with its own rate, weight decay with it."""
    config = settings(clip_norm=0.0, layer_decay=0.5, rates=(("core", 3.0),))
    ours, plain = optim.transform(config), optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.02))
    one = other = tree()
    update = jax.jit(ours.update) if jitted else ours.update
    state, their_state = ours.init(one), plain.init(other)
    for step in range(3):
        grads = jax.tree.map(lambda p, s=step: jnp.cos(p * (s + 1)), one)
        directions, state = update(grads, state, one)
        expected, their_state = plain.update(grads, their_state, other)
        expected["core"]["kernel"] *= 3
        expected["video"]["block_0"]["up"] *= 0.5
        expected["video"]["patches"]["kernel"] *= 0.25
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), directions, expected)
        one = other = jax.tree.map(lambda p, d: p - 0.1 * d, one, directions)


def test_clip_norm_0_clips_nothing():
    grads = jax.tree.map(lambda p: 1e6 * p, tree())
    ours = optim.transform(settings(clip_norm=0.0, optimizer="sgd", weight_decay=0.0))
    directions, _ = ours.update(grads, ours.init(tree()), tree())
    jax.tree.map(np.testing.assert_array_equal, directions, grads)


# ---- Accumulation -------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """Reads the audio and a constant, which both count in the gradient."""

    keeps: bool = False
    rate: float = 0.0

    @nn.compact
    def __call__(self, batch, train: bool = False) -> Output:
        x = masked_mean(batch["audio"], batch["audio_mask"]) + batch.get("shift", jnp.zeros(7))[None]
        if self.keeps:
            x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(self.rate, deterministic=not train)(nn.Dense(16)(x))
        return Output({"fusion": nn.Dense(3)(jnp.tanh(x))}, {}, {})


PLAIN = Model(module=Plain(), loss=small_loss, heads=("fusion",), streams=("audio",))
VALUES = dataclasses.replace(
    PLAIN, task="regression", loss=lambda output, batch, prior: base.fusion_loss(output, batch, "regression")
)


def test_a_batch_is_cut_and_what_is_filled_in_weighs_nothing():
    batch = {
        "audio": np.arange(10.0).reshape(5, 2),
        "audio_mask": np.ones((5, 2), bool),
        "label": np.arange(5),
        "weight": np.ones(5),
        "shift": np.ones((5, 2)),
        "pretrained": {"kernel": np.ones((5, 3))},
    }
    rows, shared = optim.cut(batch, 2)
    assert shared.keys() == {"shift", "pretrained"}
    assert {k: v.shape for k, v in rows.items()} == {
        "audio": (2, 3, 2), "audio_mask": (2, 3, 2), "label": (2, 3), "weight": (2, 3)}  # fmt: skip
    np.testing.assert_array_equal(rows["weight"], [[1, 1, 1], [1, 1, 0]])
    np.testing.assert_array_equal(rows["audio"][1], [[6, 7], [8, 9], [0, 0]])
    assert not rows["audio_mask"][1, 2].any()


FEATURES = dataclasses.replace(synthetic.make(signal=0.5), constants={"shift": np.linspace(0, 1, 7, dtype="f")})


@pytest.mark.budget(8)
def test_updates_are_those_of_whole_batches():
    """26 and 9 clips in batches of 8: pieces of 3 and 3 and 2 clips, and batches that padding fills up."""
    common = {"features": FEATURES, "model": PLAIN, "seeds": (1,), "train__epochs_per_call": 2}
    full, cut = (Run(**common, train__accumulate=k).call() for k in (1, 3))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), full.state.params, cut.state.params)
    for name in ("train_terms", "train_gradient"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), full.sums[name], cut.sums[name])


@pytest.mark.thorough
def test_updates_from_disk_are_those_of_whole_batches():
    made = (chosen(train__accumulate=k) for k in (1, 3))
    full, cut = (Streamed(features=FEATURES, model=PLAIN, made=one).train() for one in made)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), full.state.params, cut.state.params)


def test_pieces_draw_different_dropout():
    class Dropped(nn.Module):
        @nn.compact
        def __call__(self, batch, train: bool = False) -> Output:
            kernel = self.param("weights", nn.initializers.ones, (512,))
            x = nn.Dropout(0.5, deterministic=not train)(kernel)
            return Output({"fusion": jnp.sum(x)[None, None] * jnp.ones((batch["weight"].shape[0], 1))}, {}, {})

    model = Model(Dropped(), lambda output, batch, prior: {"sum": output.logits["fusion"][:, 0]}, ("fusion",), ())
    run = Run(train__optimizer="sgd", train__weight_decay=0.0, train__clip_norm=0.0, train__schedule="constant",
              train__warmup=0.0, train__learning_rate=1.0, train__accumulate=2)  # fmt: skip
    lane = jax.tree.map(lambda v: v[0], run.plan.lanes)
    batch = {"label": jnp.zeros(2, int), "weight": jnp.ones(2)}
    recipe = loop.recipe_of(model, run.config)
    state = loop.init_state(recipe, lane, {}, batch)
    state, _ = loop.train_step(recipe, state, lane, batch, jax.random.key(0))
    gradient = np.asarray(1 - state.params["weights"])
    # Kept in neither piece, in one, in both: a quarter, a half, a quarter.
    assert sorted(set(gradient.round(5).tolist())) == [0, 1, 2]
    assert np.mean(gradient == 1) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"features": synthetic.values(48), "model": VALUES}, r"train\.accumulate is 2, but .* \(its loss\)"),
        ({"model": dataclasses.replace(PLAIN, module=Plain(keeps=True))}, r"\(the statistics of its norms\)"),
        ({"model": dataclasses.replace(PLAIN, whole_batch=True)}, r"learns by whole batches \(its loss\)"),
    ],
)
def test_what_is_of_a_whole_batch_is_not_cut(more, message):
    with pytest.raises(AvjaxError, match=message):
        Run(**more, train__accumulate=2).call()
