"""Configurations: one Python file per experiment, `file.py:variant,variant` applied left to right.

A configuration file defines `get_config(variants: str = "") -> ConfigDict`. It is found relative to the working
directory, else among the files that avjax ships.
"""

import difflib
import functools
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from absl import flags
from ml_collections import ConfigDict, config_flags

from avjax.errors import AvjaxError
from avjax.utils import paths


def with_variants(config: ConfigDict, names: str, table: Mapping[str, Mapping[str, object]]) -> ConfigDict:
    """Applies the comma-separated variants `names` to `config`, left to right; later ones win.

    Args:
      table: variant → {dotted key: value}.
    Raises:
      AvjaxError: a variant is unknown; the message names the nearest.
    """
    for name in filter(None, names.split(",")):
        if name not in table:
            raise AvjaxError(f"no variant {name!r} in this configuration{_nearest(name, table)}")
        config.update_from_flattened_dict(dict(table[name]))
        config.variants = f"{config.variants},{name}".strip(",")
    return config


def load(spec: str, **overrides: object) -> ConfigDict:
    """Loads `file.py` or `file.py:variants` without flags; `overrides` are dotted keys with `__` for the dots.

    Raises:
      AvjaxError: no such file, variant or key, or the file is no configuration.
    """
    file, _, variants = spec.partition(":")
    source = module(file)
    if not hasattr(source, "get_config"):
        raise AvjaxError(f"{file}: no configuration; expected a function get_config(variants) in it")
    config = source.get_config(variants)
    for key, value in overrides.items():
        dotted = key.replace("__", ".")
        if dotted not in keys(config):
            raise AvjaxError(f"no key {dotted!r} in {file}{_nearest(dotted, keys(config))}")
        config.update_from_flattened_dict({dotted: value})
    return config


def module(file: str) -> ModuleType:
    """Executes a configuration file and gives its names, so that one configuration can build on another."""
    spec = importlib.util.spec_from_file_location("avjax_config", find(file))
    out = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(out)
    return out


def find(file: str) -> Path:
    """The path of a configuration file: as given, else the shipped one of that name.

    Raises:
      AvjaxError: there is neither; the message names the nearest shipped one.
    """
    if Path(file).is_file():
        return Path(file)
    shipped = [name for name in paths.names("configs") if name.endswith(".py")]
    if file not in shipped:
        raise AvjaxError(f"{file}: no such configuration file{_nearest(file, shipped)}")
    return paths.path(file)


def keys(config: ConfigDict, prefix: str = "") -> list[str]:
    """All dotted keys that hold a value, in the order of the configuration."""
    out = []
    for key, value in config.items():
        out += keys(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else [prefix + key]
    return out


@functools.cache
def define_flag() -> flags.FlagHolder:
    """Defines the `--config` flag of an entry point; one flag for all that are imported into a process."""
    holder = config_flags.DEFINE_config_file(
        "config", None, "Configuration, `file.py` or `file.py:variant,variant`; `--config.a.b=value` changes a key."
    )
    return holder


def require_flag() -> flags.FlagHolder:
    """`define_flag` for entry points that do nothing without a configuration."""
    holder = define_flag()
    flags.mark_flag_as_required("config")
    return holder


def with_variant(holder: flags.FlagHolder, name: str) -> ConfigDict:
    """The configuration of the command line with one more variant, and every `--config.key=value` after it."""
    spec = config_flags.get_config_filename(flags.FLAGS[holder.name])
    config = load(f"{spec}{',' if ':' in spec else ':'}{name}")
    config.update_from_flattened_dict(config_flags.get_override_values(flags.FLAGS[holder.name]))
    return config


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the command line, for `app.run(flags_parser=...)`.

    Raises:
      AvjaxError: the configuration file, a variant, a key or a flag does not exist (the message names the nearest), or
        a value is not of the kind expected.
    """
    argv = [argv[0], *_with_found_file(argv[1:])]
    try:
        return flags.FLAGS(argv, known_only=False)
    except (AttributeError, KeyError) as error:
        raise AvjaxError(_unknown_key(argv)) from error
    except flags.Error as error:
        raise AvjaxError(f"{' '.join(str(error).split())} (see --help)") from error
    except SystemExit as ended:
        # absl ends --help as if it were a failure.
        raise SystemExit(0) from ended


def _with_found_file(args: list[str]) -> list[str]:
    """Puts the path where the configuration file really is into the command line, as `--config=path:variants`."""
    out = list(args)
    for i, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        spec = value if equals else "".join(args[i + 1 : i + 2])
        if name in ("--config", "-config") and spec:
            file, colon, variants = spec.partition(":")
            out[i : i + 1 + (not equals)] = [f"--config={find(file)}{colon}{variants}"]
    return out


def _unknown_key(argv: list[str]) -> str:
    """Which `--config.key` is not in the configuration, and the nearest that is."""
    spec = next((a.removeprefix("--config=") for a in argv if a.startswith("--config=")), "")
    valid = keys(load(spec))
    for arg in argv[1:]:
        key = arg.partition("=")[0].lstrip("-").removeprefix("config.")
        if arg.lstrip("-").startswith("config.") and key not in valid:
            return f"no key {key!r} in {spec}{_nearest(key, valid)}"
    return f"a --config.key in {argv[1:]} does not fit {spec}; valid keys: {', '.join(valid)}"


def _nearest(name: str, valid) -> str:
    valid = list(valid)
    # Matching on the last part too, so that `data.root` is found for `root`.
    close = difflib.get_close_matches(name, valid, 1, 0.5) or [
        v for v in valid if difflib.SequenceMatcher(None, v.rsplit(".", 1)[-1], name.rsplit(".", 1)[-1]).ratio() > 0.7
    ]
    return f"; did you mean {close[0]!r}? (all: {', '.join(valid)})" if close else f"; valid ones: {', '.join(valid)}"
