"""ETG-AVER: its equations against plain float64 loops, and what must hold for every named variant."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from avjax import config, models, tasks
from avjax.datasets.base import Fold
from avjax.errors import AvjaxError
from avjax.models import etg_aver
from avjax.models.base import Output
from avjax.settings import EtgAverSettings
from avjax.training import batches, history, loop
from avjax.training import lanes as lane_plans
from tests import synthetic

VARIANTS = sorted(etg_aver.VARIANTS)
# One variant for each way that a program can differ; the others take as long and differ in names or weights alone.
_FEW = ("full", "concat", "fusion_additive", "summary_query")
FEW = [v if v in _FEW else pytest.param(v, marks=pytest.mark.thorough) for v in VARIANTS]


def settings(variant: str, **more):
    return config.settings(f"configs/etg_folder.py:{variant}", model__width=16, model__dropout=0.0, **more)


def batch(clips: int = 6, seed: int = 0) -> dict[str, np.ndarray]:
    made = synthetic.make(clips=clips, seed=seed)
    out = {"label": made.label, "weight": np.ones(clips, np.float32)}
    for stream in synthetic.SIZES:
        name = "text_both" if stream == "text" else stream
        out[stream], out[f"{stream}_mask"] = made.arrays[name], made.masks[name]
    return out


def padded(one: dict[str, np.ndarray], steps: int) -> dict[str, np.ndarray]:
    """More padding after every stream, filled with rubbish that must not be read."""
    out = dict(one)
    for stream in synthetic.SIZES:
        x, mask = one[stream], one[f"{stream}_mask"]
        rubbish = np.full((len(x), steps, x.shape[-1]), 7.5, np.float32)
        out[stream] = np.concatenate([np.where(mask[..., None], x, -3.25), rubbish], 1)
        out[f"{stream}_mask"] = np.concatenate([mask, np.zeros((len(x), steps), bool)], 1)
    return out


# ---- The equations ------------------------------------------------------------------------------------------------


def test_cosine_is_equation_3():
    rng = np.random.default_rng(0)
    text, steps = rng.normal(size=(2, 5)), rng.normal(size=(2, 4, 5))
    norm = lambda v: math.sqrt(sum(x * x for x in v))  # noqa: E731
    dot = lambda v, w: sum(x * y for x, y in zip(v, w, strict=True))  # noqa: E731
    expected = [[dot(text[b], s) / norm(text[b]) / norm(s) for s in steps[b]] for b in range(2)]
    ours = etg_aver.cosine(jnp.float32(text)[:, None, :], jnp.float32(steps))
    np.testing.assert_allclose(ours, expected, atol=1e-6)
    assert etg_aver.cosine(jnp.zeros((1, 5)), jnp.ones((1, 5)))[0] == 0


@pytest.mark.parametrize("weighting", ["softmax", "ratio"])
def test_step_weights_are_equation_4(weighting):
    similarity = np.array([[0.5, -0.2, 0.9, 0.3], [-0.1, -0.5, -0.2, 0.8], [0.1, 0.2, 0.3, 0.4]])
    mask = np.array([[1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]], bool)
    expected = np.zeros((3, 4))
    for b in range(2):
        score = [math.exp(s / 0.1) if weighting == "softmax" else max(s, 0.0) for s in similarity[b]]
        total = sum(s for s, m in zip(score, mask[b], strict=True) if m)
        for j in range(3):
            expected[b, j] = score[j] / total if total else 1 / 3  # no positive cosine: even weights
    ours = etg_aver.step_weights(jnp.float32(similarity), jnp.asarray(mask), weighting, 0.1)
    np.testing.assert_allclose(ours, expected, atol=1e-6)


@pytest.mark.parametrize(("steps", "count"), [(11, 8), (3, 8), (8, 8), (1, 8), (30, 4)])
def test_segments_average_equal_spans_of_the_clip(steps, count):
    rng = np.random.default_rng(steps)
    x = rng.normal(size=(1, steps, 2))
    mask = rng.random((1, steps)) < 0.8
    mask[0, -1] = True  # the clip's own length is up to its last valid step
    pooled, valid = etg_aver.segments(jnp.float32(x), jnp.asarray(mask), count)
    for g in range(count):
        inside = [n for n in range(math.floor(g * steps / count), math.ceil((g + 1) * steps / count)) if mask[0, n]]
        assert bool(valid[0, g]) == bool(inside)
        np.testing.assert_allclose(pooled[0, g], np.mean([x[0, n] for n in inside], 0) if inside else 0, atol=1e-5)


def test_text_query_is_equation_5():
    rng = np.random.default_rng(1)
    text, audio, video = (rng.normal(size=(1, n, 4)) for n in (3, 2, 2))
    masks = [np.array([[True, True, False]]), np.ones((1, 2), bool), np.ones((1, 2), bool)]
    module = etg_aver.TextQuery("attention", 4, 2, jnp.float32)
    args = [(jnp.float32(x), jnp.asarray(mask)) for x, mask in zip((text, audio, video), masks, strict=True)]
    variables = module.init(jax.random.key(0), *args)
    weight = {k: np.float64(variables["params"][k]["kernel"]) for k in ("query", "key", "value")}
    fused = np.zeros(4)
    for t in text[0, :2]:  # the third token is padding
        scores = [(t @ weight["query"]) @ (a @ weight["key"]) / math.sqrt(4) for a in audio[0]]
        alpha = [math.exp(s) / sum(math.exp(z) for z in scores) for s in scores]
        fused += sum(a * (v @ weight["value"]) for a, v in zip(alpha, video[0], strict=True)) / 2
    np.testing.assert_allclose(module.apply(variables, *args)[0][0], fused, atol=1e-5)


def test_loss_is_equations_6_and_7():
    logits = {
        h: np.random.default_rng(i).normal(size=(2, 3)) for i, h in enumerate(("fusion", "text", "audio", "video"))
    }
    one = {"label": jnp.array([2, 0]), **{f"{s}_mask": jnp.ones((2, 4), bool) for s in ("text", "audio", "video")}}
    one["audio_mask"] = one["audio_mask"].at[1].set(False)
    weights = {"fusion": 2.0, "text": 2.0, "audio": 1.0, "video": 1.0}
    output = Output({h: jnp.float32(v) for h, v in logits.items()}, {}, {})
    terms = etg_aver.hierarchical_loss(output, one, jnp.ones(3) / 3, weights=weights, imbalance="none", smoothing=0.0)
    for head, v in logits.items():
        for b, y in enumerate((2, 0)):
            expected = -weights[head] * (v[b][y] - math.log(sum(math.exp(z) for z in v[b])))
            if head == "audio" and b == 1:
                expected = 0.0  # the clip has no audio: its audio head is left out
            assert float(terms[head][b]) == pytest.approx(expected, abs=1e-5)


def test_focal_loss_takes_the_place_of_cross_entropy():
    logits = np.random.default_rng(0).normal(size=(2, 3))
    one = {"label": jnp.array([2, 0]), "text_mask": jnp.array([[True], [False]])}
    output = Output({"fusion": jnp.float32(logits), "text": jnp.float32(logits)}, {}, {})
    loss = models.build(settings("full", model__imbalance="focal").model, 3).loss
    terms = loss(output, one, jnp.ones(3) / 3)
    p = [math.exp(z[y]) / sum(math.exp(v) for v in z) for z, y in zip(logits, (2, 0), strict=True)]
    expected = [-2 * (1 - q) ** 2 * math.log(q) for q in p]  # both heads weigh 2
    np.testing.assert_allclose(terms["fusion"], expected, atol=1e-5)
    np.testing.assert_allclose(terms["text"], [expected[0], 0], atol=1e-5)


@pytest.mark.parametrize("kind", ["regression", "multilabel"])
def test_other_tasks_have_their_loss_in_its_place(kind):
    rng = np.random.default_rng(0)
    label = jnp.asarray(rng.random((4, 2)) < 0.5) if kind == "multilabel" else jnp.float32(rng.random((4, 2)))
    one = {"label": label, "weight": jnp.ones(4), "text_mask": jnp.array([[True], [True], [True], [False]])}
    output = Output({h: jnp.float32(rng.normal(size=(4, 2))) for h in ("fusion", "text")}, {}, {})
    terms = models.build(settings("full").model, 2, kind).loss(output, one, jnp.ones(2) / 2)
    for head, count in (("fusion", 4), ("text", 3)):  # both heads weigh 2
        expected = 2 * tasks.SCORINGS[kind].loss(output.logits[head][:count], label[:count], jnp.ones(count))
        np.testing.assert_allclose(terms[head][:count], expected, rtol=1e-5)
    assert terms["text"][3] == 0


@pytest.mark.parametrize("change", [{"model__imbalance": "class_weights"}, {"model__smoothing": 0.1}])
def test_options_of_classes_are_refused_on_other_tasks(change):
    with pytest.raises(AvjaxError, match="both are for classes, and the task is 'regression': set 'none' and 0"):
        models.build(settings("full", **change).model, 2, "regression")


@pytest.mark.slow
def test_even_weights_change_nothing():
    """Without any text the cosines are all 0, so the reweighted streams equal the plain ones."""
    model, variables, step = compiled_variant("full")
    one = batch() | {"text_mask": np.zeros_like(batch()["text_mask"])}
    guided = step(variables, one)[0][1]
    unguided = {k: v for k, v in variables["params"].items() if not k.startswith("guide")}
    plain = jax.jit(model.module.clone(guide=False).apply)({"params": unguided}, one)
    for stream in ("audio", "video"):
        np.testing.assert_allclose(guided.features[stream], plain.features[stream], atol=1e-6)
        steps = np.asarray(guided.attention[stream])
        counts = one[f"{stream}_mask"].sum(-1, keepdims=True)
        np.testing.assert_allclose(steps, np.where(one[f"{stream}_mask"], 1 / np.maximum(counts, 1), 0), atol=1e-6)


# ---- Every variant ------------------------------------------------------------------------------------------------


@functools.cache
def compiled(text: str):
    """A model with its variables and its jitted (variables, batch) → ((loss, output), gradients)."""
    model = models.build(EtgAverSettings.of(json.loads(text)), 3)
    prior = jnp.ones(3) / 3

    def total(variables, one):
        output = model.module.apply(variables, one)
        return sum(t.sum() for t in model.loss(output, one, prior).values()) / len(one["label"]), output

    return (
        model,
        jax.jit(model.module.init)(jax.random.key(0), batch()),
        jax.jit(jax.value_and_grad(total, has_aux=True)),
    )


def compiled_variant(variant: str):
    # The source of the text is the features' concern: the model is the same whatever the sentence was made from.
    chosen = dataclasses.replace(settings(variant).model, text_source="both")
    return compiled(json.dumps(chosen.to_dict()))


@pytest.mark.parametrize("variant", FEW)
def test_neighbours_and_padding_change_nothing(variant):
    model, variables, step = compiled_variant(variant)
    together = step(variables, batch())[0][1].logits
    assert set(together) == set(model.heads)
    alone = jax.jit(model.module.apply)(variables, {k: v[2:3] for k, v in padded(batch(), 5).items()}).logits
    for head, logits in together.items():
        np.testing.assert_allclose(alone[head], logits[2:3], atol=1e-5)


@pytest.mark.parametrize("missing", [("audio",), ("video",), ("text",), ("audio", "video", "text")])
@pytest.mark.parametrize("variant", FEW)
def test_missing_modalities_give_finite_answers(variant, missing):
    _, variables, step = compiled_variant(variant)
    one = batch() | {f"{s}_mask": np.zeros_like(batch()[f"{s}_mask"]) for s in missing}
    (loss, output), grads = step(variables, one)
    assert all(bool(jnp.isfinite(v).all()) for v in jax.tree.leaves((loss, output, grads)))
    if len(missing) == 3:
        head = variables["params"]["head_fusion"]["bias"]
        np.testing.assert_allclose(output.logits["fusion"], jnp.tile(head, (6, 1)), atol=1e-6)


@pytest.mark.parametrize("variant", FEW)
def test_fits_a_tiny_set(variant):
    """Adam on six clips, two of which lack a stream and cannot be fitted where that stream is all there is."""
    _, variables, step = compiled_variant(variant)
    adam = optax.adam(0.02)
    update = jax.jit(lambda v, m, g: (lambda d, m: (optax.apply_updates(v, d), m))(*adam.update(g, m)))
    opt_state, losses = adam.init(variables), []
    for _ in range(60):
        (loss, _), grads = step(variables, batch())
        variables, opt_state = update(variables, opt_state, grads)
        losses.append(float(loss))
    assert losses[-1] < 0.35 * losses[0]


def trained(variant: str):
    """A lane over eleven clips, its trainer and data."""
    features = synthetic.make(clips=12, speakers=0, signal=1.0)
    chosen = settings(
        variant, train__epochs=60, train__epochs_per_call=20, train__patience=0, train__learning_rate=0.03,
        train__batch_size=5, train__weight_decay=0.0, train__schedule="constant",
        protocol__select="last", protocol__validation=0.0,
    )  # fmt: skip
    fold = Fold("one", tuple(features.ids[:11]), tuple(features.ids[11:]))
    plan = lane_plans.plan(features, [fold], (1,), chosen.protocol)
    data = batches.resident(features, chosen.model.text_source, "train")
    return loop.make(models.build(chosen.model, 3), chosen), plan, data


@pytest.mark.parametrize("variant", FEW)
def test_an_epoch_gives_back_the_very_types_it_takes(variant):
    """So that no second call traces anew, in whatever order calls follow each other."""
    trainer, plan, data = trained(variant)
    state = jax.eval_shape(trainer.init, plan.lanes, data)
    after, _ = jax.eval_shape(trainer.epochs, state, plan.lanes, data, jnp.int32(1))
    kind = lambda v: (v.shape, v.dtype, v.weak_type)  # noqa: E731
    assert jax.tree.map(kind, after) == jax.tree.map(kind, state)


@pytest.mark.parametrize(
    "variant", [pytest.param(v, marks=() if v == "full" else pytest.mark.thorough) for v in VARIANTS]
)
def test_trains_without_retracing(variant):
    trainer, plan, data = trained(variant)
    state = trainer.init(plan.lanes, data)
    losses = []
    for first in (1, 21, 41):
        state, sums = trainer.epochs(state, plan.lanes, data, jnp.int32(first))
        losses += [r["train_loss"] for r in history.epoch_rows(sums, plan.names, first, compiled_variant(variant)[0])]
    assert trainer.epochs._cache_size() == 1
    assert losses[-1] < 0.35 * losses[0]


def test_missing_sound_attends_evenly_and_missing_picture_reads_the_sound():
    _, variables, step = compiled_variant("full")
    one = batch()
    no_sound = one | {"audio_mask": np.zeros_like(one["audio_mask"])}
    weights = np.asarray(step(variables, no_sound)[0][1].attention["fusion"])[0]
    np.testing.assert_allclose(weights, np.full_like(weights, 1 / weights.shape[-1]), atol=1e-6)
    no_picture = one | {"video_mask": np.zeros_like(one["video_mask"])}
    both = [
        step(variables, b)[0][1].features["fusion"][0] for b in (no_picture, no_picture | {"audio": one["audio"] * 2})
    ]
    assert float(jnp.abs(both[0] - both[1]).max()) > 1e-3


@pytest.mark.parametrize(
    ("variant", "expected"),
    # Width 16; streams of width 12 (text), 7 (audio), 9 (video); 3 classes.
    # Projections (12+7+9)·16 + 3·16 = 496; guides 2·(16·16+16) = 544; Eq. 5 3·(16·16+16) = 816; a head 16·3+3 = 51.
    [
        ("full", 496 + 544 + 816 + 4 * 51),
        ("no_hlo", 496 + 544 + 816 + 51),
        ("concat", (7 + 9) * 16 + 2 * 16 + 32 * 3 + 3),
        ("fusion_additive", 496 + 544 + 816 + 16 + 4 * 51),
        ("no_tmfef", 496 + 48 * 3 + 3 + 3 * 51),
        ("audio_only", 7 * 16 + 16 + 51),
    ],
)
def test_parameter_counts(variant, expected):
    model = models.build(settings(variant).model, 3)
    shapes = jax.eval_shape(model.module.init, jax.random.key(0), batch())
    assert sum(v.size for v in jax.tree.leaves(shapes)) == expected


def test_a_stream_of_the_model_width_enters_as_it_is():
    """The paper's encoders are all 768 wide: no projection there (Wei et al., TMFEF)."""
    chosen = config.settings("configs/etg_mafw.py", model__width=768).model
    wide = {s: np.zeros((1, 2, 768), np.float32) for s in synthetic.SIZES}
    wide |= {f"{s}_mask": np.ones((1, 2), bool) for s in synthetic.SIZES}
    shapes = jax.eval_shape(models.build(chosen, 11).module.init, jax.random.key(0), wide)
    # Two guides and three maps of Eq. 5, 768·768+768 each, and four heads 768·11+11.
    assert sum(v.size for v in jax.tree.leaves(shapes)) == 5 * (768 * 768 + 768) + 4 * (768 * 11 + 11)


def test_bfloat16_compute_keeps_float32_parameters_and_logits():
    chosen = settings("full", model__dtype="bfloat16").model
    _, variables, step = compiled_variant("full")
    rough = models.build(chosen, 3)
    a = step(variables, batch())[0][1].logits["fusion"]
    b = jax.jit(rough.module.apply)(variables, batch()).logits["fusion"]
    assert a.dtype == b.dtype == jnp.float32
    shapes = jax.eval_shape(rough.module.init, jax.random.key(0), batch())
    assert all(v.dtype == jnp.float32 for v in jax.tree.leaves(shapes))
    np.testing.assert_allclose(a, b, atol=0.05 * float(a.std()) + 0.05)


def test_focal_loss_reads_hard_labels():
    with pytest.raises(AvjaxError, match=r"model.smoothing is 0.1 with model.imbalance='focal'.*smoothing=0.0"):
        settings("full", model__imbalance="focal", model__smoothing=0.1)


def test_text_guidance_needs_text():
    with pytest.raises(AvjaxError, match="text guidance and attention fusion need text"):
        settings("full", model__streams=("audio", "video"))
