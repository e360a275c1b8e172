"""AVT-CA of the paper: every equation in plain loops, parameters by hand, and what every model promises."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from avjax.models import avt_ca
from avjax.models.avt_ca import VARIANTS, AvtCa
from benchmarks.step import random_variables

CLASSES, WIDTH, HEADS = 3, 8, 2
STREAMS = ("audio", "video")
RNG = np.random.default_rng(0)
_ALL = [*((name, 0) for name in VARIANTS), ("full", 32)]
# Every row, on features, and the full model on frames of this side in pixels.
ALL = pytest.mark.parametrize(("name", "side"), _ALL)
# Rows whose parts, or whose very network, are among those of the others.
_ALIKE = ("it1", "ct1", "ct4", "softhard")
FEW = pytest.mark.parametrize(
    ("name", "side"), [pytest.param(*row, marks=[pytest.mark.thorough] * (row[0] in _ALIKE)) for row in _ALL]
)
# Programs run a few times, so that optimising them would take most of the time.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def batch_of(clips: int = 4, seed: int = 0, side: int = 0) -> dict[str, np.ndarray]:
    """Clips of many lengths, one of a single audio step; with a `side`, of frames."""
    rng = np.random.default_rng(seed)
    video = rng.integers(0, 256, (clips, 5, side, side, 3)).astype(np.uint8) if side else rng.normal(size=(clips, 5, 6))
    out = {"audio": rng.normal(size=(clips, 11, 7)).astype(np.float32)}
    out |= {"video": video if side else video.astype(np.float32), "label": np.arange(clips) % CLASSES}
    for s, least in (("audio", 1), ("video", 2)):
        lengths = rng.integers(least, out[s].shape[1], clips)
        lengths[:2] = out[s].shape[1], least
        out[f"{s}_mask"] = np.arange(out[s].shape[1])[None] < lengths[:, None]
    out["audio_mask"][0, 3] = out["video_mask"][0, 1] = False
    return out


def side_of(batch: dict[str, np.ndarray]) -> int:
    return batch["video"].shape[2] if batch["video"].ndim == 5 else 0


def hidden(batch: dict[str, np.ndarray], value: float) -> dict[str, np.ndarray]:
    """The same clips with something else under their masks."""
    out = {key: x.copy() for key, x in batch.items()}
    for s in STREAMS:
        out[s][~out[f"{s}_mask"]] = value
    return out


def larger(batch: dict[str, np.ndarray], value: float) -> dict[str, np.ndarray]:
    """The same clips behind two others, with three more steps of `value` behind each stream."""
    out = {key: np.concatenate([x, batch[key]]) for key, x in batch_of(2, seed=9, side=side_of(batch)).items()}
    for s in STREAMS:
        for key, filler in ((s, out[s].dtype.type(value)), (f"{s}_mask", False)):
            out[key] = np.pad(out[key], [(0, 3 * (i == 1)) for i in range(out[key].ndim)], constant_values=filler)
    return out


def without(batch: dict[str, np.ndarray], *streams: str) -> dict[str, np.ndarray]:
    return batch | {f"{s}_mask": np.zeros_like(batch[f"{s}_mask"]) for s in streams}


def drawn(module, *args):
    """Variables that are all random."""
    return random_variables(jax.eval_shape(module.init, jax.random.key(0), *args))


# ---- The equations, in loops over float64 --------------------------------------------------------------------------


def exact(variables) -> tuple[dict, dict]:
    """Parameters and running statistics in float64."""
    tree = jax.tree.map(np.float64, dict(variables))
    return tree["params"], tree.get("batch_stats", {})


def normed(x, p, s):
    """Eqs. 1b and 4 over the last axis."""
    return p["scale"] * (x - s["mean"]) / np.sqrt(s["var"] + 1e-5) + p["bias"]


def convolved(x, p):
    """Eq. 1a on the real steps of a clip (s, d), zeros beyond its ends."""
    x = np.pad(x, ((1, 1), (0, 0)))
    return np.array([sum(x[i + j] @ p["kernel"][j] for j in range(3)) + p["bias"] for i in range(len(x) - 2)])


def audio_block(x, p, s):
    """Eqs. 1a–1d of one clip by the statistics `s`, with p = 2."""
    x = np.maximum(0, normed(convolved(x, p["conv"]), p["norm"], s["norm"]))
    return np.array([x[i : i + 2].max(0) for i in range(0, len(x), 2)])


def convolved_map(x, kernel, bias=0.0, stride=1, depthwise=False):
    """Conv2D over 3 x 3 pixels of a map (h, w, d), zeros beyond its edges."""
    padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
    out = np.zeros((-(-x.shape[0] // stride), -(-x.shape[1] // stride), kernel.shape[-1]))
    for i, j, m, n in np.ndindex(*out.shape[:2], 3, 3):
        seen = padded[stride * i + m, stride * j + n]
        out[i, j] += seen * kernel[m, n, 0] if depthwise else seen @ kernel[m, n]
    return out + bias


def refined(x, p):
    """V~ = V~_c (k) · V~_s (i, j) · V(i, j, k), and V^ = V~ + psi(o_local)."""
    narrow = np.maximum(0, x.mean((0, 1)) @ p["channel"]["kernel"] + p["channel"]["bias"])
    channel = 1 / (1 + np.exp(-(narrow @ p["channel_out"]["kernel"] + p["channel_out"]["bias"])))
    scores = np.exp(convolved_map(x, p["place"]["kernel"])[..., 0])
    steps_of = scores / scores.sum() * scores.size
    local = np.zeros_like(x)
    rows, columns = (-(-side // 2) for side in x.shape[:2])
    upper, left = slice(0, rows), slice(0, columns)
    lower, right = slice(rows, None), slice(columns, None)
    for part in ((upper, left), (upper, right), (lower, left), (lower, right)):
        local[part] = convolved_map(x[part], p["local"]["kernel"], p["local"]["bias"])
    return channel[None, None] * steps_of[..., None] * x + local


def inverted(x, p, s):
    norm = lambda x, name: normed(x, p[name], s[name])  # noqa: E731
    x = np.clip(norm(x @ p["expand"]["kernel"], "expand_norm"), 0, 6)
    x = np.clip(norm(convolved_map(x, p["depthwise"]["kernel"], stride=2, depthwise=True), "depthwise_norm"), 0, 6)
    return norm(x @ p["project"]["kernel"], "norm")


def seen(image, p, s):
    """One frame's vector."""
    x = np.maximum(0, convolved_map(image / 255, p["stem"]["kernel"], p["stem"]["bias"], stride=2))
    halves = [range(0, side, 2) for side in x.shape[:2]]
    x = np.array([[x[i : i + 2, j : j + 2].max((0, 1)) for j in halves[1]] for i in halves[0]])
    x = refined(x, p["refinement"])
    for i in range(2):
        x = inverted(x, p[f"inverted_{i}"], s[f"inverted_{i}"])
    return x.mean((0, 1))


