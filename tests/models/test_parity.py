"""The outputs of published systems, number by number: every file of the parity folder, compiled and not.

`AVJAX_PARITY_DIR` names another folder of the same form (`parity/README.md`); the default is the copy beside the tests.
"""

import functools
import importlib
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys
from types import ModuleType
from typing import NamedTuple

import jax
import numpy as np
import pytest

HOME = pathlib.Path(__file__).resolve().parents[1]
FOLDER = pathlib.Path(os.environ.get("AVJAX_PARITY_DIR", HOME / "parity"))
PLAIN = ("conformer_block", "lmf", "msaf", "tfn")
# Most of what these are made of is in mult and in avtca_repo_it.
ALIKE = ("auxformer", "mmer_it", "mmer_lt")
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))


class Case(NamedTuple):
    """One parity file: our module with the reference's weights and inputs, and the reference's outputs."""

    reference: ModuleType
    hyper: dict
    state: dict
    arguments: tuple
    expected: dict


def drawn(meta: dict, group: str, prefix: str) -> dict[str, np.ndarray]:
    """The arrays that the folder's recipe makes for the entries of a group, "params" or "inputs"."""
    spec = importlib.util.spec_from_file_location("parity_recipe", FOLDER / "recipe.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    return {n: recipe.value(meta["seed"], prefix + n, shape, kind) for n, shape, kind in meta[group]}


@functools.cache
def case(name: str) -> Case:
    meta = json.loads((FOLDER / f"{name}.json").read_text())
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        arrays = dict(file)
    buffers = {n: arrays.pop(n) for n in list(arrays) if n.startswith("buffer/")}
    reference = importlib.import_module(f"tests.references.{name}")
    arguments = reference.batch(drawn(meta, "inputs", "in/"), meta["hyper"])
    arguments = arguments if isinstance(arguments, tuple) else (arguments,)
    return Case(reference, meta["hyper"], drawn(meta, "params", "param/") | buffers, arguments, arrays)


def variables(one: Case) -> dict:
    statistics = getattr(one.reference, "statistics", None)
    fixed = {"batch_stats": statistics(one.state, one.hyper)} if statistics else {}
    return {"params": one.reference.convert(one.state, one.hyper), **fixed}


def test_the_folder_holds_parity_files():
    assert NAMES, f"no parity files in {FOLDER}; expected NAME.json, NAME.npz and recipe.py (AVJAX_PARITY_DIR)"


# Without compilation the larger ones take ten times as long.
@pytest.mark.parametrize(
    ("name", "way"),
    [pytest.param(name, "jit", marks=[pytest.mark.thorough] * (name in ALIKE)) for name in NAMES]
    + [pytest.param(name, "plain", marks=[pytest.mark.slow] * (name not in PLAIN)) for name in NAMES],
)
def test_answers_are_those_of_the_reference(name, way):
    one = case(name)
    module = one.reference.module(one.hyper)
    apply = jax.jit(module.apply) if way == "jit" else module.apply
    ours = one.reference.answers(apply(variables(one), *one.arguments))
    assert set(one.expected) <= set(ours)
    for key, theirs in one.expected.items():
        worst = np.abs(np.asarray(ours[key]) - theirs).max()
        assert worst <= 1e-4 * theirs.std(), f"{key}: {worst / theirs.std():.2g} of the standard deviation"


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_of_the_reference_is_used_or_named(name):
    """A tensor that moves nothing in our parameters was forgotten, unless it is named with a reason."""
    one = case(name)
    moved = [
        n for n in one.state
        if n not in one.reference.IGNORED and not _moves(one, n)
    ]  # fmt: skip
    assert not moved


def _moves(one: Case, tensor: str) -> bool:
    changed = one._replace(state=one.state | {tensor: one.state[tensor] + 1})
    same = jax.tree.map(np.array_equal, variables(one), variables(changed))
    return not all(jax.tree.leaves(same))


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_those_of_the_module(name):
    """Converted weights have the names and shapes that our module makes itself, so nothing is left at its start."""
    one = case(name)
    module = one.reference.module(one.hyper)
    made = jax.eval_shape(module.init, jax.random.key(0), *one.arguments)
    assert jax.tree.map(np.shape, made) == jax.tree.map(np.shape, variables(one))


@pytest.mark.slow
def test_another_folder_of_the_same_recipe_passes(tmp_path):
    """Other weights, inputs and numbers of clips, computed by the PyTorch restatements that match this folder."""
    torch = pytest.importorskip("torch", reason="the reference is in PyTorch (extra parity)")
    shutil.copy(FOLDER / "recipe.py", tmp_path)
    for name in NAMES:
        meta = json.loads((FOLDER / f"{name}.json").read_text())
        meta["seed"] += 1000
        if len({shape[0] for _, shape, _ in meta["inputs"]}) == 1:
            meta["inputs"] = [(n, [shape[0] + 2, *shape[1:]], kind) for n, shape, kind in meta["inputs"]]
        one = case(name)
        state, inputs = (drawn(meta, group, prefix) for group, prefix in (("params", "param/"), ("inputs", "in/")))
        buffers = {n: np.flip(v, -1).copy() for n, v in one.state.items() if n.startswith("buffer/")}
        tensors = [{n: torch.tensor(v) for n, v in arrays.items()} for arrays in (state | buffers, inputs)]
        with torch.no_grad():
            expected = one.reference.reference(*tensors, meta["hyper"])
        (tmp_path / f"{name}.json").write_text(json.dumps(meta))
        np.savez(tmp_path / f"{name}.npz", **{n: v.numpy() for n, v in expected.items()}, **buffers)
    env = os.environ | {"AVJAX_PARITY_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-v", __file__, "-k", "not another", "-m", "slow or not slow"]
    done = subprocess.run(command, env=env, cwd=HOME.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert f"{1 + 4 * len(NAMES)} passed" in done.stdout
