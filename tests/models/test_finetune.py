"""ETG-AVER with its encoders in training: from raw inputs to predictions, with all weights and with LoRA."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from avjax import encoders, models
from avjax.datasets.base import Fold
from avjax.encoders import formats, random_weights
from avjax.errors import AvjaxError
from avjax.features import presets
from avjax.models import finetune, lora
from avjax.models.end_to_end import PRETRAINED
from avjax.settings import LoraSettings
from avjax.training import batches, history, loop
from avjax.training import lanes as lane_plans
from tests import tiny_raw

STREAMS = ("text", "audio", "video")
CLIPS = tiny_raw.features()
IDS = CLIPS.ids
FOLDS = (Fold("a/b", tuple(IDS[:8]), tuple(IDS[8:]), tuple(IDS[6:8])),)
every_sound = pytest.mark.parametrize("preset", ["tiny_raw", pytest.param("tiny_waves", marks=pytest.mark.slow)])
close = functools.partial(np.testing.assert_allclose, atol=1e-5)


@pytest.fixture(autouse=True, scope="module")
def tiny():
    with pytest.MonkeyPatch.context() as patch:
        tiny_raw.register(patch)
        yield


@functools.cache
def built(variants: str = "lora", preset: str = "tiny_raw", **more):
    config = tiny_raw.settings(variants, preset, **more)
    return models.build(config.model, 3), config


def batch_of(model, preset: str = "tiny_raw", rows: slice = slice(None)):
    return tiny_raw.batch(CLIPS if preset == "tiny_raw" else tiny_raw.features(preset=preset), model.constants, rows)


@functools.cache
def started(variants: str = "lora", preset: str = "tiny_raw", **more):
    """A model, its batch, and its variables before the first step."""
    model, _ = built(variants, preset, **more)
    one = batch_of(model, preset)
    return model, one, jax.jit(model.module.init)(jax.random.key(0), one)


@functools.cache
def applied(model):
    return jax.jit(functools.partial(model.module.apply, train=False))


def predict_logits(model, variables, one) -> dict[str, np.ndarray]:
    return jax.device_get(applied(model)(variables, one).logits)


def stirred(variables, seed: int = 0):
    """All trained params, moved a little at random."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32), variables)


# ---- The start ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@every_sound
def test_begins_as_the_core_on_the_features_of_the_encoders(preset):
    """By LoRA and by all weights exactly alike; the encoders' own call is the reference."""
    model, one, variables = started("lora", preset)
    full, _, _ = started("finetune", preset)
    features = dict(one)
    for stream, e in zip(("video", "audio", "text"), encodings(preset), strict=True):
        encoder = encoders.load(e.source, layer=e.layer, pool=e.pool, random=True)
        raw, mask = one[stream], one[f"{stream}_mask"]
        if stream == "video":
            images = ((raw.reshape(-1, 16, 16, 3) / 255 - 0.5) / 0.5).astype(np.float32)
            encoded, real = encoder(images, mask.reshape(-1))
            encoded, real = encoded.reshape(*mask.shape, -1), real.reshape(mask.shape)
        else:
            encoded, real = encoder(raw.swapaxes(1, 2) if raw.shape[-1] == 6 else raw[..., 0], mask)
        if e.layer is not None:
            encoded = (encoded - encoded.mean(-1, keepdims=True)) / np.sqrt(encoded.var(-1, keepdims=True) + 1e-5)
        features |= {stream: encoded, f"{stream}_mask": real}
    core = {"params": variables["params"]["core"]}
    expected = jax.jit(full.module.core.apply)(core, features).logits
    ours = predict_logits(model, variables, one)
    pretrained = one[PRETRAINED]
    joint = {"params": {"core": core["params"], **{s: pretrained[s] for s in STREAMS}}}
    same = predict_logits(full, joint, one)
    for head in model.heads:
        close(ours[head], expected[head], err_msg=head)
        np.testing.assert_array_equal(ours[head], same[head])


def encodings(preset: str):
    chosen = presets.preset(preset)
    return chosen.image, chosen.speech, chosen.text


def test_only_what_is_trained_is_a_parameter():
    _, one, variables = started("lora")
    kernels = {"query", "key", "value", "out"}
    for stream in STREAMS:
        paths = [path.split("/") for path in flatten_dict(variables["params"][stream], sep="/")]
        assert {path[2] for path in paths} == kernels
        assert {tuple(path[-2:]) for path in paths} == {("kernel", "down"), ("kernel", "up")}
    chosen = ("^text/", "/bias$", "^video/block_0")
    _, _, variables = started("finetune", model__encoders__frozen=chosen)
    assert not variables["params"].get("text")
    trained = set(flatten_dict(variables["params"]["video"], sep="/"))
    everything = set(flatten_dict(one[PRETRAINED]["video"], sep="/"))
    assert trained == {path for path in everything if not path.endswith("bias") and not path.startswith("block_0")}
    assert variables["params"].keys() >= {"core", "audio", "video"}


