"""Public names have an example in their docstring, and every example runs."""

import doctest
import importlib
import inspect
import pathlib

import pytest

import avjax
from avjax import encoders, models, tasks
from avjax.layers import masking
from avjax.tasks import metrics

ROOT = pathlib.Path(avjax.__file__).parent
MODULES = sorted(
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in ROOT.rglob("*.py")
    if ">>> " in path.read_text() and path.parent != ROOT  # avjax.load: tests/inference/test_bundle.py
)
PUBLIC = {
    f"{room.__name__}.{name}": value
    for room, names in (
        (avjax, avjax.__all__),
        (encoders, encoders.__all__),
        (models, vars(models)),
        (tasks, vars(tasks)),
        (metrics, vars(metrics)),
        (masking, vars(masking)),
    )
    for name in names
    if inspect.isfunction(value := getattr(room, name)) and value.__module__.startswith(room.__name__)
    if not name.startswith("_")
}


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_function_has_an_example(name):
    assert ">>> " in (PUBLIC[name].__doc__ or ""), name


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    results = doctest.testmod(importlib.import_module(name))
    assert results.attempted
    assert not results.failed
