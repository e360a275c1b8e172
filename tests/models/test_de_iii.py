"""DE-III: every equation against plain loops, parameters counted by hand, and what each row of its tables promises."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from avjax import models
from avjax.errors import AvjaxError
from avjax.layers import ConformerBlock
from avjax.models import de_iii
from avjax.models.de_iii import HEADS, VARIANTS, DeIII, Ife, Pae
from avjax.settings import FusionSettings
from benchmarks.step import random_variables

FUSION = de_iii.FUSIONS["de_iii"]
CLASSES = 3
SHAPES = {"audio": (7, 7), "video": (5, 9), "flow": (5, 4)}  # most steps, width
DEPTHS = {"audio": 1, "video": 1, "flow": 1}
TINY = {"width": 8, "heads": 2, "depths": DEPTHS, "kernel": 3, "expansion": 2, "output": 6, "hidden": 16}
# The rows whose heads alone differ are one network.
ROWS = [name for name in VARIANTS if name not in ("ife_video", "ife_audio", "ife_fusion")]
# Gradients take longest to compile.
LIGHT = [pytest.param(r, marks=pytest.mark.thorough if r == "transformer" else pytest.mark.slow) for r in ROWS]
# One row for each way that a program can differ from that of the others.
_FEW = ("full", "time_concat", "transformer")
FEW = [row if row in _FEW else pytest.param(row, marks=pytest.mark.thorough) for row in ROWS]
# Clips of `batch`, by what they lack: GAPS some steps, the others whole streams.
GAPS, BLIND, STILL, SILENT, DARK, EMPTY = range(1, 7)
LACKING = {"video": [BLIND, DARK, EMPTY], "flow": [STILL, DARK, EMPTY], "audio": [SILENT, EMPTY]}
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def batch(seed: int = 0) -> dict[str, np.ndarray]:
    """Seven clips: complete, with gaps, without video, flow, audio, video and flow, and all streams; NaN elsewhere."""
    rng = np.random.default_rng(seed)
    out = {"label": np.arange(7) % CLASSES, "weight": np.ones(7, np.float32)}
    for s, (steps, width) in SHAPES.items():
        mask = np.ones((7, steps), bool)
        mask[GAPS], mask[LACKING[s]] = rng.permutation(np.arange(steps) > 1), False
        out[f"{s}_mask"] = mask
        out[s] = np.where(mask[..., None], rng.normal(size=(7, steps, width)), np.nan).astype(np.float32)
    return out


def larger(one: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same clips behind three others, one step later and with two more steps of NaN."""
    others = {k: x[:3] for k, x in batch(9).items()}
    out = {k: np.concatenate([others[k], x]) for k, x in one.items()}
    for s in SHAPES:
        out[s] = np.pad(out[s], ((0, 0), (1, 2), (0, 0)), constant_values=np.nan)
        out[f"{s}_mask"] = np.pad(out[f"{s}_mask"], ((0, 0), (1, 2)))
    return out


def built(row: str = "full", **changes) -> DeIII:
    return FUSION.module(classes=CLASSES, **TINY | VARIANTS[row] | changes)


@functools.cache
def compiled(row: str = "full"):
    """Variables after some steps, and the output."""
    module = built(row)
    return random_variables(jax.eval_shape(module.init, jax.random.key(0), batch())), jit(module.apply)


@functools.cache
def predicted(row: str = "full"):
    variables, apply = compiled(row)
    return jax.tree.map(np.asarray, apply(variables, batch()))


@functools.cache
def compiled_loss(row: str, dtype: str):
    """(params, running, batch, seed) → gradient of the summed loss in training, and `running` moved on.

    Of the batch it has the streams that the row reads, as in training.
    """
    module = built(row, dtype=jnp.dtype(dtype))

    def total(params, running, batch, seed):
        batch = {k: x for k, x in batch.items() if k.removesuffix("_mask") in (*module.streams, "label", "weight")}
        variables, rngs = {"params": params, **running}, {"dropout": jax.random.key(seed)}
        output, running = module.apply(variables, batch, train=True, rngs=rngs, mutable=list(running))
        terms = FUSION.loss(output, batch, "single")
        assert set(terms) == set(HEADS)
        return sum(jnp.sum(term) for term in terms.values()), running

    return jit(jax.grad(total, has_aux=True))