def attended(x, source, p):
    """Eqs. 2, 3a and 3b: x (q, d) attends to source (k, d). Contexts and the mean weights of all heads (q, k)."""
    heads, size = p["query"]["kernel"].shape[1:]
    out, weights = np.zeros_like(x), np.zeros((len(x), len(source)))
    for h, i in np.ndindex(heads, len(x) if len(source) else 0):
        query = x[i] @ p["query"]["kernel"][:, h]
        scores = np.array([math.exp(query @ (y @ p["key"]["kernel"][:, h]) / math.sqrt(size)) for y in source])
        scores /= scores.sum()
        attended_values = sum(share * (y @ p["value"]["kernel"][:, h]) for share, y in zip(scores, source, strict=True))
        out[i] += attended_values @ p["out"]["kernel"][h]
        weights[i] += scores / heads
    return out, weights


def block(x, p):
    """Eqs. 2–6 of one clip (n, d)."""
    x = x + attended(x, x, p["attention"])[0]
    for i in range(len(x)):
        x[i] = normed(x[i], p["norm"], {"mean": x[i].mean(), "var": x[i].var()})
        inner = x[i] @ p["up"]["kernel"] + p["up"]["bias"]
        inner = np.array([v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in inner])
        x[i] = x[i] + inner @ p["down"]["kernel"] + p["down"]["bias"]
    return x


