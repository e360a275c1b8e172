"""Configurations: one Python file per experiment, `file.py:variant,variant` applied left to right.

A configuration file defines `get_config(variants: str = "") -> ConfigDict`. Its path is relative to the working
directory, else to the files that avjax ships.
"""

import functools
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from absl import flags
from ml_collections import ConfigDict, config_flags

from avjax.errors import AvjaxError, choose, nearest
from avjax.settings import ExtractSettings, Part, Settings, of_config
from avjax.utils import paths


def with_variants(config: ConfigDict, names: str, table: Mapping[str, Mapping[str, object]]) -> ConfigDict:
    """Applies variants to a configuration, left to right; later ones win.

    Args:
      config: modified.
      names: comma-separated variants.
      table: variant → {dotted key: value}.

    Raises:
      AvjaxError: a variant is unknown.
    """
    for name in filter(None, names.split(",")):
        choose(f"variant of {config.name}", name, table)
        config.update_from_flattened_dict(dict(table[name]))
        config.variants = f"{config.variants},{name}".strip(",")
    return config


def load(spec: str, **overrides: object) -> ConfigDict:
    """Loads `file.py` or `file.py:variants` without flags; `overrides` are dotted keys with `__` for each dot.

    Raises:
      AvjaxError: no such file, variant or key, or the file is not a configuration.
    """
    file, _, variants = spec.partition(":")
    source = module(file)
    if not hasattr(source, "get_config"):
        raise AvjaxError(f"{file}: no configuration; expected a function get_config(variants) in it")
    config = source.get_config(variants)
    for key, value in overrides.items():
        dotted = key.replace("__", ".")
        choose(f"key of {file}", dotted, keys(config))
        config.update_from_flattened_dict({dotted: value})
    return config


def module(file: str) -> ModuleType:
    """Imports a configuration file, so that one configuration can build on another."""
    spec = importlib.util.spec_from_file_location("avjax_config", find(file))
    out = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(out)
    return out


def find(file: str) -> Path:
    """Returns the path of a configuration file: as given, else the shipped file of that name.

    Raises:
      AvjaxError: neither exists.
    """
    if Path(file).is_file():
        return Path(file)
    shipped = [name for name in paths.names("configs") if name.endswith(".py")]
    if file not in shipped:
        raise AvjaxError(f"{file}: no such configuration file; avjax has {', '.join(shipped)}{nearest(file, shipped)}")
    return paths.path(file)