def split(variables):
    """Parameters, and the running statistics if there are any."""
    return variables["params"], {k: v for k, v in variables.items() if k != "params"}


conformer_block = jit(ConformerBlock(TINY["heads"], TINY["kernel"], TINY["expansion"]).apply)


# ---- The equations, as loops ---------------------------------------------------------------------------------------


def weights_of(row: str = "full"):
    return jax.tree.map(np.float64, compiled(row)[0])


def linear(p, x: np.ndarray) -> np.ndarray:
    return x @ p["kernel"] + p.get("bias", 0)


def eq_1(variables, stream: str, x: np.ndarray, entered: bool = False) -> np.ndarray:
    """The Conformer of one clip's real steps x (n, w): input layer unless they `entered`, block, output layer."""
    of_block = {k: jax.tree.map(jnp.float32, v[f"{stream}_block_0"]) for k, v in variables.items()}
    p, mask = variables["params"], np.ones((1, len(x)), bool)
    x = x if entered else linear(p[f"{stream}_input"], x)
    hidden = conformer_block(of_block, np.float32(x)[None], mask)
    return linear(p[f"{stream}_output"], np.float64(hidden[0]))


def eqs_2_and_3(p, flow: np.ndarray | None, video: np.ndarray | None) -> np.ndarray:
    """One step; None for what it lacks, whose score then is no term of the softmax."""
    inputs = {"flow": flow, "video": video}
    joined = np.concatenate([x if x is not None else 0 * (video if flow is None else flow) for x in inputs.values()])
    scores = dict(zip(inputs, linear(p["weights"], joined), strict=True))
    total = sum(math.exp(scores[k]) for k, x in inputs.items() if x is not None)
    return sum(math.exp(scores[k]) / total * linear(p[k], x) for k, x in inputs.items() if x is not None)


def eqs_4_to_6(p, queries, keys, temperature=1.0, residual=False) -> tuple[np.ndarray, np.ndarray]:
    """The queries (q, d) after attention to keys (k, d), and α (q, k)."""
    out, alpha = [], np.zeros((len(queries), len(keys)))
    for i, x in enumerate(queries):
        query, scores = linear(p["query"], x), []
        for y in keys:
            key = linear(p["key"], y)
            scores.append(query @ key / (math.sqrt(query @ query) * math.sqrt(key @ key)))
        met = x.copy()
        for j, y in enumerate(keys):
            alpha[i, j] = math.exp(scores[j] / temperature) / sum(math.exp(s / temperature) for s in scores)
            met += alpha[i, j] * linear(p["value"], y)
        fed = linear(p["down"], np.maximum(linear(p["up"], met), 0))
        out.append(met + fed if residual else fed)
    return np.array(out), alpha


def perceptron(p, head: str, x: np.ndarray) -> np.ndarray:
    return linear(p[f"{head}_head"], np.maximum(linear(p[f"{head}_hidden"], x), 0))


def streams_of(one: dict[str, np.ndarray], clip: int) -> dict[str, np.ndarray]:
    return {s: np.float64(one[s][clip][one[f"{s}_mask"][clip]]) for s in SHAPES}


