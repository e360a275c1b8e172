"""Strict numbers and quiet, deterministic JAX for every test."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import pathlib
import signal

import jax
import pytest

from tests import budget

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "standard")

# Background jobs of a shell ignore interrupts, and so would the programs that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

REAL = pathlib.Path(os.environ.get("AVJAX_TEST_DATA", pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"))


def pytest_configure(config: pytest.Config) -> None:
    """Adds the plugin of budgets and keeps compiled programs between runs, also those of the commands that tests start.

    `-p no:budget` and `-p no:cacheprovider` do without; `--cache-clear` forgets them; `JAX_COMPILATION_CACHE_DIR` wins.
    """
    config.pluginmanager.register(budget, "budget")
    if config.pluginmanager.hasplugin("cacheprovider") and not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        _keep_programs(config.cache.mkdir("xla"))


def _keep_programs(folder: pathlib.Path) -> None:
    os.environ |= {"JAX_COMPILATION_CACHE_DIR": str(folder), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Compiles the programs of quick tests, and of their commands, without optimisation: in half the time.

    Thorough and slow tests run them as users do.
    """
    quick = not any(item.get_closest_marker(tier) for tier in ("thorough", "slow"))
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(quick))
    jax.config.update("jax_disable_most_optimizations", quick)


@pytest.fixture(scope="session")
def java_sed() -> pathlib.Path:
    """Returns the folder of 96 real clips; skips tests if it is not available."""
    root = REAL / "java_sed_open"
    if not (root / "labels.csv").is_file():
        pytest.skip(f"real clips are not at {root} (set AVJAX_TEST_DATA to their parent folder)")
    return root


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Clears compiled programs after each test file: a process cannot hold those of all files."""
    yield
    jax.clear_caches()