def predicted(variables, one, blocks="both", frames=False):
    """Algorithm 1 on the real steps of one clip: logits, and the weights of both directions."""
    p, s = exact(variables)
    audio, video = (one[stream][one[f"{stream}_mask"]].astype(np.float64) for stream in STREAMS)
    for i in range(2):
        audio = audio_block(audio, p[f"audio_{i}"], s[f"audio_{i}"]) if len(audio) else np.zeros((0, WIDTH))
    if frames:
        video = np.array([seen(image, p["video"], s["video"]) for image in video]).reshape(-1, WIDTH)
    else:
        video = video @ p["video"]["kernel"] + p["video"]["bias"]
    if blocks != "cross":
        audio, video = block(audio, p["audio_block"]), block(video, p["video_block"])
    weights = {}
    if blocks != "self":
        a, weights["audio"] = attended(audio, video, p["audio_asks"])
        v, weights["video"] = attended(video, audio, p["video_asks"])
        audio, video = a + audio, v + video
    joined = sum(x.max(0) if len(x) else np.zeros(WIDTH) for x in (audio, video))
    return joined @ p["head"]["kernel"] + p["head"]["bias"], weights


STEPS = RNG.normal(size=(3, 7, 5)).astype(np.float32)
REAL = np.arange(7)[None] < np.array([[7], [1], [4]])


def test_audio_block_by_loops():
    """Eqs. 1a–1d by running statistics; the last of seven steps, and a single one, pass without a partner."""
    module = avt_ca.PooledBlock(4)
    variables = drawn(module, STEPS, REAL)
    got, mask = jit(module.apply)(variables, np.where(REAL[..., None], STEPS, np.nan), REAL)
    np.testing.assert_array_equal(mask, np.arange(4)[None] < np.array([[4], [1], [2]]))
    for x, real, ours, n in zip(STEPS, REAL, got, (4, 1, 2), strict=True):
        np.testing.assert_allclose(ours[:n], audio_block(np.float64(x[real]), *exact(variables)), atol=1e-5)


def test_audio_block_by_the_statistics_of_real_steps():
    """Eq. 1b in training: mean and variance of the batch's real steps, towards which the running ones move."""
    module = avt_ca.PooledBlock(4)
    variables = drawn(module, STEPS, REAL)
    (got, _), moved = jit(functools.partial(module.apply, mutable=["batch_stats"]))(variables, STEPS, REAL)
    p, s = exact(variables)
    steps = np.concatenate([convolved(np.float64(x[real]), p["conv"]) for x, real in zip(STEPS, REAL, strict=True)])
    batch = {"norm": {"mean": steps.mean(0), "var": steps.var(0)}}
    for x, real, ours, n in zip(STEPS, REAL, got, (4, 1, 2), strict=True):
        np.testing.assert_allclose(ours[:n], audio_block(np.float64(x[real]), p, batch), atol=1e-5)
    want = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, s, batch)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), moved["batch_stats"], want)


@pytest.mark.parametrize("sides", [(4, 6), (5, 3)])
def test_channel_spatial_and_local_features_by_loops(sides):
    """Where a side is odd, the left or upper quarters are larger by one."""
    x = RNG.normal(size=(2, *sides, 32)).astype(np.float32)
    variables = drawn(avt_ca.Refinement(), x)
    assert variables["params"]["channel"]["kernel"].shape == (32, 2)
    got = jit(avt_ca.Refinement().apply)(variables, x)
    for one, ours in zip(x, got, strict=True):
        np.testing.assert_allclose(ours, refined(np.float64(one), exact(variables)[0]), atol=1e-4)


def test_inverted_residual_block_by_loops():
    x = RNG.normal(size=(2, 5, 4, 3)).astype(np.float32)
    module, mask = avt_ca.InvertedResidual(6), np.ones(2, bool)
    variables = drawn(module, x, mask)
    got = jit(module.apply)(variables, x, mask)
    for one, ours in zip(x, got, strict=True):
        np.testing.assert_allclose(ours, inverted(np.float64(one), *exact(variables)), atol=1e-4)


def test_a_frame_by_loops():
    """Sides whose half, or whose quarter, is odd; floats are read like bytes, and a masked frame is not read."""
    images = RNG.integers(0, 256, (3, 22, 12, 3)).astype(np.uint8)
    module, mask = avt_ca.FrameBranch(WIDTH), np.array([True, True, False])
    variables, apply = drawn(module, images, mask), jit(module.apply)
    got = apply(variables, images, mask)
    for one, ours in zip(images[:2], got[:2], strict=True):
        np.testing.assert_allclose(ours, seen(np.float64(one), *exact(variables)), atol=1e-4)
    floats = np.where(mask[:, None, None, None], np.float32(images), np.nan)
    np.testing.assert_array_equal(apply(variables, floats, mask), got)