def test_only_a_norm_behind_the_blocks_is_called_norm():
    """By its name it is known that its rate is that of the heads (`optim.factors`)."""
    _, one, _ = started("lora", "tiny_waves")
    assert "position_norm" in one[PRETRAINED]["audio"]
    assert "norm" not in one[PRETRAINED]["audio"]
    assert "norm" in one[PRETRAINED]["video"]


def test_blocks_above_the_layer_are_not_there():
    _, one, _ = started("lora")
    assert {k for k in one[PRETRAINED]["audio"] if k.startswith("block_")} == {"block_0"}


# ---- Predictions --------------------------------------------------------------------------------------------------


@every_sound
def test_neighbours_and_padding_change_no_answer(preset):
    model, one, variables = started("lora", preset)
    variables = stirred(variables)
    joint = predict_logits(model, variables, one)
    wide = dict(one)
    for stream in STREAMS:
        x, mask = one[stream], one[f"{stream}_mask"]
        rubbish = np.full((len(x), 5, *x.shape[2:]), 77, x.dtype)
        clean = np.where(mask.reshape(*mask.shape, *[1] * (x.ndim - 2)), x, np.asarray(55, x.dtype))
        wide[stream] = np.concatenate([clean, rubbish], 1)
        wide[f"{stream}_mask"] = np.concatenate([mask, np.zeros((len(x), 5), bool)], 1)
    padded = predict_logits(model, variables, wide)
    for row in (0, 3, 5, 7):
        alone = predict_logits(model, variables, batch_of(model, preset, slice(row, row + 1)))
        for head in model.heads:
            close(joint[head][row], alone[head][0], err_msg=head)
    for head in model.heads:
        close(joint[head], padded[head], atol=2e-5, err_msg=head)


@pytest.mark.slow
@every_sound
def test_a_missing_modality_costs_no_gradient_and_brings_no_nan(preset):
    """Clip 3 lacks audio, 5 a face, 7 its sentence; each alone, with arbitrary values for what is missing."""
    model, _, variables = started("finetune", preset)

    @jax.jit
    def gradient(params, batch):
        def loss(params):
            output = model.module.apply({"params": params}, batch, train=True)
            return sum(jnp.sum(term) for term in model.loss(output, batch, jnp.ones(3) / 3).values())

        return jax.grad(loss)(params)

    for row, lacking in ((3, "audio"), (5, "video"), (7, "text")):
        alone = batch_of(model, preset, slice(row, row + 1))
        if lacking == "audio":
            alone["audio"] = np.full_like(alone["audio"], np.nan)
        grads = gradient(variables["params"], alone)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
        for stream in STREAMS:
            moves = any(leaf.any() for leaf in jax.tree.leaves(grads[stream]))
            assert moves == (stream != lacking), (lacking, stream)


@pytest.mark.slow
def test_bfloat16_is_close():
    model, one, variables = started("lora")
    half, _ = built("lora", model__dtype="bfloat16")
    exact, rough = predict_logits(model, variables, one), predict_logits(half, variables, one)
    for head in model.heads:
        assert np.abs(rough[head] - exact[head]).max() < 0.1 * np.abs(exact[head]).max()
        assert not np.array_equal(rough[head], exact[head])
        assert rough[head].dtype == np.float32


# ---- Training -----------------------------------------------------------------------------------------------------


class Trained:
    """A run of two lanes on made-up clips, and how often it was traced."""

    def __init__(self, variants: str, **more):
        self.model, self.config = built(variants, **more)
        self.plan = lane_plans.plan(CLIPS, FOLDS, (1, 2), self.config.protocol)
        self.data = batches.resident(CLIPS, "both", self.config.protocol.standardise, self.model.constants)
        loop.check_streams(self.model, self.data.resident(jnp.arange(1)), "tiny_raw")
        self.trainer = loop.make(self.model, self.config)
        self.initial = self.state = self.trainer.init(self.plan.lanes, self.data)
        self.initial = jax.tree.map(jnp.copy, self.initial)
        self.rows = []
        for first in (1, 5):
            self.state, sums = self.trainer.epochs(self.state, self.plan.lanes, self.data, jnp.int32(first))
            self.rows += history.epoch_rows(sums, self.plan.names, first, self.model)
        self.predictions = jax.device_get(self.trainer.predict(self.state, self.plan.lanes, self.data))


FREE = {"train__learning_rate": 5e-3, "train__schedule": "constant", "train__epochs": 8, "train__batch_size": 3}


