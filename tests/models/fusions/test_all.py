"""What every fusion promises, tested on all of them alike; what is particular to one stands in its own file."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from avjax import config, models
from avjax.errors import AvjaxError
from avjax.models.fusions import registry as fusions
from avjax.models.fusions.registry import FUSIONS
from avjax.settings import FusionSettings, TrainSettings
from benchmarks.step import random_variables
from tests.models.test_de_iii import TINY

CLASSES = 3
WIDTHS = {"text": (6, 12), "audio": (15, 7), "video": (8, 9), "flow": (8, 5)}  # most steps, width
# Narrow enough to compile quickly; a fusion that is not named is tested as it comes.
SMALL = {
    "mult": {"width": 8, "heads": 2, "layers": 1},
    "auxformer": {"width": 8, "heads": 2, "layers": 1, "hidden": (8, 6), "repeats": 2},
    "mfn": {"memory": 8, "attention": 8, "proposal": 8, "retain": 8, "update": 8, "output": 8, "segment_count": 5},
    "mmtm": {"width": 8, "heads": 2},
    "msaf": {"width": 8, "heads": 2, "block": 4},
    "uavm": {"width": 16, "heads": 2, "depth": 1, "shared_depth": 1, "positions": 6},
    "vavl": {"bottleneck": 6, "width": 16, "heads": 2, "kernel": 5, "depth": 1, "shared_depth": 1},
    "ladder": {"widths": (12, 8)},
    "amh": {"widths": {"text": 6, "audio": 5, "video": 4}},
    "tmep": {"width": 16, "heads": 2, "layers": 1, "joint_layers": 1},
    "mma_dfer": {"width": 16, "heads": 2, "inner": 16, "layers": 1, "bottleneck": 8},
    "three_branch": {"width": 16, "heads": 2, "layers": 1},
    "cfn_sr": {"width": 16, "heads": 2, "blocks": 1, "layers": 1},
    "c3d_lstm": {"widths": (8, 8), "hidden": 8},
    "bc_lstm": {"hidden": 8, "width": 6},
    "m2fnet": {"width": 16, "heads": 2, "layers": 1},
    "de_iii": TINY,
    "avt_ca": {"width": 16, "heads": 2},
}
# Parameters of the default settings on streams of WIDTHS and seven classes.
PARAMETERS = {
    "concat": 206_599,
    "additive": 141_575,
    "weighted_sum": 75_530,
    "amh": 828_343,
    "lmf": 121_343,
    "tfn": 9_108_455,
    "mfn": 867_527,
    "misa": 1_347_719,
    "mfm": 470_483,
    "mag": 835,
    "mmtm": 1_270_503,
    "msaf": 1_198_283,
    "mult": 1_526_807,
    "auxformer": 1_112_464,
    "tmep": 11_068_423,
    "mma_dfer": 11_057_163,
    "three_branch": 1_593_095,
    "uavm": 113_460_263,
    "vavl": 52_881_221,
    "ladder": 693_943,
    "mmer_ia": 351_815,
    "mmer_it": 472_519,
    "mmer_lt": 579_655,
    "avtca_released": 538_567,
    "cfn_sr": 389_960,
    "c3d_lstm": 285_223,
    "bc_lstm": 3_920_028,
    "m2fnet": 4_947_207,
    "de_iii": 79_461_527,
    "avt_ca": 554_759,
}
LIGHT = ("concat", "lmf", "mag", "bc_lstm")
LARGE = 8  # clips of the larger batch
# Programs run once or twice, so that optimising them would take most of the time.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def built(name: str, dtype: str = "float32", classes: int = CLASSES, small: bool = True) -> models.base.Model:
    chosen = fusions.model_config(name)
    fusion = FUSIONS[name]
    chosen.streams = fusion.streams
    chosen.dtype = dtype
    if small:
        chosen.settings.update(SMALL.get(name, {}))
    return models.build(FusionSettings.of(chosen.to_dict()), classes)


def batch_of(name: str, clips: int = 4, seed: int = 0) -> dict[str, np.ndarray]:
    """Clips of many lengths; of conversations `clips` of three turns, the last of which the first one lacks."""
    rng = np.random.default_rng(seed)
    lead = (clips, 3) if FUSIONS[name].turns else (clips,)
    out = {"label": rng.integers(0, CLASSES, lead), "weight": np.ones(lead, np.float32)}
    for stream, (steps, width) in WIDTHS.items():
        out[stream] = rng.normal(size=(*lead, steps, width)).astype(np.float32)
        out[f"{stream}_mask"] = np.arange(steps) < rng.integers(2, steps + 1, lead)[..., None]
        out[f"{stream}_mask"][0] = True
    if FUSIONS[name].turns:
        out["turn_mask"] = np.ones(lead, bool)
        out["turn_mask"][0, 2] = False
        out["weight"][0, 2] = 0
        for stream in WIDTHS:
            out[f"{stream}_mask"][0, 2] = False
    return out


def larger(name: str, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same clips at the end of more, with more padding, which holds NaN, behind every stream and conversation."""
    others = batch_of(name, LARGE - len(batch["label"]), seed=9)
    out = {key: np.concatenate([others[key], batch[key]]) for key in batch}
    for stream in WIDTHS:
        steps = out[f"{stream}_mask"].ndim - 1
        out[stream] = _padded(out[stream], steps, np.nan)
        out[f"{stream}_mask"] = _padded(out[f"{stream}_mask"], steps, False)
    if FUSIONS[name].turns:
        out = {key: _padded(x, 1, np.nan if key in WIDTHS else 0) for key, x in out.items()}
    return out


