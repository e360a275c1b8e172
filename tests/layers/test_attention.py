"""Layers: the two ways of attention agree with each other and with plain loops, whatever is masked."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avjax import layers
from avjax.errors import AvjaxError
from avjax.layers import attention as attention_layers
from avjax.layers import dropout
from benchmarks.scaling import as_on_accelerators

KEYS = jax.random.split(jax.random.key(0), 3)
QUERY, KEY, VALUE = (jax.random.normal(k, (3, n, 2, 4)) for k, n in zip(KEYS, (5, 7, 7), strict=True))
MASK = jnp.arange(7)[None] < jnp.array([[7], [3], [0]])


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Few keys, too, are attended to head by head."""
    monkeypatch.setattr(attention_layers, "_FEW", 0)


@pytest.mark.parametrize("jitted", [True, False])
def test_context_without_weights_is_that_with_them(jitted):
    want, weights = layers.attend(QUERY, KEY, VALUE, MASK)
    got = (jax.jit(attention_layers.attended) if jitted else attention_layers.attended)(QUERY, KEY, VALUE, MASK)
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert not got[2].any(), "nothing may be attended to"
    np.testing.assert_allclose(weights.sum(-1), np.array([1, 1, 0])[:, None, None] * np.ones((3, 2, 5)), atol=1e-6)


def test_few_keys_are_attended_to_all_at_once(monkeypatch):
    monkeypatch.setattr(attention_layers, "_FEW", 8)
    loops = []
    for repeat in (1, 2):
        key, mask = (jnp.concatenate([x] * repeat, 1) for x in (KEY, MASK))
        # A function of its own each time: traces are kept by function.
        loops.append("scan" in str(jax.make_jaxpr(lambda *a: attention_layers.attended(*a))(QUERY, key, key, mask)))
    assert loops == [False, True]


@pytest.mark.parametrize("mask", [MASK, layers.causal(MASK)[:, :5]], ids=["of keys", "of queries and keys"])
def test_gradients_agree_and_are_finite_where_nothing_may_be_attended_to(mask):
    def total(f):
        return lambda *qkv: jnp.sum(jnp.sin(f(*qkv, mask)))

    ours = jax.grad(total(attention_layers.attended), (0, 1, 2))(QUERY, KEY, VALUE)
    theirs = jax.grad(total(lambda *a: layers.attend(*a)[0]), (0, 1, 2))(QUERY, KEY, VALUE)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
        assert np.isfinite(a).all()


def by_loops(mask):
    """Softmax attention over the admitted keys, one number after another."""
    context = np.zeros(QUERY.shape)
    for b, q, h in np.ndindex(QUERY.shape[:3]):
        admitted = np.flatnonzero(mask[b, q])
        if admitted.size:
            weights = np.exp(KEY[b, admitted, h] @ QUERY[b, q, h] / 2)  # 2 = the root of the width 4
            context[b, q, h] = weights / weights.sum() @ VALUE[b, admitted, h]
    return context


@pytest.mark.parametrize("jitted", [True, False])
def test_every_query_may_have_keys_of_its_own(jitted):
    mask = np.random.default_rng(0).random((3, 5, 7)) < 0.4
    mask[1, 2] = False
    want = by_loops(mask)
    got = (jax.jit(attention_layers.attended) if jitted else attention_layers.attended)(QUERY, KEY, VALUE, mask)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert not got[1, 2].any(), "nothing may be attended to"
    context, weights = layers.attend(QUERY, KEY, VALUE, mask)
    np.testing.assert_allclose(context, want, atol=1e-5)
    np.testing.assert_array_equal(weights > 0, np.repeat(mask[:, None], 2, 1))


def test_causal_masks_admit_the_real_past_alone():
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]], bool)
    got = layers.causal(mask)
    for b, query, key in np.ndindex(got.shape):
        assert got[b, query, key] == (key <= query and mask[b, key])


def test_no_step_of_a_causal_block_sees_what_follows():
    block = layers.PreNormBlock(2, 6, jax.nn.relu, 1e-6)
    x, other = jax.random.normal(jax.random.key(0), (2, 1, 5, 4))
    past = layers.causal(jnp.ones((1, 5), bool))
    variables = jax.jit(block.init)(jax.random.key(1), x, past)
    apply = jax.jit(block.apply)
    before = apply(variables, x, past)
    after = apply(variables, jnp.concatenate([x[:, :3], other[:, 3:]], 1), past)
    np.testing.assert_allclose(after[:, :3], before[:, :3], atol=1e-6)
    assert (np.abs(after - before)[:, 3:].max(-1) > 1e-3).all()