@pytest.fixture(scope="module")
def low() -> Trained:
    return Trained("lora", model__encoders__frozen=("^text/",), train__accumulate=2, **FREE)


@pytest.mark.slow
def test_loss_falls_from_raw_inputs(low):
    losses = [row["train_loss"] for row in low.rows]
    assert np.mean(losses[-2:]) < 0.4 * np.mean(losses[:2])
    assert low.trainer.epochs._cache_size() == 1, "nothing is traced again"


@pytest.mark.slow
def test_what_is_frozen_does_not_move_and_the_rest_does(low):
    initial, ended = (flatten_dict(state.params, sep="/") for state in (low.initial, low.state))
    assert not [path for path in ended if path.startswith("text/")]
    still = [path for path in ended if np.array_equal(initial[path], ended[path])]
    assert not still
    assert {path.split("/")[0] for path in ended} == {"core", "audio", "video"}


@pytest.mark.slow
def test_merged_weights_answer_as_the_run_does(low, tmp_path):
    """Each lane's encoders as plain params, of a model that trains none of them."""
    finetune.write_merged(tmp_path / "merged", low.model, low.state.best, low.plan.names)
    written = sorted(path.name for path in (tmp_path / "merged").iterdir())
    assert written == sorted(f"a%2Fb-{seed}-{s}.safetensors" for seed in (1, 2) for s in STREAMS)
    plain, _ = built("finetune", model__encoders__frozen=("",))
    one = batch_of(plain, rows=slice(8, None))
    for lane, (_, seed) in enumerate(low.plan.names):
        files = {s: tmp_path / "merged" / f"a%2Fb-{seed}-{s}.safetensors" for s in STREAMS}
        weights = {s: unflatten_dict(formats.read(file), sep="/") for s, file in files.items()}
        core = jax.tree.map(lambda leaf, lane=lane: leaf[lane], low.state.best["params"]["core"])
        ours = predict_logits(plain, {"params": {"core": core}}, one | {PRETRAINED: weights})
        for head in low.model.heads:
            close(ours[head], low.predictions[head][lane], atol=1e-4, err_msg=head)
        for leaf, before in zip(*map(jax.tree.leaves, (weights["text"], one[PRETRAINED]["text"])), strict=True):
            np.testing.assert_array_equal(leaf, before)
    assert not np.allclose(low.predictions["fusion"][0], low.predictions["fusion"][1], atol=1e-2)


@pytest.mark.slow
def test_files_say_what_they_were_made_of(low, tmp_path):
    from safetensors import safe_open

    finetune.write_merged(tmp_path, low.model, low.state.best, low.plan.names[:1])
    with safe_open(tmp_path / "a%2Fb-1-video.safetensors", "np") as file:
        assert file.metadata() == {"source": "tiny_image", "sha256": "random, seed 0"}
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    params = low.model.constants[PRETRAINED]["video"]
    assert shapes == {name: leaf.shape for name, leaf in flatten_dict(params, sep="/").items()}


def test_runs_without_lora_write_no_encoders(tmp_path):
    finetune.write_merged(tmp_path / "merged", built("finetune")[0], {}, [("a", 1)])
    assert not (tmp_path / "merged").exists()


@pytest.mark.slow
def test_all_weights_are_trained_with_layer_wise_decay():
    run = Trained("finetune", train__layer_decay=0.1, **FREE | {"train__learning_rate": 1e-3})
    losses = [row["train_loss"] for row in run.rows]
    assert np.mean(losses[-2:]) < 0.5 * np.mean(losses[:2])
    initial, ended = (flatten_dict(state.params, sep="/") for state in (run.initial, run.state))
    moved = {path: float(np.abs(ended[path] - initial[path]).mean()) for path in ended}
    kernels = ["video/patches/kernel", "video/block_0/up/kernel", "video/block_1/up/kernel", "core/head_video/kernel"]
    distances = [moved[path] for path in kernels]
    # Adam's steps are alike, so the ratios are about those of the rates; more of a run cancels where rates are large.
    assert 0 < distances[0] < distances[1] / 3 < distances[2] / 9 < distances[3] / 20


# ---- Memory -------------------------------------------------------------------------------------------------------