@pytest.mark.parametrize("clip", [0, GAPS])
def test_a_clip_is_answered_as_the_equations_say(clip):
    variables, one, output = weights_of(), batch(), predicted()
    p = variables["params"]
    encoded = {s: iter(eq_1(variables, s, x)) for s, x in streams_of(one, clip).items()}
    audio, video, times = np.array(list(encoded["audio"])), [], []
    for t in range(SHAPES["video"][0]):
        pair = [next(encoded[s]) if one[f"{s}_mask"][clip, t] else None for s in ("flow", "video")]
        if any(x is not None for x in pair):
            video.append(eqs_2_and_3(p["pae"], *pair))
            times.append(t)
    seen, asked = eqs_4_to_6(p["video_ife"], video, audio)
    heard, asking = eqs_4_to_6(p["audio_ife"], audio, np.array(video))
    expected = {"video": seen.max(0), "audio": heard.max(0), "fusion": np.concatenate([seen.max(0), heard.max(0)])}
    for head, vector in expected.items():
        np.testing.assert_allclose(output.features[head][clip], vector, atol=1e-5)
        np.testing.assert_allclose(output.logits[head][clip], perceptron(p, head, vector), atol=1e-5)
    real_audio = np.flatnonzero(one["audio_mask"][clip])
    np.testing.assert_allclose(output.attention["video"][clip][np.ix_(times, real_audio)], asked, atol=1e-5)
    np.testing.assert_allclose(output.attention["audio"][clip][np.ix_(real_audio, times)], asking, atol=1e-5)


def test_without_ife_the_heads_read_what_is_encoded():
    """Eq. 1, its greatest values over time, and nothing of the other modality."""
    variables, output, clip = weights_of("none_ife"), predicted("none_ife"), streams_of(batch(), GAPS)
    assert not {"video_ife", "audio_ife"} & set(variables["params"])
    assert output.attention == {}
    np.testing.assert_allclose(
        output.features["audio"][GAPS], eq_1(variables, "audio", clip["audio"]).max(0), atol=1e-5
    )
    other = batch() | {"audio": batch()["audio"] + 1}
    changed = compiled("none_ife")[1](compiled("none_ife")[0], other)
    np.testing.assert_array_equal(changed.logits["video"], output.logits["video"])
    assert np.abs(changed.logits["fusion"] - output.logits["fusion"])[0].max() > 1e-3
    hears = compiled()[1](compiled()[0], other)
    assert np.abs(hears.logits["video"] - predicted().logits["video"])[0].max() > 1e-4


def test_one_of_flow_and_video_has_all_the_weight_where_the_other_is_missing():
    """Eqs. 2–3 with both, either and none of the two."""
    rng = np.random.default_rng(0)
    flow, video = rng.normal(size=(2, 1, 4, 6)).astype(np.float32)
    flow_mask, video_mask = np.array([[True, True, False, False]]), np.array([[True, False, True, False]])
    flow, video = np.where(flow_mask[..., None], flow, 0), np.where(video_mask[..., None], video, 0)
    module, streams = Pae(6), ((flow, flow_mask), (video, video_mask))
    variables = random_variables(jax.eval_shape(module.init, jax.random.key(0), *streams))
    weighed, mask = module.apply(variables, *streams)
    p = jax.tree.map(np.float64, variables["params"])
    expected = [
        eqs_2_and_3(p, flow[0, 0], video[0, 0]),
        flow[0, 1] @ p["flow"]["kernel"],
        video[0, 2] @ p["video"]["kernel"],
        np.zeros(6),
    ]
    np.testing.assert_allclose(weighed[0], expected, atol=1e-5)
    np.testing.assert_array_equal(mask, [[True, True, True, False]])


@pytest.mark.parametrize(("temperature", "residual"), [(1.0, False), (0.1, True)])
def test_ife_is_equations_4_to_6(temperature, residual):
    rng = np.random.default_rng(0)
    x, other = (rng.normal(size=(2, n, 6)).astype(np.float32) for n in (4, 3))
    mask, other_mask = np.array([[True] * 4, [True, False] * 2]), np.array([[True, False, True], [False] * 3])
    module, streams = Ife(6, temperature, residual), ((x, mask), (other, other_mask))
    variables = random_variables(jax.eval_shape(module.init, jax.random.key(0), *streams))
    enhanced, weights = module.apply(variables, *streams)
    p = jax.tree.map(np.float64, variables["params"])
    expected, alpha = eqs_4_to_6(p, np.float64(x[0]), np.float64(other[0, ::2]), temperature, residual)
    np.testing.assert_allclose(enhanced[0], expected, atol=1e-5)
    np.testing.assert_allclose(weights[0][:, ::2], alpha, atol=1e-5)
    assert not weights[0][:, 1].any()
    # No real key: the attention adds nothing.
    expected, _ = eqs_4_to_6(p, np.float64(x[1, ::2]), [], temperature, residual)
    np.testing.assert_allclose(enhanced[1, ::2], expected, atol=1e-5)
    assert not weights[1].any()


