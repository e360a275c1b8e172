"""EmoAsst: its equations restated in NumPy, its sizes, what each row of its tables trains, and labels out of reach."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from avjax.layers import PostNormBlock
from avjax.models import emoasst
from avjax.models.emoasst import EmoAsst
from benchmarks.step import random_variables

TAU = 0.07
JOINT = 8  # width of the texts
SHAPES = {"text": (4, JOINT), "audio": (6, 5), "video": (7, 9)}  # most steps, width
TINY = {"width": 12, "heads": 2, "inner": 16, "queries": 2, "dropout": 0.0}
# Clips of `batch`, by what they lack: GAPS some steps, the others whole streams.
WHOLE, GAPS, BLIND, SILENT, MUTE, EMPTY = range(6)
LACKING = {"text": [MUTE, EMPTY], "audio": [SILENT, EMPTY], "video": [BLIND, EMPTY]}
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def batch(seed: int = 0) -> dict[str, np.ndarray]:
    """Six clips of two classes; NaN where nothing is real."""
    rng = np.random.default_rng(seed)
    out = {"label": np.array([0, 1, 1, 0, 1, 0]), "weight": np.ones(6, np.float32)}
    out |= {"prompts": rng.normal(size=(6, 6, JOINT)), "classes": rng.normal(size=(3, JOINT))}
    for s, (steps, width) in SHAPES.items():
        mask = np.ones((6, steps), bool)
        mask[GAPS], mask[LACKING[s]] = rng.permutation(np.arange(steps) > 1), False
        out[f"{s}_mask"] = mask
        out[s] = np.where(mask[..., None], rng.normal(size=(6, steps, width)), np.nan)
    return {k: v.astype(np.float32) if v.dtype == np.float64 else v for k, v in out.items()}


@functools.cache
def variables(**changes):
    shapes = jax.eval_shape(EmoAsst(**TINY | changes).init, jax.random.key(0), batch())
    return random_variables(shapes)


@functools.cache
def compiled(train: bool = False, leaked: bool = False, **changes):
    """(params, batch, seed) → output; `leaked`: asked with the label after training."""
    module = EmoAsst(**TINY | changes)
    return jit(lambda v, b, s: module.apply(v, b, train=train, with_label=leaked, rngs={"dropout": jax.random.key(s)}))


def predicted(one, seed: int = 0, train: bool = False, leaked: bool = False, **changes):
    output = compiled(train, leaked, **changes)(variables(**changes), one, seed)
    return jax.tree.map(np.asarray, output)


# ---- The equations, in float64 -------------------------------------------------------------------------------------


def weights_of(**changes):
    return jax.tree.map(np.float64, variables(**changes))["params"]


def unit(x: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(x, axis=-1, keepdims=True)
    return np.divide(x, length, out=np.zeros_like(x), where=length > 0)


def linear(p, x: np.ndarray) -> np.ndarray:
    return x @ p["kernel"] + p["bias"]


def normed(p, x: np.ndarray) -> np.ndarray:
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def attention(p, x: np.ndarray, source: np.ndarray) -> np.ndarray:
    """Of the steps x (q, d) to all steps of source (k, d), head after head."""
    out = np.array(p["out"]["bias"])
    for head in range(p["query"]["kernel"].shape[1]):
        q, k, v = (
            y @ p[n]["kernel"][:, head] + p[n]["bias"][head]
            for n, y in (("query", x), ("key", source), ("value", source))
        )
        scores = np.exp(q @ k.T / np.sqrt(q.shape[-1]))
        out = out + scores / scores.sum(-1, keepdims=True) @ v @ p["out"]["kernel"][head]
    return out


def block(p, x: np.ndarray, source: np.ndarray | None = None) -> np.ndarray:
    x = normed(p["attention_norm"], x + attention(p["attention"], x, x))
    if source is not None:
        x = normed(p["source_norm"], x + attention(p["source_attention"], x, source))
    return normed(p["norm"], x + linear(p["down"], np.maximum(linear(p["up"], x), 0)))


def seen(p, text: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """Section 3.2.1 of one clip: its real frames (t, w) asked by its text (e,)."""
    query = p["query"] + linear(p["project_text"], text)[None]
    frames = [block(p["vfm"]["frame"], frame[None])[0] for frame in linear(p["project_video"], frames)]
    for i in range(2):
        query = block(p["vfm"][f"decoder_{i}"], query, np.array(frames))
    return unit(linear(p["express_video"], query.mean(0)))


def audio_feature(p, audio: np.ndarray) -> np.ndarray:
    """Section 3.3.1 of one clip: its real steps (s, w)."""
    x = linear(p["project_audio"], audio)
    for i in range(3):
        x = block(p["aa"][f"block_{i}"], x)
    return unit(linear(p["express_audio"], x.mean(0)))


def text_of(one, clip: int) -> np.ndarray:
    real = np.float64(one["text"][clip][one["text_mask"][clip]])
    return unit(real.mean(0)) if len(real) else np.zeros(JOINT)


def expected(one, queries: np.ndarray) -> dict[str, np.ndarray]:
    """The features of all clips; `queries (b, e)` attend to the frames."""
    p, zeros = weights_of(), np.zeros(JOINT)
    real = {s: [np.float64(x[m]) for x, m in zip(one[s], one[f"{s}_mask"], strict=True)] for s in SHAPES}
    return {
        "video": np.array([seen(p, q, x) if len(x) else zeros for q, x in zip(queries, real["video"], strict=True)]),
        "audio": np.array([audio_feature(p, x) if len(x) else zeros for x in real["audio"]]),
    }


def test_features_and_zero_shot_answers_are_those_of_the_equations():
    one = batch()
    output, texts = predicted(one), np.array([text_of(one, i) for i in range(6)])
    features, classes = expected(one, texts), unit(np.float64(one["classes"]))
    np.testing.assert_allclose(output.features["text"], texts, atol=1e-6)
    scores = {m: x @ classes.T / TAU for m, x in features.items()}
    present = sum(x.any(-1)[:, None] for x in features.values())
    scores["both"] = (scores["video"] + scores["audio"]) / np.maximum(present, 1)  # Eq. 2, halved where both are there
    assert present[:, 0].tolist() == [2, 2, 1, 1, 2, 0]
    for m, x in features.items():
        np.testing.assert_allclose(output.features[m], x, atol=2e-6)
    assert set(output.logits) == {"both_zero", "video_zero", "audio_zero"}
    for m, x in scores.items():
        np.testing.assert_allclose(output.logits[f"{m}_zero"], x, atol=1e-4)


@pytest.mark.parametrize("label_in_query", [True, False])
def test_in_training_the_drawn_prompt_is_contrasted_and_asks(label_in_query):
    one = batch()
    output, prompts = predicted(one, train=True, label_in_query=label_in_query), unit(np.float64(one["prompts"]))
    apart = np.abs(output.features["text"][:, None] - prompts).max(-1)
    assert (apart.min(1) < 1e-6).all()
    drawn = np.take_along_axis(prompts, apart.argmin(1)[:, None, None], 1)[:, 0]
    queries = drawn if label_in_query else np.array([text_of(one, i) for i in range(6)])
    for m, x in expected(one, queries).items():
        np.testing.assert_allclose(output.features[m], x, atol=2e-6)


def test_told_afterwards_it_is_asked_with_the_first_prompt():
    one = batch()
    output = predicted(one, leaked=True)
    np.testing.assert_allclose(
        output.features["video"], expected(one, unit(np.float64(one["prompts"][:, 0])))["video"], atol=2e-6
    )
    np.testing.assert_array_equal(output.features["text"], predicted(one).features["text"])


def test_without_prompts_it_trains_by_the_text_of_the_clip():
    one = batch() | {"prompts": np.full((6, 6, JOINT), np.nan, np.float32)}
    trained, plain = predicted(one, train=True, prompt=False), predicted(one, prompt=False)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), trained, plain)


def test_what_has_the_width_needs_no_projection():
    small = {"width": JOINT, "queries": 1}
    assert set(weights_of(**small)) == {"query", "vfm", "aa", "project_audio", "project_video"}
    one = batch()
    output = predicted(one, **small)
    p, clip = weights_of(**small), WHOLE
    frames = [block(p["vfm"]["frame"], x[None])[0] for x in linear(p["project_video"], np.float64(one["video"][clip]))]
    query = p["query"] + text_of(one, clip)[None]
    for i in range(2):
        query = block(p["vfm"][f"decoder_{i}"], query, np.array(frames))
    np.testing.assert_allclose(output.features["video"][clip], unit(query[0]), atol=2e-6)


# ---- Sizes, and another library ------------------------------------------------------------------------------------


def test_sizes_are_those_of_the_paper():
    shapes = {"text": (1, 1, 512), "audio": (1, 9, 768), "video": (1, 24, 512)}
    one = {s: jnp.zeros(shape) for s, shape in shapes.items()}
    one |= {f"{s}_mask": jnp.ones(shape[:2], bool) for s, shape in shapes.items()}
    one |= {"classes": jnp.ones((7, 512)), "weight": jnp.ones(1)}
    params = jax.eval_shape(EmoAsst().init, jax.random.key(0), one)["params"]
    sizes = {name: sum(v.size for v in jax.tree.leaves(part)) for name, part in params.items()}
    projection = 768 * 512 + 512
    assert sizes == {"query": 512, "vfm": 11_560_448, "aa": 9_457_152, "project_audio": projection}
    assert all(v.dtype == jnp.float32 for v in jax.tree.leaves(params))


def _in_torch(layer, names: dict[str, str], norms: dict[str, str], p) -> None:
    """Gives a layer of PyTorch our parameters; names of attention and norms: theirs → ours."""
    import torch

    d = p["up"]["kernel"].shape[0]
    state = {}
    for theirs, ours in (("linear1", "up"), ("linear2", "down")):
        state |= {f"{theirs}.weight": p[ours]["kernel"].T, f"{theirs}.bias": p[ours]["bias"]}
    for theirs, ours in norms.items():
        state |= {f"{theirs}.weight": p[ours]["scale"], f"{theirs}.bias": p[ours]["bias"]}
    for theirs, ours in names.items():
        three = [p[ours][n] for n in ("query", "key", "value")]
        state[f"{theirs}.in_proj_weight"] = np.concatenate([n["kernel"].reshape(d, d).T for n in three])
        state[f"{theirs}.in_proj_bias"] = np.concatenate([n["bias"].reshape(d) for n in three])
        state[f"{theirs}.out_proj.weight"] = p[ours]["out"]["kernel"].reshape(d, d).T
        state[f"{theirs}.out_proj.bias"] = p[ours]["out"]["bias"]
    layer.load_state_dict({k: torch.tensor(np.array(v)) for k, v in state.items()})  # names what is missing
    layer.eval()


@pytest.mark.parametrize("decodes", [False, True])
def test_layers_are_those_of_pytorch(decodes):
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    rng = np.random.default_rng(0)
    x, source = (rng.normal(size=(3, n, 16)).astype(np.float32) for n in (5, 7))
    mask, source_mask = np.arange(5)[None] < [[5], [2], [4]], np.arange(7)[None] < [[1], [7], [3]]
    more = (source, source_mask) if decodes else ()
    ours = PostNormBlock(4, 24, jax.nn.relu, 1e-5, dropout=0.1)
    params = random_variables(jax.eval_shape(ours.init, jax.random.key(0), x, mask, *more))
    made = {"d_model": 16, "nhead": 4, "dim_feedforward": 24, "batch_first": True}
    names, norms = {"self_attn": "attention"}, {"norm1": "attention_norm"}
    hidden = {"src_key_padding_mask": torch.tensor(~mask)}
    arguments = [torch.tensor(x)]
    if decodes:
        layer, arguments = torch.nn.TransformerDecoderLayer(**made), [*arguments, torch.tensor(source)]
        hidden = {"tgt_key_padding_mask": torch.tensor(~mask), "memory_key_padding_mask": torch.tensor(~source_mask)}
        names, norms = names | {"multihead_attn": "source_attention"}, norms | {"norm2": "source_norm", "norm3": "norm"}
    else:
        layer, norms = torch.nn.TransformerEncoderLayer(**made), norms | {"norm2": "norm"}
    _in_torch(layer, names, norms, params["params"])
    with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        want = layer(*arguments, **hidden).numpy()
    got = np.asarray(jit(ours.apply)(params, x, mask, *more))
    np.testing.assert_allclose(got[mask], want[mask], rtol=0, atol=1e-4 * want.std())


def test_dropout_is_drawn_on_every_branch_in_training_alone():
    x, source, mask = np.ones((2, 3, 8), np.float32), np.ones((2, 4, 8), np.float32), np.ones((2, 3), bool)
    arguments = (x, mask, source, np.ones((2, 4), bool))
    ours = PostNormBlock(2, 8, jax.nn.relu, 1e-5, dropout=0.5)
    params = random_variables(jax.eval_shape(ours.init, jax.random.key(0), *arguments))
    keys = {n: jax.random.key(n) for n in (1, 2)}
    first, second = (ours.apply(params, *arguments, train=True, rngs={"dropout": k}) for k in keys.values())
    assert np.abs(first - second).max() > 0.1
    assert "threefry" not in str(jax.make_jaxpr(lambda: ours.apply(params, *arguments))())
    plain = PostNormBlock(2, 8, jax.nn.relu, 1e-5).apply(params, *arguments)
    np.testing.assert_array_equal(ours.apply(params, *arguments), plain)
    assert np.abs(first - plain).max() > 0.1


# ---- What is drawn -------------------------------------------------------------------------------------------------


def drawn_prompts(one, seed: int) -> np.ndarray:
    """Which prompts were drawn, where `one` has the unit vectors of its six for prompts."""
    return predicted(one, seed, train=True).features["text"].argmax(-1)


def test_each_clip_draws_one_of_six_at_each_step_whatever_it_holds():
    marked = np.broadcast_to(np.eye(6, JOINT, dtype=np.float32), (6, 6, JOINT))
    drawn = np.array([drawn_prompts(batch() | {"prompts": marked}, seed) for seed in range(100)])  # steps, clips
    assert all(set(clip) == set(range(6)) for clip in drawn.T)
    # 600 draws of a fair die: 100 ± 5 times the standard deviation of each face.
    assert np.abs(np.bincount(drawn.ravel()) - 100).max() < 5 * np.sqrt(600 * 5 / 36)
    assert all(np.mean(drawn[:, 0] == drawn[:, i]) < 0.5 for i in range(1, 6))
    other = batch(5) | {"prompts": marked, "weight": np.array([1, 0, 1, 0, 1, 1], np.float32)}
    np.testing.assert_array_equal([drawn_prompts(other, seed) for seed in range(20)], drawn[:20])


# ---- Masks ---------------------------------------------------------------------------------------------------------


def larger(one):
    """The same clips behind two others, one step later and with two more steps of NaN."""
    others = {k: x[:2] for k, x in batch(9).items()}
    out = {k: x if k == "classes" else np.concatenate([others[k], x]) for k, x in one.items()}
    for s in SHAPES:
        out[s] = np.pad(out[s], ((0, 0), (1, 2), (0, 0)), constant_values=np.nan)
        out[f"{s}_mask"] = np.pad(out[f"{s}_mask"], ((0, 0), (1, 2)))
    return out


def test_padding_and_neighbours_change_nothing():
    one, many = predicted(batch()), predicted(larger(batch()))
    for name in one.features:
        np.testing.assert_allclose(many.features[name][2:], one.features[name], atol=2e-6)
    for name in one.logits:
        np.testing.assert_allclose(many.logits[name][2:], one.logits[name], atol=1e-4)


def test_what_is_missing_is_zeros_and_the_rest_goes_on():
    output = predicted(batch())
    for s in ("audio", "video", "text"):
        length = np.linalg.norm(output.features[s], axis=-1)
        np.testing.assert_allclose(length, [float(i not in LACKING[s]) for i in range(6)], atol=1e-5)
    assert not output.logits["both_zero"][EMPTY].any()
    np.testing.assert_allclose(output.logits["both_zero"][BLIND], output.logits["audio_zero"][BLIND], atol=1e-5)
    np.testing.assert_allclose(output.logits["both_zero"][SILENT], output.logits["video_zero"][SILENT], atol=1e-5)


@pytest.mark.parametrize("stream", ["video", "audio"])
def test_one_modality_alone(stream):
    streams = ("text", stream)
    output = predicted(batch(), streams=streams)
    assert list(output.logits) == [f"{stream}_zero"]
    assert set(output.features) == {"text", stream}
    inside = {"video": {"query", "vfm", "project_text"}, "audio": {"aa"}}[stream]
    assert set(weights_of(streams=streams)) == inside | {f"project_{stream}", f"express_{stream}"}


def test_without_text_the_embedding_asks_alone():
    one = {k: v for k, v in batch().items() if not k.startswith("text")}
    output = predicted(one, streams=("audio", "video"))
    assert not output.features["text"].any()
    np.testing.assert_allclose(output.features["video"], expected(batch(), np.zeros((6, JOINT)))["video"], atol=2e-6)


# ---- Labels are out of reach ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, 3.0])
def test_the_label_never_reaches_a_query_outside_of_training(value):
    one = batch()
    other = one | {"prompts": np.full_like(one["prompts"], value), "label": one["label"] * 0 + 2}
    jax.tree.map(np.testing.assert_array_equal, predicted(one), predicted(other))
    without = {k: v for k, v in one.items() if k not in ("prompts", "label")}
    jax.tree.map(np.testing.assert_array_equal, predicted(one), predicted(without))


# ---- Losses --------------------------------------------------------------------------------------------------------


def clip_loss(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Radford et al. 2021, Fig. 3, by clip: the mean of both directions."""
    scores = np.exp(x @ y.T / TAU)
    return -(np.log(np.diag(scores) / scores.sum(1)) + np.log(np.diag(scores) / scores.sum(0))) / 2