def _padded(x: np.ndarray, axis: int, value) -> np.ndarray:
    return np.pad(x, [(0, 3 * (i == axis)) for i in range(x.ndim)], constant_values=value)


def without(batch: dict[str, np.ndarray], *streams: str) -> dict[str, np.ndarray]:
    """The streams missing from all clips but the first, replaced by NaN."""
    out = dict(batch)
    for s in streams:
        out[s], out[f"{s}_mask"] = batch[s].copy(), batch[f"{s}_mask"].copy()
        out[s][1:], out[f"{s}_mask"][1:] = np.nan, False
    return out


@functools.cache
def compiled(name: str, dtype: str = "float32"):
    """The model, variables after some steps (gates of zero block gradients), and its output function."""
    model = built(name, dtype)
    shapes = jax.eval_shape(model.module.init, jax.random.key(0), batch_of(name))
    return model, random_variables(shapes), jit(model.module.apply)


def predict(name: str, batch: dict[str, np.ndarray]) -> np.ndarray:
    _, variables, apply = compiled(name)
    return np.asarray(apply(variables, batch).logits["fusion"])


@functools.cache
def compiled_loss(name: str):
    """(params, running, batch, seed) → gradient of the summed loss in training; its terms, and `running` moved on."""
    model = compiled(name)[0]

    def total(params, running, batch, seed):
        variables, rngs = {"params": params, **running}, {"dropout": jax.random.key(seed)}
        output, running = model.module.apply(variables, batch, train=True, rngs=rngs, mutable=list(running))
        terms = model.loss(output, batch, jnp.full(CLASSES, 1 / CLASSES))
        return sum(jnp.sum(term * batch["weight"]) for term in terms.values()), (terms, running)

    return jit(jax.grad(total, has_aux=True))


def split(variables):
    """Parameters, and what else the model keeps."""
    return variables["params"], {k: v for k, v in variables.items() if k != "params"}


@pytest.fixture(
    scope="module",
    # Some compile in seconds, the others are as many minutes.
    params=[name if name in LIGHT else pytest.param(name, marks=pytest.mark.slow) for name in FUSIONS],
)
def name(request):
    """One fusion after another, so that the programs of one are gone before the next: too many fill the memory."""
    yield request.param
    for cache in (compiled, compiled_loss):
        cache.cache_clear()
    jax.clear_caches()


def test_heads_and_shapes(name):
    model, variables, apply = compiled(name)
    batch = batch_of(name)
    output = apply(variables, batch)
    assert set(output.logits) == set(model.heads)
    assert set(model.candidates) <= set(model.heads)
    for logits in output.logits.values():
        assert logits.shape == (*batch["label"].shape, CLASSES)
        assert logits.dtype == jnp.float32
    assert all(v.dtype == jnp.float32 for v in jax.tree.leaves(variables))
    assert np.ptp(predict(name, batch), 0).max() > 1e-3, "clips differ"


def test_padding_and_neighbours_change_no_answer(name):
    batch = batch_of(name)
    ours, theirs = predict(name, batch), predict(name, larger(name, batch))[-len(batch["label"]) :]
    turns = batch.get("turn_mask", np.ones(batch["label"].shape, bool))
    np.testing.assert_allclose(theirs[:, : ours.shape[1]][turns] if turns.ndim > 1 else theirs, ours[turns], atol=2e-5)


def test_missing_streams_are_answered(name):
    """Missing streams are NaN, which never reaches the output; clips that have the stream do not change."""
    batch = batch_of(name)
    full = predict(name, batch)
    for streams in [(s,) for s in FUSIONS[name].streams] + [FUSIONS[name].streams]:
        partial = predict(name, without(batch, *streams))
        assert np.isfinite(partial).all(), streams
        np.testing.assert_allclose(partial[0], full[0], atol=2e-5)
        if len(streams) < len(FUSIONS[name].streams):
            assert np.abs(partial[1:] - full[1:]).max() > 1e-5, f"{streams} is read"