def keys(config: ConfigDict, prefix: str = "") -> list[str]:
    """Returns all dotted keys that hold a value, in the order of the configuration."""
    out = []
    for key, value in config.items():
        out += keys(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else [prefix + key]
    return out


def typed(config: ConfigDict, of: type[Part] | None = None) -> Settings | ExtractSettings:
    """Makes the typed and checked settings of a configuration.

    Args:
      config: the configuration.
      of: `Settings` or `ExtractSettings`, if a command accepts only one of them.

    Raises:
      AvjaxError: a value is invalid, or the configuration is for another command.
    """
    made = of_config(config.to_dict())
    if of and not isinstance(made, of):
        raise AvjaxError(
            f"{config.name} is a configuration of avjax.{made.command}; "
            f"avjax.{of.command} takes one such as {of.example}"
        )
    return made


def settings(spec: str, **overrides: object) -> Settings | ExtractSettings:
    """Makes the typed settings of `file.py:variants`; arguments and errors as `load` and `typed`."""
    return typed(load(spec, **overrides))


@functools.cache
def define_flag() -> flags.FlagHolder:
    """Defines `--config` and `--keys`, once for all entry points that a process imports."""
    flags.DEFINE_bool("keys", False, "Print every key of the configuration with its value and meaning, and end.")
    holder = config_flags.DEFINE_config_file(
        "config",
        None,
        "Configuration: a file, and after a colon variants, applied left to right: configs/etg_folder.py:open,concat. "
        "--config.KEY=VALUE changes a key: --config.train.epochs=3 --config.train.seeds=42,43; --keys lists them.",
    )
    return holder


def require_flag() -> flags.FlagHolder:
    """Defines the flags for entry points that require a configuration."""
    holder = define_flag()
    flags.mark_flag_as_required("config")
    return holder


def with_variant(holder: flags.FlagHolder, name: str) -> ConfigDict:
    """Loads the command line's configuration with one more variant, followed by every `--config.key=value`."""
    spec = config_flags.get_config_filename(flags.FLAGS[holder.name])
    config = load(f"{spec}{',' if ':' in spec else ':'}{name}")
    config.update_from_flattened_dict(config_flags.get_override_values(flags.FLAGS[holder.name]))
    return config


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the command line, for `app.run(flags_parser=...)`.

    Raises:
      AvjaxError: the configuration file, a variant, a key or a flag does not exist, or a value has the wrong
        type.
    """
    _check_spelling(argv[1:])
    argv = [argv[0], *_normal(argv[1:])]
    try:
        return flags.FLAGS(argv, known_only=False)
    except (AttributeError, KeyError) as error:
        raise AvjaxError(_unknown_key(argv)) from error
    except flags.Error as error:
        raise AvjaxError(f"{' '.join(str(error).split())} (see --help)") from error
    except SystemExit as ended:
        # absl exits with a failure status after --help.
        raise SystemExit(0) from ended


def _normal(args: list[str]) -> list[str]:
    """Normalises `--config`, with the path of its file, and its keys to `--name=value`; the last of each wins."""
    given: dict[str, str] = {}
    others = []
    rest = list(args)
    while rest:
        arg = rest.pop(0)
        name, equals, value = arg.lstrip("-").partition("=")
        if not _is_config(arg) or (not equals and (not rest or rest[0].startswith("--"))):
            others.append(arg)
        else:
            value = value if equals else rest.pop(0)
            given[name] = f"--{name}={_with_path(value) if name == 'config' else value}"
    # The file comes first: its keys become flags when it is read.
    return [*([given.pop("config")] if "config" in given else []), *given.values(), *others]


def _with_path(spec: str) -> str:
    file, colon, variants = spec.partition(":")
    return f"{find(file)}{colon}{variants}"


def _is_config(arg: str) -> bool:
    return arg.startswith("-") and arg.lstrip("-").partition("=")[0].partition(".")[0] == "config"


def key_table(settings: Settings | ExtractSettings, meanings: Mapping[str, str]) -> str:
    """Formats a table of every key with its value and meaning.

    Args:
      settings: the settings to list.
      meanings: name → meaning of the model's own settings.
    """
    rows = [
        (key, repr(value), meanings.get(key.removeprefix("model.settings."), meaning))
        for key, value, meaning in settings.rows()
    ]
    wide, values = max(len(key) for key, _, _ in rows), min(36, max(len(value) for _, value, _ in rows))
    return "\n".join(f"{key:<{wide}}  {value:<{values}}  {meaning}" for key, value, meaning in rows)


def _check_spelling(args: list[str]) -> None:
    """Raises an AvjaxError for a configuration without its flag, or a key without `config.` before it."""
    names = [arg.partition("=")[0].lstrip("-") for arg in args]
    files = [arg for arg, name in zip(args, names, strict=True) if name.partition(":")[0].endswith(".py")]
    if "config" in flags.FLAGS and "config" not in names and files and not files[0].startswith("-"):
        raise AvjaxError(f"{files[0]}: a configuration is given with --config {files[0]}")
    all_keys = {key for part in (Settings(), ExtractSettings()) for key, _, _ in part.rows()}
    for arg, name in zip(args, names, strict=True):
        if arg.startswith("-") and "." in name and name in all_keys:
            raise AvjaxError(f"--{name}: a key of the configuration is written --config.{name}")


def _unknown_key(argv: list[str]) -> str:
    """Returns a message on the `--config.key` that is not in the configuration."""
    spec = next((a.removeprefix("--config=") for a in argv if a.startswith("--config=")), "")
    valid = keys(load(spec))
    for arg in argv[1:]:
        key = arg.partition("=")[0].lstrip("-").removeprefix("config.")
        if arg.lstrip("-").startswith("config.") and key not in valid:
            return f"no key {key!r} in {spec}; --keys lists them{nearest(key, valid)}"
    return f"a --config.key in {argv[1:]} does not fit {spec}; valid keys: {', '.join(valid)}"