def test_the_gradient_of_a_cosine_with_zeros_is_finite():
    module, mask = Ife(6), np.ones((1, 3), bool)
    some = np.random.default_rng(0).normal(size=(1, 3, 6)).astype(np.float32)
    variables = module.init(jax.random.key(0), (some, mask), (some, mask))
    total = lambda x, y: jnp.sum(jnp.sin(module.apply(variables, (x, mask), (y, mask))[0]))  # noqa: E731
    gradient = jit(jax.grad(total, (0, 1)))
    for one in (some, np.zeros_like(some)):
        assert all(bool(jnp.isfinite(g).all()) for g in gradient(one, np.zeros_like(some)))


# ---- Single encoders of flow and video -----------------------------------------------------------------------------


def joined_inputs(row: str, clip: int) -> list[np.ndarray]:
    """What the encoder of a row reads of a clip, step by step; the video's steps before the flow's if they are many."""
    p, one, out = weights_of(row)["params"], batch(), {"both": [], "video": [], "flow": []}
    for t in range(SHAPES["video"][0]):
        real = {s: bool(one[f"{s}_mask"][clip, t]) for s in ("flow", "video")}
        steps = {s: np.float64(one[s][clip, t]) if is_real else np.zeros(SHAPES[s][1]) for s, is_real in real.items()}
        if row == "channel_concat":
            out["both"] += [linear(p["visual_input"], np.concatenate(list(steps.values())))] * any(real.values())
            continue
        entered = {s: linear(p[f"{s}_input"], steps[s]) if real[s] else None for s in real}
        if row == "time_concat":
            for s in ("video", "flow"):
                out[s] += [entered[s]] * real[s]
        elif any(real.values()):
            sums = sum(x for x in entered.values() if x is not None)
            out["both"].append(eqs_2_and_3(p["pae"], *entered.values()) if row == "early" else sums)
    return np.array([x for steps in out.values() for x in steps])


@pytest.mark.parametrize(
    "row",
    ["time_concat", *(pytest.param(row, marks=pytest.mark.thorough) for row in ("channel_concat", "sum", "early"))],
)
def test_one_encoder_reads_both_pictures(row):
    """Against loops over a clip in which video and flow each lack steps that the other has."""
    variables, output = weights_of(row), predicted(row)
    seen = eq_1(variables, "visual", joined_inputs(row, GAPS), entered=True)
    audio = eq_1(variables, "audio", streams_of(batch(), GAPS)["audio"])
    enhanced, _ = eqs_4_to_6(variables["params"]["video_ife"], seen, audio)
    np.testing.assert_allclose(output.features["video"][GAPS], enhanced.max(0), atol=1e-5)


def test_attention_after_concatenation_in_time_is_by_points_in_time():
    """A point in time asks by the mean of its real steps, and is asked by their sum."""
    row, one, clip = "time_concat", batch(), GAPS
    variables, attention = weights_of(row), predicted(row).attention
    seen = eq_1(variables, "visual", joined_inputs(row, clip), entered=True)
    audio = eq_1(variables, "audio", streams_of(one, clip)["audio"])
    _, asked = eqs_4_to_6(variables["params"]["video_ife"], seen, audio)
    _, asking = eqs_4_to_6(variables["params"]["audio_ife"], audio, seen)
    points = np.concatenate([np.flatnonzero(one[f"{s}_mask"][clip]) for s in ("video", "flow")])
    real_audio = np.flatnonzero(one["audio_mask"][clip])
    for t in range(SHAPES["video"][0]):
        steps = np.flatnonzero(points == t)
        mean = np.mean([asked[i] for i in steps], 0) if len(steps) else 0
        np.testing.assert_allclose(attention["video"][clip, t, real_audio], mean, atol=1e-5)
        np.testing.assert_allclose(attention["audio"][clip, real_audio, t], sum(asking[:, i] for i in steps), atol=1e-5)