def test_gradients_and_losses_are_finite_and_reach_every_parameter(name):
    batch = batch_of(name)
    # Over a few draws of the dropout: what it takes away in one of them is not unreachable.
    variables = split(compiled(name)[1])
    draws = [compiled_loss(name)(*variables, batch, seed) for seed in range(3)]
    assert all(term.shape == batch["label"].shape for term in draws[0][1][0].values())
    reach = jax.tree.map(lambda *g: max(jnp.max(jnp.abs(x)) for x in g), *(gradient for gradient, _ in draws))
    assert not [jax.tree_util.keystr(path) for path, r in jax.tree_util.tree_leaves_with_path(reach) if not r > 0]
    for streams in [(s,) for s in FUSIONS[name].streams] + [FUSIONS[name].streams]:
        result = compiled_loss(name)(*variables, without(batch, *streams), 1)
        assert all(bool(jnp.isfinite(v).all()) for v in jax.tree.leaves(result)), streams


def test_nothing_is_compiled_again_for_other_clips(name):
    _, variables, _ = compiled(name)
    model, traces = compiled(name)[0], []

    @jax.jit
    def apply(variables, batch):
        traces.append(1)
        return model.module.apply(variables, batch).logits

    jax.eval_shape(apply, variables, batch_of(name))
    for seed in (1, 2):
        jax.eval_shape(apply, variables, without(batch_of(name, seed=seed), FUSIONS[name].streams[0]))
    assert len(traces) == 1


def test_parameter_count(name):
    model = built(name, classes=7, small=False)
    shapes = jax.eval_shape(model.module.init, jax.random.key(0), batch_of(name))
    assert sum(v.size for v in jax.tree.leaves(shapes["params"])) == PARAMETERS[name]


@pytest.mark.slow
def test_bfloat16_stays_near_float32(name):
    _, _, apply = compiled(name, "bfloat16")
    batch = batch_of(name, 8)
    variables = compiled(name)[1]
    output = apply(variables, batch)
    assert all(v.dtype == jnp.float32 for v in output.logits.values())
    full = predict(name, batch)
    error = np.abs(np.asarray(output.logits["fusion"]) - full)
    assert error.max() < 0.1 * np.abs(full).max() + 0.02
    assert error.max() > 0, "products are computed in float32"


@pytest.mark.slow
def test_a_few_clips_are_learned(name):
    batch = batch_of(name, 6)
    params, running = split(jit(compiled(name)[0].module.init)(jax.random.key(0), batch))
    tx = optax.adam(1e-2)
    opt_state, update = tx.init(params), jit(tx.update)
    for seed in range(300):
        gradient, (_, running) = compiled_loss(name)(params, running, batch, seed)
        updates, opt_state = update(gradient, opt_state)
        params = optax.apply_updates(params, updates)
    result = compiled(name)[2]({"params": params, **running}, batch).logits["fusion"].argmax(-1)
    counts = batch["weight"] > 0
    assert (result == batch["label"])[counts].mean() > 0.9


# ---- The registry -------------------------------------------------------------------------------------------------


def test_settings_come_from_the_configuration():
    chosen = config.settings("configs/fusion_mafw.py:lmf", model__settings__rank=7, model__settings__widths__text=5)
    module = models.build(chosen.model, 3).module
    assert (module.rank, module.widths["text"], module.widths["audio"]) == (7, 5, 16)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mag", {"streams": ("audio", "video")}, "mag reads 1 to 3 streams [(]text among them"),
        ("auxformer", {"streams": ("text", "audio", "video")}, "auxformer reads 2 streams"),
        ("mult", {"streams": ("audio",)}, "mult reads 2 to 3 streams"),
        ("lmf", {"dtype": "float16"}, "model.dtype is 'float16'; choose one of float32, bfloat16"),
        ("lmf", {"settings": {"ranks": 3}}, "model.settings key is 'ranks'; choose one of widths.*did you mean 'rank'"),
    ],
)
def test_what_does_not_fit_is_named(name, changes, message):
    with pytest.raises(AvjaxError, match=message):
        models.build(FusionSettings(**({"name": name} | changes)), 3)


def test_every_fusion_that_can_read_the_streams_is_compared():
    names = fusions.comparable(("audio", "video"))
    assert {"concat", "mult_small", "bc_lstm"} <= set(names)
    assert len(names) == len(FUSIONS) - 1
    assert "mag" not in names
    assert "mag" in fusions.comparable(("text", "audio", "video"))


def test_a_recipe_names_keys_of_the_training():
    for fusion in FUSIONS.values():
        settings = TrainSettings(**fusion.recipe)
        assert {key: getattr(settings, key) for key in fusion.recipe} == dict(fusion.recipe)