@pytest.mark.parametrize("heads", [1, 4])
def test_attention_by_loops(heads):
    x, source = STEPS[..., :4], RNG.normal(size=(3, 5, 4)).astype(np.float32)
    mask = np.array([[True] * 5, [False] * 5, [True, False, True, True, False]])
    variables = drawn(avt_ca.Attention(heads), x, source, mask)
    assert "bias" not in str(jax.tree.structure(variables))
    got, weights = jit(avt_ca.Attention(heads).apply)(variables, x, source, mask)
    assert weights.shape == (3, heads, 7, 5)
    for i in range(3):
        want, mean_weights = attended(np.float64(x[i]), np.float64(source[i][mask[i]]), exact(variables)[0])
        np.testing.assert_allclose(got[i], want, atol=1e-5)
        np.testing.assert_allclose(weights[i].mean(0)[:, mask[i]], mean_weights, atol=1e-5)
        assert not weights[i][..., ~mask[i]].any()
    assert not got[1].any(), "no real key"


def test_transformer_block_by_loops():
    """Eqs. 2–6."""
    x, module = STEPS[..., :4], avt_ca.TransformerBlock(2, 0.1)
    variables = drawn(module, x, REAL)
    got = jit(module.apply)(variables, x, REAL)
    for one, real, ours in zip(x, REAL, got, strict=True):
        np.testing.assert_allclose(ours[real], block(np.float64(one[real]), exact(variables)[0]), atol=1e-5)


@pytest.mark.slow
def test_dropout_is_between_the_layers_of_the_feed_forward_network():
    """Eq. 5b: with an identity output map, a value is gone or divided by 1 − p; nothing else is."""
    x = STEPS[..., :4]
    variables = drawn(avt_ca.TransformerBlock(2, 0.1), x, REAL)

    def run(rate: float, passes: float) -> np.ndarray:
        variables["params"]["down"]["kernel"] = passes * np.eye(16, 4, dtype=np.float32)
        train = functools.partial(avt_ca.TransformerBlock(2, rate).apply, train=True)
        return np.asarray(jit(train)(variables, x, REAL, rngs={"dropout": jax.random.key(0)}))

    kept, dropped = (run(rate, 1.0) - run(rate, 0.0) for rate in (0.0, 0.4))
    gone = np.abs(dropped) < 1e-6
    np.testing.assert_allclose(dropped[~gone], kept[~gone] / 0.6, atol=1e-5)
    assert 0.25 < gone.mean() < 0.55


# ---- The whole -----------------------------------------------------------------------------------------------------


def built(name: str, dtype=jnp.float32, **kwargs) -> AvtCa:
    return AvtCa(CLASSES, **{"width": WIDTH, "heads": HEADS, "dtype": dtype} | VARIANTS[name] | kwargs)


@functools.cache
def compiled(name: str, side: int = 0):
    module = built(name, frames=bool(side))
    return drawn(module, batch_of(side=side)), jit(module.apply)


def predict(name: str, batch: dict[str, np.ndarray]) -> np.ndarray:
    variables, apply = compiled(name, side_of(batch))
    return np.asarray(apply(variables, batch).logits["fusion"])


@functools.cache
def compiled_gradient(name: str, side: int, dtype=jnp.bfloat16, moves: bool = False):
    """(params, running, batch, seed) → gradient of the summed loss in training; the statistics, if they move."""
    module = built(name, dtype, frames=bool(side))

    def total(params, running, batch, seed):
        rngs, mutable = {"dropout": jax.random.key(seed)}, list(running) if moves else []
        output, moved = module.apply({"params": params, **running}, batch, train=True, rngs=rngs, mutable=mutable)
        picked = jnp.take_along_axis(jax.nn.log_softmax(output.logits["fusion"]), batch["label"][:, None], 1)
        return -jnp.sum(picked), moved

    return jit(jax.grad(total, has_aux=True))


def gradient(name: str, batch: dict[str, np.ndarray], seed: int = 0, **kwargs):
    variables = dict(compiled(name, side_of(batch))[0])
    return compiled_gradient(name, side_of(batch), **kwargs)(variables.pop("params"), variables, batch, seed)