def test_layer_scale_and_missing_biases_are_params():
    block = layers.PreNormBlock(2, 6, jax.nn.relu, 1e-6, unbiased=("key",), scaled=True)
    x = jnp.ones((1, 3, 4))
    params = block.init(jax.random.key(0), x, jnp.ones((1, 3), bool))["params"]
    assert params["attention"]["key"].keys() == {"kernel"}
    assert params["attention"]["query"].keys() == {"kernel", "bias"}
    off = params | {"attention_scale": jnp.zeros(4), "feed_forward_scale": jnp.zeros(4)}
    np.testing.assert_array_equal(block.apply({"params": off}, x, jnp.ones((1, 3), bool)), x)


# ---- Steps in time ------------------------------------------------------------------------------------------------


STEPS = np.array([[1, 1, 1, 1, 1], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0]], bool)


def test_positions_count_from_the_first_real_step():
    np.testing.assert_array_equal(layers.positions(STEPS), [[1, 2, 3, 4, 5], [0, 1, 2, 0, 0], [0] * 5])


@pytest.mark.parametrize("width", [6, 7])
def test_sinusoids_are_sines_then_cosines_and_nothing_where_nothing_is(width):
    got = layers.sinusoids(np.array([[0, 1, 9]]), width)
    assert got.shape == (1, 3, width)
    assert not got[0, 0].any()
    for n, position in ((1, 1), (2, 9)):
        angles = [position / 10000 ** (i / 2) for i in range(3)]
        want = [*np.sin(angles), *np.cos(angles), *[0] * (width - 6)]
        np.testing.assert_allclose(got[0, n], want, atol=1e-6)


def test_the_last_step_is_the_last_real_one():
    x = np.arange(15, dtype=np.float32).reshape(3, 5, 1) + 1
    np.testing.assert_array_equal(layers.last_step(x, STEPS), [[5], [8], [0]])


def test_streams_enter_without_what_is_masked():
    x = np.where(STEPS[..., None], np.ones((3, 5, 2), np.float32), np.nan)
    batch = {"audio": x, "audio_mask": STEPS}
    steps, masks = layers.stream_inputs(batch, ("audio",), jnp.float32)
    np.testing.assert_array_equal(steps["audio"][..., 0], STEPS)
    np.testing.assert_array_equal(masks["audio"], STEPS)
    steps, masks = layers.stream_inputs(batch, ("audio",), jnp.float32, padded=True)
    np.testing.assert_array_equal(steps["audio"][..., 1], STEPS)
    assert masks["audio"].all()