# ---- Every row -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", FEW)
def test_padding_and_neighbours_change_nothing(row):
    variables, apply = compiled(row)
    ours, theirs = predicted(row), apply(variables, larger(batch()))
    for head in HEADS:
        assert ours.logits[head].dtype == np.float32
        np.testing.assert_allclose(theirs.logits[head][3:], ours.logits[head], atol=2e-5)
        np.testing.assert_allclose(theirs.features[head][3:], ours.features[head], atol=2e-5)
        assert np.ptp(ours.logits[head][: GAPS + 1], 0).max() > 1e-3, "clips differ"
    for name, weights in ours.attention.items():
        np.testing.assert_allclose(theirs.attention[name][3:, 1:-2, 1:-2], weights, atol=2e-5)
        assert float(jnp.sum(theirs.attention[name][3:])) == pytest.approx(weights.sum(), abs=1e-4)


@pytest.mark.parametrize("row", FEW)
def test_missing_streams_leave_what_is_documented(row):
    output, p = predicted(row), weights_of(row)["params"]
    dark = set.intersection(*(set(LACKING[s]) for s in built(row).streams if s != "audio"))
    for name, lacking in (("audio", LACKING["audio"]), ("video", dark)):
        zero = ~output.features[name].any(-1)
        assert set(np.flatnonzero(zero)) == set(lacking), name
    for head in HEADS:
        assert np.isfinite(output.logits[head]).all()
        width = 2 * TINY["output"] if head == "fusion" else TINY["output"]
        np.testing.assert_allclose(output.logits[head][EMPTY], perceptron(p, head, np.zeros(width)), atol=1e-5)
    for weights in output.attention.values():
        assert not weights[[*LACKING["audio"], *dark]].any()


@pytest.mark.parametrize("row", LIGHT)
def test_gradients_are_finite_in_bfloat16_and_reach_every_parameter(row):
    gradient, variables = compiled_loss(row, "bfloat16"), split(compiled(row)[0])
    gradients = [gradient(*variables, batch(), seed) for seed in range(3)]
    assert all(bool(jnp.isfinite(v).all()) for v in jax.tree.leaves(gradients))
    reach = jax.tree.map(lambda *g: max(float(jnp.abs(x).max()) for x in g), *(g for g, _ in gradients))
    # The same to all scores of a query, a key's bias moves no softmax: what reaches it is rounding.
    flat = {jax.tree_util.keystr(path): r for path, r in jax.tree_util.tree_leaves_with_path(reach)}
    assert not [path for path, r in flat.items() if not r > 0 and not path.endswith("['key']['bias']")]


@pytest.mark.parametrize("row", LIGHT)
def test_nothing_there_is_nothing_learned_but_the_heads(row):
    nothing = {k: np.zeros_like(x) if k.endswith("mask") else x for k, x in batch().items()}
    gradient, running = compiled_loss(row, "bfloat16")(*split(compiled(row)[0]), nothing, 0)
    assert all(bool(jnp.isfinite(v).all()) for v in jax.tree.leaves((gradient, running)))
    reached = {name for name, tree in gradient.items() if any(v.any() for v in jax.tree.leaves(tree))}
    # A head named after a stream costs nothing in clips without that; a row that reads no video cannot tell.
    blind = {"video_head", "video_hidden"} if "video" not in built(row).streams else set()
    assert reached == {"fusion_head", "fusion_hidden"} | blind


