"""Common parts of all entry points: flags, one-line errors, signals, and the compile cache."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn

from absl import app, flags, logging

from avjax import config
from avjax.errors import AvjaxError, Stopped
from avjax.settings import FusionSettings
from avjax.utils import paths

# Silences native libraries that write to standard error by default; explicit settings of the user win.
_QUIET = {"GLOG_minloglevel": "2", "TF_CPP_MIN_LOG_LEVEL": "2", "TOKENIZERS_PARALLELISM": "false"}

_interrupted, _stop_requested = threading.Event(), threading.Event()


def run(main: Callable[[list[str]], int | None], *, takes: str = "", needed: bool = True) -> None:
    """Runs an entry point: a user's mistake is one line on standard error and exit status 2.

    Args:
      main: function of the program's name and the positional arguments; returns the exit status or None.
      takes: description of the positional arguments; "" if there are none.
      needed: whether at least one is required.
    """
    for key, value in _QUIET.items():
        os.environ.setdefault(key, value)
    # Characters that the terminal's encoding lacks are shown escaped.
    sys.stdout.reconfigure(errors="backslashreplace")
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # unless the shell has set it to be ignored
        signal.signal(signal.SIGINT, _interrupt)

    def begin(argv: list[str]) -> int | None:
        if "keys" in flags.FLAGS and flags.FLAGS.keys:
            return _print_keys()
        if takes and needed and len(argv) < 2:
            raise AvjaxError(f"nothing to do; expected {takes}, see --help")
        if not takes and len(argv) > 1:
            raise AvjaxError(f"unexpected arguments: {' '.join(argv[1:])}; flags start with --, see --help")
        # TFDS and Orbax log every step they take through absl.
        logging.set_verbosity(logging.ERROR)
        return main(argv)

    for name in ("config", "keys"):  # for --help, which lists only the flags of the started module
        if name in flags.FLAGS:
            flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])
    try:
        app.run(begin, flags_parser=config.parse_flags)
    except AvjaxError as error:
        print(f"error: {error}", file=sys.stderr)
        _leave(str(error), 2)
    except Stopped as where:
        print(
            f"stopped on request; the state after {where} is saved, and the same command continues from it",
            file=sys.stderr,
        )
        sys.exit(128 + signal.SIGTERM)
    except KeyboardInterrupt:
        print("interrupted; the same command continues from this state", file=sys.stderr)
        sys.exit(130)


def _print_keys() -> None:
    if flags.FLAGS.config is None:
        raise AvjaxError("--keys lists the keys of a configuration; expected --config FILE beside it")
    settings, meanings = config.typed(flags.FLAGS.config), {}
    if isinstance(model := getattr(settings, "model", None), FusionSettings):
        from avjax import models  # imported late: it imports JAX

        models.check(model)
        meanings = models.meanings(model.name)
    print(config.key_table(settings, meanings))


def _interrupt(*_: object) -> None:
    _interrupted.set()
    raise KeyboardInterrupt


def _leave(reason: str, status: int) -> NoReturn:
    """Ends this process, and reports it to the others of a run so that they do not wait for it."""
    from avjax.utils import multihost

    if multihost.leave(reason):
        sys.stderr.flush()
        os._exit(status)  # the usual exit waits for the others, which wait for this process
    sys.exit(status)


@contextlib.contextmanager
def keeping_on_sigterm() -> Iterator[None]:
    """Turns SIGTERM, which schedulers send before they take a machine away, into a request: see `stop_requested`."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: _stop_requested.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def stop_requested() -> bool:
    """Returns whether SIGTERM was received within `keeping_on_sigterm`."""
    return _stop_requested.is_set()


def heed_interrupts() -> None:
    """Raises a lost KeyboardInterrupt: Python drops one that is raised within a callback of a library."""
    if _interrupted.is_set():
        raise KeyboardInterrupt


def use_compile_cache() -> None:
    """Caches compiled programs in `JAX_COMPILATION_CACHE_DIR`, by default in the cache folder."""
    import jax

    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(paths.cache() / "compiled"))
        # Small programs too: reports, checkpoints and eager operations consist of them.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