def supcon(x: np.ndarray, y: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Eq. 1, by clip: the mean over its two anchors."""
    z, labels, out = np.concatenate([x, y]), np.concatenate([label, label]), []
    for i in range(len(z)):
        others = np.arange(len(z)) != i
        log_p = z @ z[i] / TAU - np.log(np.exp(z[others] @ z[i] / TAU).sum())
        out.append(-log_p[others & (labels == labels[i])].mean())
    return np.mean(np.reshape(out, (2, -1)), 0)


@pytest.mark.parametrize("visual", ["clip", "supcon"])
@pytest.mark.parametrize("train", [True, False])
def test_each_branch_is_contrasted_with_the_text_where_both_are_there(visual, train):
    one = batch() | {"weight": np.array([1, 1, 1, 1, 1, 1], np.float32)}
    output = predicted(one, train=train)
    terms = emoasst.contrast(visual)(output, one, jnp.ones(3) / 3)
    assert list(terms) == ["video", "audio"]
    features = jax.tree.map(np.float64, output.features)
    for m, loss in terms.items():
        # A prompt is there of each clip, a text is not.
        counts = [i for i in range(6) if i not in LACKING[m] and (train or i not in LACKING["text"])]
        pairs = features[m][counts], features["text"][counts]
        plain = m == "video" and visual == "clip"
        want = np.zeros(6)
        want[counts] = clip_loss(*pairs) if plain else supcon(*pairs, one["label"][counts])
        np.testing.assert_allclose(loss, want, atol=2e-5)


def test_padding_rows_cost_nothing_and_are_in_nobodys_set():
    one = batch()
    output = emoasst_output(one)
    short = emoasst.contrast("clip")(output, one | {"weight": np.array([1, 1, 1, 1, 0, 1], np.float32)}, None)
    spoiled = output.replace(features={k: v.at[4].set(jnp.nan) for k, v in output.features.items()})
    again = emoasst.contrast("clip")(spoiled, one | {"weight": np.array([1, 1, 1, 1, 0, 1], np.float32)}, None)
    jax.tree.map(np.testing.assert_array_equal, short, again)
    assert all(loss[4] == 0 for loss in short.values())
    full = emoasst.contrast("clip")(output, one, None)
    assert all(np.abs(full[m] - short[m])[0] > 1e-4 for m in full)


def emoasst_output(one):
    return compiled(True)(variables(), one, 0)


# ---- Gradients -----------------------------------------------------------------------------------------------------


@functools.cache
def slope(queries: int = 1, dtype: str = "float32"):
    """(params, batch) → gradient of the summed losses with respect to the parameters."""
    module = EmoAsst(**TINY | {"queries": queries, "dropout": 0.1}, dtype=jnp.dtype(dtype))

    def total(params, one):
        output = module.apply({"params": params}, one, train=True, rngs={"dropout": jax.random.key(0)})
        return sum(jnp.sum(v) for v in emoasst.contrast("clip")(output, one, None).values())

    return jit(jax.grad(total))


def gradients(queries: int = 1, dtype: str = "float32", clips: tuple[int, ...] = tuple(range(6))):
    """`slope` by path, for some of the clips of `batch`."""
    one = {k: v if k == "classes" else v[list(clips)] for k, v in batch().items()}
    return paths(slope(queries, dtype)(variables(queries=queries)["params"], one))


def paths(tree) -> dict[str, np.ndarray]:
    return {"/".join(k.key for k in path): np.asarray(v) for path, v in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.slow
@pytest.mark.parametrize("queries", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_gradients_reach_everything_but_what_one_token_leaves_without(queries):
    alone = ["vfm/frame"] + ["vfm/decoder_0", "vfm/decoder_1"] * (queries == 1)
    silent = [f"{layer}/attention/{n}" for layer in alone for n in ("query", "key")]
    for path, slope in gradients(queries).items():
        assert np.isfinite(slope).all(), path
        if path.startswith(tuple(silent)):
            assert np.abs(slope).max() < 1e-6, path
        elif not path.endswith("key/bias"):  # softmax knows no shift
            assert np.abs(slope).max() > 1e-6, path


@pytest.mark.thorough
@pytest.mark.parametrize("clips", [3 * (BLIND, BLIND), 3 * (SILENT, SILENT), 3 * (EMPTY, EMPTY), 3 * (MUTE, WHOLE)])
def test_gradients_are_finite_where_modalities_are_missing(clips):
    by_path = gradients(clips=clips)
    assert all(np.isfinite(slope).all() for slope in by_path.values())
    moved = {path.split("/")[0] for path, slope in by_path.items() if slope.any()}
    assert ("vfm" in moved) == (clips[1] in (SILENT, WHOLE))
    assert ("aa" in moved) == (clips[1] in (BLIND, WHOLE))


@pytest.mark.thorough
def test_a_gradient_is_the_slope():
    """Of two losses that are a small step apart, for each kind of parameter."""
    one, params = batch(), variables(queries=1)["params"]
    module = EmoAsst(**TINY | {"queries": 1, "dropout": 0.1})

    @jit
    def total(params):
        output = module.apply({"params": params}, one, train=True, rngs={"dropout": jax.random.key(0)})
        return sum(jnp.sum(v) for v in emoasst.contrast("clip")(output, one, None).values())

    slopes, rng = gradients(), np.random.default_rng(0)
    for path in (
        "query",
        "vfm/frame/up/kernel",
        "vfm/decoder_1/source_attention/value/kernel",
        "aa/block_1/norm/scale",
    ):
        way = rng.normal(size=slopes[path].shape).astype(np.float32)
        ahead, behind = (float(total(moved(params, path, s * way))) for s in (1e-3, -1e-3))
        assert (ahead - behind) / 2e-3 == pytest.approx(float(np.sum(slopes[path] * way)), rel=0.02, abs=0.02), path


def moved(params, path: str, way: np.ndarray):
    return unflatten_dict({k: v + way if k == path else v for k, v in flatten_dict(params, sep="/").items()}, sep="/")


def test_half_precision_is_close():
    exact = predicted(batch())
    close = predicted(batch(), dtype=jnp.dtype("bfloat16"))
    for name, x in exact.features.items():
        assert close.features[name].dtype == np.float32
        np.testing.assert_allclose(close.features[name], x, atol=0.05)


@pytest.mark.slow
def test_gradients_of_half_precision_are_float32_and_finite():
    assert all(v.dtype == np.float32 and np.isfinite(v).all() for v in gradients(dtype="bfloat16").values())