@pytest.mark.parametrize(("n", "m"), [(5, 5), (5, 2), (2, 5), (7, 3), (1, 4)])
def test_aligned_streams_average_what_a_step_takes_up(n, m):
    """Padding before and after either stream moves nothing."""
    x = np.random.default_rng(n).normal(size=(n, 2)).astype(np.float32)
    want = [x[p * n // m : -(-(p + 1) * n // m)].mean(0) for p in range(m)]
    before, after = np.full((2, 2), np.nan, np.float32), np.full((3, 2), np.nan, np.float32)
    mask, onto = np.zeros((1, n + 5), bool), np.zeros((1, m + 3), bool)
    mask[0, 2 : n + 2], onto[0, 1 : m + 1] = True, True
    got, valid = layers.align(np.concatenate([before, x, after])[None], mask, onto)
    np.testing.assert_allclose(got[0, 1 : m + 1], want, atol=1e-6)
    np.testing.assert_array_equal(valid, onto)
    assert not got[0, ~onto[0]].any()


def test_nothing_aligns_with_a_missing_stream():
    x, none, some = np.ones((1, 4, 2), np.float32), np.zeros((1, 4), bool), np.ones((1, 4), bool)
    for masks in ((none, some), (some, none)):
        got, valid = layers.align(x, *masks)
        assert not got.any()
        assert not valid.any()


# ---- Attention between streams ------------------------------------------------------------------------------------


def test_a_block_that_asks_itself_is_a_plain_layer():
    plain, cross = layers.PreNormBlock(2, 6, jax.nn.relu, 1e-5), layers.CrossBlock(2, 6)
    x, mask = jax.random.normal(jax.random.key(0), (3, 5, 4)), jnp.asarray(STEPS)
    variables = jax.jit(plain.init)(jax.random.key(1), x, mask)
    want = jax.jit(plain.apply)(variables, x, mask)
    np.testing.assert_allclose(jax.jit(cross.apply)(variables, x, x, mask), want, atol=1e-6)


def test_a_block_with_a_share_of_one_keeps_what_it_had():
    block = layers.CrossBlock(2, 6, mixed=True)
    x, source = jax.random.normal(jax.random.key(0), (2, 3, 5, 4))
    params = jax.jit(block.init)(jax.random.key(1), x, source, jnp.asarray(STEPS))["params"]
    apply = jax.jit(lambda mix: block.apply({"params": params | {"mix": mix}}, x, source, jnp.asarray(STEPS)))
    np.testing.assert_allclose(apply(jnp.ones(1)), x, atol=1e-6)
    assert np.abs(apply(jnp.zeros(1)) - x).max() > 1e-3


def test_dropped_weights_are_dropped_in_training_alone():
    attention = attention_layers.CrossAttention(2, dropout=0.5)
    x, mask = jax.random.normal(jax.random.key(0), (3, 5, 4)), jnp.asarray(STEPS)
    variables = jax.jit(attention.init)(jax.random.key(1), x, x, mask)
    apply = jax.jit(
        lambda key, train: attention.apply(variables, x, x, mask, train, rngs={"dropout": key}), static_argnums=1
    )
    keys = jax.random.split(jax.random.key(2), 2)
    np.testing.assert_array_equal(apply(keys[0], False), apply(keys[1], False))
    assert np.abs(apply(keys[0], True) - apply(keys[1], True))[0].max() > 1e-3


# ---- Recurrence ---------------------------------------------------------------------------------------------------


def lstm_by_loops(params, x, order):
    """The states (hidden, cell) after each of the steps in `order`, gate by gate."""
    sigmoid = lambda v: 1 / (1 + np.exp(-v))  # noqa: E731
    width = params["kernel"].shape[0]
    hidden, cell, out = np.zeros(width), np.zeros(width), {}
    for t in order:
        inputs = np.tensordot(x[t], params["input"]["kernel"], 1) + params["input"]["bias"]
        admit, keep, candidate, emit = inputs + (hidden @ params["kernel"]).reshape(4, width)
        cell = sigmoid(keep) * cell + sigmoid(admit) * np.tanh(candidate)
        hidden = sigmoid(emit) * np.tanh(cell)
        out[t] = hidden, cell
    return out


@pytest.mark.parametrize("reverse", [False, True])
def test_recurrences_know_of_no_padding(reverse):
    module = layers.Recurrence(3, reverse)
    x = jax.random.normal(jax.random.key(0), (3, 5, 2))
    mask = jnp.asarray(STEPS)
    rubbish = jnp.where(mask[..., None], x, jnp.nan)
    variables = jax.jit(module.init)(jax.random.key(1), x, mask)
    variables["params"]["input"]["bias"] = jax.random.normal(jax.random.key(2), (4, 3))
    hidden, cell = jax.jit(module.apply)(variables, rubbish, mask)
    params = jax.tree.map(np.float64, variables["params"])
    for clip in (0, 1):
        order = np.flatnonzero(STEPS[clip])[:: -1 if reverse else 1]
        want = lstm_by_loops(params, np.float64(x[clip]), order)
        for t, states in want.items():
            np.testing.assert_allclose((hidden[clip, t], cell[clip, t]), states, atol=1e-5)
        end = 0 if reverse else -1
        np.testing.assert_allclose(hidden[clip, end], want[order[-1]][0], atol=1e-5)
    assert not hidden[2].any()
    assert not cell[2].any()


def test_recurrences_are_differentiable_past_padding():
    module = layers.Recurrence(3)
    mask = jnp.asarray(STEPS)
    x = jnp.where(mask[..., None], jnp.ones((3, 5, 2)), jnp.nan)
    variables = jax.jit(module.init)(jax.random.key(1), x, mask)
    grads = jax.jit(jax.grad(lambda v, x: module.apply(v, x, mask)[0][:, -1].sum(), (0, 1)))(variables, x)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    np.testing.assert_array_equal((grads[1] != 0).any(-1), STEPS)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
def test_dropout_keeps_its_share_and_the_mean(rate):
    x = jnp.ones((200, 300))
    got = layers.Dropout(rate, True).apply({}, x, rngs={"dropout": jax.random.key(1)})
    # Five standard deviations of the share among 60,000 independent draws.
    assert abs(float(jnp.mean(got == 0)) - rate) <= 5 * (rate * (1 - rate) / x.size) ** 0.5
    np.testing.assert_allclose(got[got != 0], 1 / (1 - rate), rtol=1e-6)
    np.testing.assert_array_equal(layers.Dropout(rate, False).apply({}, x), x)


@pytest.mark.parametrize("rate", [-0.1, 1.0, 2])
def test_what_is_no_rate_is_refused(rate):
    with pytest.raises(AvjaxError, match=f"a dropout is {rate}; give it a rate from 0 to below 1"):
        layers.Dropout(rate, True).apply({}, jnp.ones(3), rngs={"dropout": jax.random.key(0)})


def test_what_shares_a_fate_drops_together():
    got = layers.Dropout(0.5, True, shared=(1,)).apply({}, jnp.ones((40, 6, 3)), rngs={"dropout": jax.random.key(1)})
    assert (got == got[:, :1]).all()
    assert 0 < jnp.mean(got) < 2


def _bits(key, shape=(128, 128)):
    return np.unpackbits(np.asarray(dropout.hashed(key, shape)).view(np.uint8).reshape(-1, 4), axis=1).astype(int)


def test_hashes_of_near_keys_and_near_indices_have_nothing_in_common():
    bits = _bits(jax.random.key(0))
    # Each of 32 bits is a fair coin, to five standard deviations of 16,384 throws; and so is whether two agree.
    near = 5 * 0.5 / len(bits) ** 0.5
    others = [_bits(jax.random.key(seed)) for seed in (1, 2)] + [_bits(jax.random.fold_in(jax.random.key(0), 1))]
    agreements = [bits, *(bits == other for other in others), *(bits == np.roll(bits, n, 0) for n in (1, 2, 128))]
    assert max(np.abs(a.mean(0) - 0.5).max() for a in agreements) < near


def test_a_mask_is_the_same_for_a_lane_alone():
    keys = jax.random.split(jax.random.key(0), 3)
    drop = lambda key: layers.Dropout(0.5, True).apply({}, jnp.ones((4, 5)), rngs={"dropout": key})  # noqa: E731
    np.testing.assert_array_equal(jax.jit(jax.vmap(drop))(keys)[1], drop(keys[1]))


# Accelerators have a way of their own for what is channelwise.
_USUAL = [
    ("SAME", 2, False, "cpu"),
    ("VALID", 3, False, "cpu"),
    ("SAME", 3, True, "cpu"),
    ("SAME", 2, True, "accelerators"),
]


@pytest.mark.parametrize(
    ("padding", "kernel", "channelwise", "on"),
    [
        pytest.param(*case, marks=[pytest.mark.thorough] * (case not in _USUAL))
        for case in itertools.product(("SAME", "VALID"), (1, 2, 3, 5), (False, True), ("cpu", "accelerators"))
    ],
)
def test_convolution_over_time_is_that_of_flax(padding, kernel, channelwise, on, monkeypatch):
    if on == "accelerators":
        monkeypatch.setattr(jax.lax, "platform_dependent", as_on_accelerators)
    x = jax.random.normal(jax.random.key(0), (2, 9, 6))
    ours = layers.TimeConvolution(6, kernel, padding, channelwise)
    theirs = nn.Conv(6, (kernel,), padding=padding, feature_group_count=6 if channelwise else 1)
    variables = theirs.init(jax.random.key(1), x)
    assert jax.tree.map(jnp.shape, ours.init(jax.random.key(1), x)) == jax.tree.map(jnp.shape, variables)
    variables = jax.tree.map(lambda p: p + 0.1, variables)
    np.testing.assert_allclose(ours.apply(variables, x), theirs.apply(variables, x), atol=1e-5)
    gradients = [
        jax.grad(lambda v, x, c=c: jnp.sum(jnp.sin(c.apply(v, x))), (0, 1))(variables, x) for c in (ours, theirs)
    ]
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), *gradients)


def test_masked_max_is_that_of_real_steps_alone():
    x = np.array([[[-1.0, 5.0], [-2.0, -3.0], [np.nan, 9.0]], [[np.nan] * 2] * 3], np.float32)
    mask = np.array([[True, True, False], [False] * 3])
    np.testing.assert_array_equal(layers.masked_max(x, mask), [[-1, 5], [0, 0]])
    gradient = jax.grad(lambda x: jnp.sum(layers.masked_max(x, mask)))(x)
    np.testing.assert_array_equal(gradient, [[[1, 1], [0, 0], [0, 0]], np.zeros((3, 2))])
