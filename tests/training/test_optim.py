"""The optimizers against optax's and PyTorch's own, and their schedule at points worked by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from avjax.errors import AvjaxError
from avjax.settings import TrainSettings
from avjax.training import optim


def settings(**changes) -> TrainSettings:
    return TrainSettings(**({"learning_rate": 0.1, "weight_decay": 0.02, "warmup": 0.2} | changes))


@pytest.mark.parametrize(
    ("changes", "expected"),
    # Fractions 0, 0.1, 0.2, 0.6, 1 of the run; warm-up ends at 0.2, and 0.6 is halfway down.
    [
        ({}, [0.0, 0.05, 0.1, 0.05, 0.0]),
        ({"schedule": "constant"}, [0.0, 0.05, 0.1, 0.1, 0.1]),
        ({"schedule": "constant", "warmup": 0.0}, [0.1] * 5),
        ({"warmup": 1.0}, [0.0, 0.01, 0.02, 0.06, 0.1]),
    ],
)
def test_learning_rate_by_hand(changes, expected):
    ours = [float(optim.learning_rate(settings(**changes), jnp.float32(p))) for p in (0, 0.1, 0.2, 0.6, 1)]
    np.testing.assert_allclose(ours, expected, atol=1e-7)


def test_past_the_end_the_rate_stays_zero():
    assert float(optim.learning_rate(settings(), jnp.float32(1.3))) == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("norm", [0.5, 100.0])
def test_steps_are_those_of_optax_adamw(norm):
    chosen = settings(clip_norm=norm)
    ours, theirs = (
        optim.transform(chosen),
        optax.chain(optax.clip_by_global_norm(norm), optax.adamw(0.1, weight_decay=0.02)),
    )
    params = {"a": jnp.array([1.0, -2.0]), "b": {"c": jnp.array([[0.5]])}}
    one = other = params
    state, their_state = ours.init(params), theirs.init(params)
    for step in range(5):
        grads = jax.tree.map(lambda p, s=step: jnp.sin(p * (s + 1)) * 3, params)
        directions, state = ours.update(grads, state, one)
        one = jax.tree.map(lambda p, d: p - 0.1 * d, one, directions)
        updates, their_state = theirs.update(grads, their_state, other)
        other = optax.apply_updates(other, updates)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), one, other)


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_steps_are_those_of_pytorch(name):
    torch = pytest.importorskip("torch")
    start, steps = np.array([1.0, -2.0, 0.5], np.float32), 4
    weights = torch.tensor(start, requires_grad=True)
    more = {"momentum": 0.9} if name == "sgd" else {}
    theirs = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[name]([weights], 0.1, weight_decay=0.2, **more)
    ours = optim.transform(settings(optimizer=name, weight_decay=0.2, clip_norm=1e9))
    params, state = jnp.asarray(start), ours.init(jnp.asarray(start))
    for _ in range(steps):
        theirs.zero_grad()
        (weights**2).sum().sin().backward()
        theirs.step()
        directions, state = ours.update(jax.grad(lambda p: jnp.sin(jnp.sum(p**2)))(params), state, params)
        params -= 0.1 * directions
    np.testing.assert_allclose(params, weights.detach().numpy(), rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "step"}, r"train\.schedule is 'step'; choose one of cosine, constant"),
        ({"optimizer": "lion"}, r"train\.optimizer is 'lion'; choose one of adamw, adam, sgd"),
    ],
)
def test_unknown_names_are_named(changes, message):
    with pytest.raises(AvjaxError, match=message):
        settings(**changes)