def finite(tree) -> bool:
    return all(np.isfinite(v).all() for v in jax.tree.leaves(tree))


def same(got, want) -> None:
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.slow
@pytest.mark.parametrize("missing", [(), ("audio",), ("video",)])
@ALL
def test_a_clip_by_loops(name, side, missing):
    """Algorithm 1: the row's blocks on the real steps alone, or what is left of them without a modality."""
    variables, apply = compiled(name, side)
    batch = without(batch_of(side=side), *missing)
    output = apply(variables, batch)
    for i in range(2 if side else 4):
        one = {k: x[i] for k, x in batch.items()}
        logits, weights = predicted(variables, one, VARIANTS[name].get("blocks", "both"), bool(side))
        np.testing.assert_allclose(output.logits["fusion"][i], logits, atol=1e-3 if side else 1e-4)
        assert output.attention.keys() == weights.keys()
        steps_of = {"audio": np.arange(-(-one["audio_mask"].sum() // 4)), "video": np.flatnonzero(one["video_mask"])}
        for queries, keys in (STREAMS, STREAMS[::-1]) if weights else ():
            want = np.zeros(output.attention[queries].shape[1:])
            want[np.ix_(steps_of[queries], steps_of[keys])] = weights[queries]
            np.testing.assert_allclose(output.attention[queries][i], want, atol=1e-4)


@FEW
def test_without_either_modality_the_head_answers_by_its_bias(name, side):
    logits = predict(name, without(batch_of(side=side), *STREAMS))
    np.testing.assert_array_equal(logits, np.tile(compiled(name, side)[0]["params"]["head"]["bias"], (4, 1)))


def test_parameter_count_on_pictures():
    """10 MFCC, 8 classes, d = 128, h = 4.

    Audio: conv 3·10·64 + 64 = 1,984 and norm 128; conv 3·64·128 + 128 = 24,704 and norm 256: 27,072.
    Stem: 3·3·3·64 + 64 = 1,792. Channel attention 64→4→64: 260 + 320 = 580. Spatial attention: 3·3·64 = 576.
    Local: 3·3·64·64 + 64 = 36,928. With the two blocks that follow, frames have 230,596.
    Inverted residual 64→256→128: 64·256 + 9·256 + 256·128 = 51,456, norms 2·(256 + 256 + 128) = 1,280: 52,736.
    Inverted residual 128→512→128: 128·512 + 9·512 + 512·128 = 135,680, norms 2·(512 + 512 + 128) = 2,304: 137,984.
    Transformer block: 4·128² = 65,536, norm 256, 128·512 + 512 + 512·128 + 128 = 131,712: 197,504; two: 395,008.
    Cross-attention: 2·4·128² = 131,072. Head: 128·8 + 8 = 1,032. In all 784,780.
    Running statistics: two for each channel of a norm, 2·(64 + 128 + 640 + 1,152).
    """
    for side in (112, 224):
        numbers = counted(AvtCa(8, frames=True), (1, 2, side, side, 3), np.uint8)
        assert numbers == {"params": 784_780, "batch_stats": 3_968}


def test_parameter_count_on_features():
    """As on frames, but with a linear layer instead from 35 features: 35·128 + 128 = 4,608."""
    assert counted(AvtCa(8), (1, 2, 35), np.float32) == {"params": 784_780 - 230_596 + 4_608, "batch_stats": 384}
    for blocks, less in (("self", 131_072), ("cross", 395_008)):
        assert counted(AvtCa(8, blocks=blocks), (1, 2, 35), np.float32)["params"] == 558_792 - less


def counted(module: AvtCa, shape: tuple[int, ...], dtype) -> dict[str, int]:
    batch = {"audio": jnp.zeros((1, 156, 10)), "video": jnp.zeros(shape, dtype)}
    batch |= {f"{s}_mask": jnp.ones(x.shape[:2], bool) for s, x in batch.items()}
    shapes = jax.eval_shape(module.init, jax.random.key(0), batch)
    return {k: sum(v.size for v in jax.tree.leaves(tree)) for k, tree in shapes.items()}


# ---- Promises ------------------------------------------------------------------------------------------------------


@FEW
def test_padding_and_neighbours_change_no_answer(name, side):
    batch, rubbish = batch_of(side=side), 255 if side else np.nan
    want = predict(name, batch)
    assert want.dtype == np.float32
    assert np.ptp(want, 0).max() > 1e-3, "clips differ"
    np.testing.assert_array_equal(predict(name, hidden(batch, rubbish)), want)
    np.testing.assert_allclose(predict(name, larger(batch, rubbish))[2:], want, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "side"),
    [("it4", 0), ("ct4", 0), ("full", 0), ("softhard", 0), ("full", 32)]
    + [pytest.param(row, 0, marks=pytest.mark.slow) for row in ("it1", "ct1")],
)
def test_gradients_are_finite_and_reach_every_parameter(name, side):
    """In bfloat16, with rubbish under the masks, over two draws of the dropouts; by running statistics."""
    batch = batch_of(side=side)
    draws = [gradient(name, hidden(batch, 255 if side else np.nan), seed) for seed in range(2)]
    assert finite(draws)
    same(gradient(name, batch, 0), draws[0])
    reach = jax.tree.map(lambda *g: max(np.abs(x).max() for x in g), *(params for params, _ in draws))
    assert not [jax.tree_util.keystr(path) for path, r in jax.tree_util.tree_leaves_with_path(reach) if r == 0]
    for missing in (("audio",), ("video",), STREAMS):
        assert finite(gradient(name, without(batch, *missing)))


@pytest.mark.slow
def test_masked_frames_change_neither_gradients_nor_statistics():
    """In bfloat16, and by the batch's statistics, towards which the running ones move."""
    batch = batch_of(side=32)
    running = {"batch_stats": compiled("full", 32)[0]["batch_stats"]}
    got = gradient("full", hidden(batch, 255), moves=True)
    same(gradient("full", hidden(batch, 3), moves=True), got)
    assert not any(jax.tree.leaves(jax.tree.map(np.array_equal, got[1], running)))
    assert finite((got, gradient("full", without(batch, *STREAMS), moves=True)))


@pytest.mark.budget(10)
def test_dropout_acts_in_training_and_only_in_self_blocks():
    for name, acts in (("full", True), ("ct4", False)):
        one, other = (gradient(name, batch_of(), seed)[0]["head"]["kernel"] for seed in (1, 2))
        assert (np.abs(one - other).max() > 1e-4) == acts, name


@pytest.mark.slow
def test_softhard_draws_four_kinds_of_clips_in_training_only():
    count = 400
    one = {k: np.repeat(v[:1], count, 0) for k, v in batch_of().items()}
    variables, apply = compiled("softhard")
    train = functools.partial(built("softhard", dropout=0.0).apply, train=True)
    logits = np.asarray(jit(train)(variables, one, rngs={"dropout": jax.random.key(0)}).logits["fusion"])
    like = lambda kind: int((np.abs(logits - apply(variables, kind).logits["fusion"]).max(-1) < 1e-5).sum())  # noqa: E731
    counts = [like(kind) for kind in (one, without(one, "audio"), without(one, "video"))]
    counts.append(count - sum(counts))
    assert all(70 < n < 130 for n in counts), counts


@ALL
def test_nothing_is_compiled_again_for_other_clips(name, side):
    traces = []

    @jax.jit
    def apply(variables, batch):
        traces.append(1)
        return built(name, frames=bool(side)).apply(variables, batch).logits

    for batch in (batch_of(side=side), without(batch_of(seed=2, side=side), "audio")):
        jax.eval_shape(apply, compiled(name, side)[0], batch)
    assert len(traces) == 1


@pytest.mark.slow
@ALL
def test_a_few_clips_are_learned(name, side):
    batch = batch_of(6, side=side)
    variables = jit(built(name, frames=bool(side)).init)(jax.random.key(0), batch)
    params, running = variables["params"], {"batch_stats": variables["batch_stats"]}
    tx = optax.adam(1e-2)
    opt_state, update = tx.init(params), jit(tx.update)
    for seed in range(200):
        grads, running = compiled_gradient(name, side, jnp.float32, True)(params, running, batch, seed)
        updates, opt_state = update(grads, opt_state)
        params = optax.apply_updates(params, updates)
    logits = compiled(name, side)[1]({"params": params, **running}, batch).logits["fusion"]
    assert (np.argmax(logits, -1) == batch["label"]).mean() > 0.8
