"""Our modules against the PyTorch re-statements on weights and inputs of their own: answers and gradients."""

import importlib
import json
import os
import pathlib
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

REASON = "the reference is in PyTorch (extra parity)"
FOLDER = pathlib.Path(os.environ.get("AVJAX_PARITY_DIR", pathlib.Path(__file__).parents[1] / "parity"))


def case(name: str, seed: int, clips: int):
    """The reference's module and settings, and a state and inputs drawn anew in the shapes of the parity file."""
    path = FOLDER / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"{path} is not there (set AVJAX_PARITY_DIR to the folder of the parity files)")
    meta = json.loads(path.read_text())
    state = {n: _draw(seed, n, shape, kind) for n, shape, kind in meta["params"]}
    inputs = {n: _draw(seed, n, (clips, *shape[1:]), kind) for n, shape, kind in meta["inputs"]}
    return importlib.import_module(f"tests.references.{name}"), meta["hyper"], state, inputs


def _draw(seed: int, name: str, shape, kind: str) -> np.ndarray:
    x = np.random.default_rng([seed, zlib.crc32(name.encode())]).normal(size=shape)
    if kind == "matrix":
        x /= np.sqrt(np.prod(shape[1:]))
    return np.float32(np.exp(0.1 * x) if kind in ("scale", "variance") else 0.1 * x if kind == "offset" else x)


def assert_answers(name: str) -> None:
    """Answers agree on other weights and another number of clips."""
    torch = pytest.importorskip("torch", reason=REASON)
    reference, hyper, state, inputs = case(name, 1, 5)
    tensors = [{k: torch.tensor(v) for k, v in arrays.items()} for arrays in (state, inputs)]
    want = reference.reference(*tensors, hyper)
    output = jax.jit(reference.module(hyper).apply)(
        {"params": reference.convert(state, hyper)}, reference.batch(inputs, hyper)
    )
    _assert_close(reference.answers(output), {k: v.numpy() for k, v in want.items()}, 1e-4)


def assert_gradients(name: str) -> None:
    """Gradients of a sum of all answers with changing weights agree, by every parameter and input."""
    torch = pytest.importorskip("torch", reason=REASON)
    reference, hyper, state, inputs = case(name, 2, 2)
    tensors = [{k: torch.tensor(v, requires_grad=True) for k, v in arrays.items()} for arrays in (state, inputs)]
    answers = reference.reference(*tensors, hyper)
    sum((torch.arange(v.numel()).cos().reshape(v.shape) * v).sum() for v in answers.values()).backward()
    by_state, by_input = (
        {k: np.zeros(v.shape, np.float32) if v.grad is None else v.grad.numpy() for k, v in group.items()}
        for group in tensors
    )
    # Two biases of PyTorch's LSTM are one of ours, which their conversion adds.
    by_state |= {k: np.zeros_like(v) for k, v in by_state.items() if "bias_hh" in k}

    def total(params, inputs):
        output = reference.module(hyper).apply({"params": params}, reference.batch(inputs, hyper))
        answers = reference.answers(output)
        return sum((jnp.cos(jnp.arange(v.size)).reshape(v.shape) * v).sum() for v in answers.values())

    ours = jax.jit(jax.grad(total, (0, 1)))(reference.convert(state, hyper), inputs)
    _assert_close(ours, (reference.convert(by_state, hyper), by_input), 1e-3)


def _assert_close(ours, theirs, tolerance: float) -> None:
    for path, want in jax.tree_util.tree_leaves_with_path(theirs):
        got = ours
        for key in path:
            got = got[getattr(key, "key", getattr(key, "idx", None))]
        scale = np.sqrt(np.mean(np.square(want))) + 1e-3
        np.testing.assert_allclose(got / scale, want / scale, atol=tolerance, err_msg=jax.tree_util.keystr(path))