@pytest.mark.parametrize("row", FEW)
def test_other_clips_are_no_new_program(row):
    variables, traces = compiled(row)[0], []

    @jax.jit
    def apply(variables, batch):
        traces.append(1)
        return built(row).apply(variables, batch).logits

    for seed in (1, 2):
        jax.eval_shape(apply, variables, batch(seed))
    assert len(traces) == 1


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_a_few_clips_are_learned(row):
    one = {k: x[[0, GAPS, BLIND]] for k, x in batch(3).items()}
    variables = jit(built(row).init)(jax.random.key(0), one)
    gradient, tx = compiled_loss(row, "float32"), optax.adam(1e-2)
    params, running = split(variables)
    opt_state, update = tx.init(params), jit(tx.update)
    for seed in range(200):
        grads, running = gradient(params, running, one, seed)
        updates, opt_state = update(grads, opt_state)
        params = optax.apply_updates(params, updates)
    logits = compiled(row)[1]({"params": params, **running}, one).logits
    for head in HEADS:
        costs = one[f"{head}_mask"].any(-1) if head != "fusion" else slice(None)
        assert (logits[head].argmax(-1) == one["label"])[costs].all(), head


# ---- Sizes and settings --------------------------------------------------------------------------------------------

COUNTS = {
    "full": 81_415_316,
    "none_ife": 61_585_044,
    "flow_only": 57_031_442,
    "video_only": 63_354_642,
    "time_concat": 64_076_050,
    "channel_concat": 64_075_538,
    "sum": 64_076_050,
    "early": 64_602_388,
    "transformer": 56_048_788,
}


@pytest.mark.parametrize("row", ROWS)
def test_parameters_are_those_counted_by_hand(row):
    """Inputs of 1024 (audio) and 1408 (video, flow), six classes, the paper's sizes.

    Conformer block C, d = 512:
      feed-forward: norm 2·512, 512·2048 + 2048, 2048·512 + 512                     = 2,100,736, twice 4,201,472
      attention: norm 2·512, query, key, value, out 4·(512² + 512),
        positions 512² without bias, two biases of 8·64                             = 1,314,816
      convolution: norm 2·512, 512·1024 + 1024, 31·512, norm 2·512, 512² + 512      =   805,888
      norm 2·512                                                                    =     1,024; C = 6,323,200
    Transformer block T: 4·(512² + 512) + 512·2048 + 2048 + 2048·512 + 512 + 2·2·512              T = 3,152,384
    Input layers: audio A = 1024·512 + 512 = 524,800; video or flow V = 1408·512 + 512 = 721,408;
      both side by side 2816·512 + 512 = 2·V - 512
    Output layer O = 512·1408 + 1408 = 722,304
    PAE, weights and two matrices: at 1408, P = 2816·2 + 2 + 2·1408² = 3,970,562;
      at 512, p = 1024·2 + 2 + 2·512² = 526,338
    IFE, one way: I = 3·1408² + 2·(1408² + 1408) = 9,915,136
    Heads: H = 2·(1408·512 + 512 + 512·6 + 6) + 2816·512 + 512 + 512·6 + 6 = 2,894,354

    full           A + 2V + (3 + 3 + 2)·C + 3·O + P + 2·I + H = 81,415,316
    none_ife       full - 2·I                                 = 61,585,044
    flow_only      A + V + (3 + 2)·C + 2·O + 2·I + H          = 57,031,442
    video_only     A + V + (3 + 3)·C + 2·O + 2·I + H          = 63,354,642
    time_concat    video_only + V                             = 64,076,050, and so sum
    channel_concat video_only + V - 512                       = 64,075,538
    early          sum + p                                    = 64,602,388
    transformer    full - 8·C + 8·T                           = 56,048,788
    """
    module = DeIII(classes=6, **VARIANTS[row])
    steps = {"audio": (1, 4, 1024), "video": (1, 3, 1408), "flow": (1, 3, 1408)}
    one = {s: np.zeros(shape, np.float32) for s, shape in steps.items()}
    one |= {f"{s}_mask": np.ones(shape[:2], bool) for s, shape in steps.items()}
    shapes = jax.eval_shape(module.init, jax.random.key(0), one)
    assert sum(v.size for v in jax.tree.leaves(shapes["params"])) == COUNTS[row]


