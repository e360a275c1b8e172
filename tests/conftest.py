"""Strict numbers and quiet, deterministic JAX for every test."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import pathlib
import signal

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "standard")

# A shell's job behind & ignores interrupts, and hands that down to the programs that are interrupted here.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

REAL = pathlib.Path(os.environ.get("AVJAX_TEST_DATA", pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def java_sed() -> pathlib.Path:
    """The folder of 96 real clips; tests that need it skip where it is not at hand."""
    root = REAL / "java_sed_open"
    if not (root / "labels.csv").is_file():
        pytest.skip(f"real clips are not at {root} (set AVJAX_TEST_DATA to their parent folder)")
    return root


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """A process cannot hold the compiled programs of all test files: each file's go with it."""
    yield
    jax.clear_caches()