WIDER = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 96}
REMATTED = {
    "tiny_image": (WIDER | {"image_size": 64}, (4, 64, 64, 3), (4,)),
    "tiny_text": (WIDER, (8, 60), (8, 60)),
    "tiny_waves": (WIDER, (4, 1600), (4, 1600)),
    "tiny_spectra": (
        {"d_model": 48, "encoder_layers": 4, "encoder_attention_heads": 4, "encoder_ffn_dim": 96},
        (8, 6, 100),
        (8, 100),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [k if k == "tiny_text" else pytest.param(k, marks=pytest.mark.slow) for k in REMATTED])
def test_remat_gives_the_same_and_holds_less_for_the_gradient(kind):
    """What is held between an encoder and its gradient, its params aside; on a CPU the compiler undoes the rest."""
    changes, shape, masked = REMATTED[kind]
    contents = tiny_raw.SHAPES[kind] | changes
    family = encoders.FAMILIES[contents["model_type"]]
    module = family.build(contents, jnp.float32, None)
    params = random_weights.params(family.shapes(module.config))
    draw = np.random.default_rng(0)
    inputs = draw.integers(0, 1000, shape).astype(np.int32) if kind == "tiny_text" else draw.normal(size=shape)
    inputs = inputs if kind == "tiny_text" else inputs.astype(np.float32)

    def loss(remat, params):
        features, _ = module.clone(remat=remat).apply({"params": params}, inputs, np.ones(masked, bool))
        return jnp.sum(jnp.sin(features))

    losses = [functools.partial(loss, remat) for remat in (False, True)]
    (value, grads), (other, others) = (jax.jit(jax.value_and_grad(f))(params) for f in losses)
    np.testing.assert_allclose(value, other, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), grads, others)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    pullbacks = [jax.eval_shape(lambda params, f=f: jax.vjp(f, params)[1], params) for f in losses]
    held = [sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(p)) - size for p in pullbacks]
    assert held[1] < 0.4 * held[0], held


# ---- True sizes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["open_raw", "etg_raw"])
def test_lora_trains_less_than_two_percent(preset):
    """Of the encoders at their true sizes, which need not be available."""
    chosen, how = presets.preset(preset), lora.Tuning(lora=LoraSettings())
    trained = total = 0
    for stream, e in (("video", chosen.image), ("audio", chosen.speech), ("text", chosen.text)):
        family, module, _ = encoders.architecture(e.source, layer=e.layer, dtype="float32")
        shapes = family.shapes(module.config)
        initial = jax.eval_shape(lambda key, stream=stream, shapes=shapes: lora.init_params(key, how, stream, shapes),
                               jax.random.key(0))  # fmt: skip
        trained += sum(leaf.size for leaf in jax.tree.leaves(initial))
        total += sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert 0.002 < trained / total < 0.02


def test_a_model_is_described_without_weights(monkeypatch):
    monkeypatch.setattr(encoders, "load", None)
    model = models.build(tiny_raw.settings("lora", "etg_raw", weights__random=False).model, 3)
    assert list(model.constants) == [PRETRAINED]
    assert len(model.constants) == 1
    assert (model.frame_stream, model.heads) == ("video", ("fusion", "text", "audio", "video"))
    with pytest.raises(KeyError):
        model.constants["other"]


# ---- Settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"tune": "some"}, r"model\.encoders\.tune is 'some'; choose one of full, lora"),
        ({"frozen": ("(",)}, r"model\.encoders\.frozen: '\(' is no regular expression"),
        ({"lora__targets": ("[",)}, r"model\.encoders\.lora\.targets: '\[' is no regular expression"),
        ({"lora__rank": 0}, r"model\.encoders\.lora\.rank is 0; expected at least 1"),
        ({"preset": "open"}, r"preset 'open' stages features, .*; take one of .*open_raw, etg_raw"),
        (
            {"preset": "tiny_b2"},
            r"hsemotion_b2: this encoder cannot be trained; those of bert, .*, whisper can",
        ),
    ],
)
def test_settings_that_do_not_fit_are_named(more, message, monkeypatch):
    image = presets.Encoding("hsemotion_b2", pool="mean")
    monkeypatch.setitem(presets.PRESETS, "tiny_b2", dataclasses.replace(tiny_raw.PRESET, image=image))
    with pytest.raises(AvjaxError, match=message):
        models.build(tiny_raw.settings("lora", **{f"model__encoders__{k}": v for k, v in more.items()}).model, 3)


def test_patterns_that_find_nothing_are_named_at_the_start():
    model, _ = built("finetune", model__encoders__frozen=("^vidio/",))
    with pytest.raises(AvjaxError, match=r"model\.encoders\.frozen: '\^vidio/' is found in no path"):
        model.module.init(jax.random.key(0), batch_of(model))


def test_random_weights_and_the_preset_follow_the_configuration():
    config = tiny_raw.settings("lora,open_raw", "open_raw", weights__random=False)
    assert (config.model.encoders.preset, config.model.encoders.random) == ("open_raw", False)
    config = tiny_raw.settings("lora,open_raw", "etg_raw", weights__random=True)
    assert (config.model.encoders.preset, config.model.encoders.random) == ("etg_raw", True)
    assert json.loads(json.dumps(config.to_dict()))["model"]["encoders"]["preset"] == "etg_raw"