def test_the_named_head_predicts_and_validation_chooses_among_all():
    assert {row: FUSION.heads(built(row))[0] for row in VARIANTS if row.startswith("ife")} == {
        "ife_video": "video", "ife_audio": "audio", "ife_fusion": "fusion",
    }  # fmt: skip
    assert set(FUSION.heads(built("ife_audio"))) == set(HEADS)
    assert FUSION.candidates(built("ife_audio")) == ()
    assert FUSION.heads(built()) == FUSION.candidates(built()) == ("video", "audio", "fusion")


def test_sound_and_a_picture_are_needed():
    fits = {("audio", "video"), ("audio", "flow"), ("audio", "video", "flow")}
    others = {("video", "flow"), ("audio",), ("audio", "text"), ("audio", "video", "text")}
    assert {streams for streams in fits | others if FUSION.fits(streams)} == fits


def test_the_small_one_is_built():
    small = FUSION.module(classes=CLASSES, **FUSION.small)
    shapes = jax.eval_shape(small.init, jax.random.key(0), batch())
    assert shapes["params"]["flow_block_0"]["convolution"]["depthwise"]["kernel"].shape == (15, 1, 128)
    assert "flow_block_1" not in shapes["params"]


@pytest.mark.parametrize(
    ("setting", "choices"), [("visual", "pae, early"), ("sequence", "conformer"), ("head", "valid")]
)
def test_an_unknown_choice_is_named(setting, choices):
    with pytest.raises(AvjaxError, match=f"model.settings.{setting} is 'late'; choose one of {choices}"):
        models.check(FusionSettings("de_iii", streams=FUSION.streams, settings={setting: "late"}))


def test_pictures_of_different_lengths_are_refused():
    short = batch() | {"flow": batch()["flow"][:, :4], "flow_mask": batch()["flow_mask"][:, :4]}
    with pytest.raises(AvjaxError, match="video has 5 steps and flow 4; they share one time base"):
        jax.eval_shape(built().init, jax.random.key(0), short)


@pytest.mark.parametrize("row", [pytest.param("flow_only", marks=pytest.mark.thorough), "transformer"])
def test_dropout_acts_in_training_only(row):
    variables, calm = compiled(row)[0], predicted(row).logits["fusion"]
    train = jit(functools.partial(built(row, dropout=0.5).apply, train=True))
    one, two = (train(variables, batch(), rngs={"dropout": jax.random.key(i)}).logits["fusion"] for i in (0, 1))
    assert np.abs(one - two)[0].max() > 1e-3
    assert np.abs(one - calm)[0].max() > 1e-3


@pytest.mark.thorough
@pytest.mark.parametrize(("setting", "value"), [("legacy_relative", True), ("temperature", 0.1), ("residual", True)])
def test_settings_reach_their_modules(setting, value):
    """Those that no parameter shows: each changes the output. The depths and widths are in the counts."""
    variables, before = compiled("video_only")[0], predicted("video_only").logits["video"][0]
    after = jit(built("video_only", **{setting: value}).apply)(variables, batch()).logits["video"][0]
    assert np.abs(after - before).max() > 1e-4


def test_bfloat16_stays_near_float32():
    variables, full = compiled()[0], predicted()
    output = jit(built(dtype=jnp.bfloat16).apply)(variables, batch())
    assert {v.dtype for v in (*output.logits.values(), *output.attention.values())} == {jnp.dtype("float32")}
    for head in HEADS:
        error = np.abs(output.logits[head] - full.logits[head]).max()
        assert 0 < error < 0.1 * np.abs(full.logits[head]).max() + 0.02
