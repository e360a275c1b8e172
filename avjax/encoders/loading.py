"""Loading of encoders: finds their files by a registered name or in a folder, and builds the `Encoder`."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from avjax.encoders import (
    base,
    bert,
    clip,
    efficientnet,
    formats,
    perceiver,
    random_weights,
    vit,
    wav2vec2,
    weights,
    whisper,
)
from avjax.encoders.encoder import Encoder
from avjax.errors import AvjaxError, choose
from avjax.utils.storage import read_json, sha256

# model_type of the hub's config.json → family
FAMILIES = {
    "bert": bert,
    "distilbert": bert,
    "vit": vit,
    "dinov2": vit,
    "wav2vec2": wav2vec2,
    "data2vec-audio": wav2vec2,
    "whisper": whisper,
    "clip_vision_model": clip.VISION,
    "clip_text_model": clip.TEXT,
    "efficientnet": efficientnet,
    "perceiver": perceiver,
}
POOLS = ("first", "mean", "projected")
# Names of the weights file in a folder, in order of preference; `formats` reads them.
_TENSORS = ("model.safetensors", "pytorch_model.bin", "model.onnx", "model.bin")


def load(
    source: str | os.PathLike,
    *,
    tower: str | None = None,
    layer: int | None = None,
    pool: str | None = None,
    dtype: jnp.dtype | str | None = None,
    random: bool = False,
) -> Encoder:
    """Loads a pretrained encoder.

    Args:
      source: a name of `weights.REGISTRY`, such as "minilm", or a folder in the hub's layout: config.json with
        `model_type`, model.safetensors (or pytorch_model.bin, which is read strictly), and for text tokenizer.json,
        vocab.txt, or vocab.json with merges.txt. A folder is trusted; the sha256 of its weights is recorded.
      tower: "vision" or "text", for a source that has both.
      layer: number of blocks to compute: the features are transformers' `hidden_states[layer]` instead of
        `last_hidden_state`.
      pool: "first", the first step (the class token); "mean", over the real steps; or "projected", the embedding in the
        joint space of a source with two towers. None: all steps.
      dtype: of the matrix products; by default bfloat16 on accelerators and float32 on CPU. Params stay float32.
      random: whether to draw random weights of the true shapes of a registered name; nothing is fetched.

    Raises:
      AvjaxError: the source is neither, no family supports it, it has no such tower or layer, or its tensors do not
        fit.

    Example:
      >>> encoder = load("minilm", random=True)
      >>> encoder.config.width
      384
    """
    choose("pool", pool, (None, *POOLS))
    files = _registered(source) if random else _find(source)
    files = dataclasses.replace(files, config=select_tower(files.config, tower))
    family = FAMILIES[files.config["model_type"]]
    dtype = jnp.dtype(dtype or default_dtype())
    module = family.build(files.config, dtype, layer)
    base.block_count(layer, module.config.layers)
    more = {}
    if pool == "projected":
        module, more = _projected(module), {"projected": True}
    if random:
        params = random_weights.params(family.shapes(module.config, **more))
    else:
        params = family.convert(formats.read(files.tensors), module.config, **more)
    provenance = {
        "source": str(source) if source in weights.REGISTRY else files.tensors.parent.name,
        "sha256": random_weights.PROVENANCE if random else sha256(files.tensors),
        "model_type": files.config["model_type"],
        "layer": "last" if layer is None else str(layer),
        "pool": pool or "none",
        "dtype": dtype.name,
    }
    return Encoder(family, module, params, provenance, pool=pool, files=files)


def architecture(
    source: str, *, layer: int | None = None, dtype: jnp.dtype | str | None = None
) -> tuple[Any, Any, Mapping[str, Any]]:
    """Builds the module of an encoder without its weights, which for a registered name need not be available.

    `source`, `layer` and `dtype` are as for `load`.

    Returns:
      Its family, its Flax module, and the contents of its preprocessor_config.json.

    Raises:
      AvjaxError: as for `load`, except for the weights of a registered name.

    Example:
      >>> family, module, _ = architecture("minilm")
      >>> module.config.width
      384
    """
    files = _registered(source) if source in weights.REGISTRY else _find(source)
    family = FAMILIES[select_tower(files.config, None)["model_type"]]
    module = family.build(files.config, jnp.dtype(dtype or default_dtype()), layer)
    base.block_count(layer, module.config.layers)
    return family, module, files.settings


def default_dtype() -> str:
    """Returns the default dtype of matrix products: float32 on a CPU, bfloat16 elsewhere.

    Example:
      >>> default_dtype() in ("float32", "bfloat16")
      True
    """
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def _projected(module: Any) -> Any:
    """Returns the module with its output projected into its joint space."""
    if not hasattr(module, "projected"):
        raise AvjaxError(f"pool is 'projected', but a {type(module).__name__} has no joint space to project into")
    return module.clone(projected=True)


def select_tower(config: Mapping[str, Any], tower: str | None) -> Mapping[str, Any]:
    """Returns the configuration of one tower of a source that has two; returns other configurations unchanged.

    Raises:
      AvjaxError: there is no such tower.
    """
    if config["model_type"] == "clip":
        return clip.tower_config(config, tower)
    if tower is not None:
        raise AvjaxError(f"tower is {tower!r}, but a {config['model_type']} has none to choose from; leave it out")
    return config


def _registered(source: str | os.PathLike) -> base.Files:
    """Returns the configurations that the registry holds for a source, without its files."""
    written = weights.REGISTRY[source].written if source in weights.REGISTRY else {}
    if "config.json" not in written:
        names = ", ".join(sorted(name for name, entry in weights.REGISTRY.items() if "config.json" in entry.written))
        raise AvjaxError(f"{source}: random weights take an encoder whose shape is registered, one of {names}")
    return base.Files(written["config.json"], Path("model.safetensors"), written.get("preprocessor_config.json", {}))


def _find(source: str | os.PathLike) -> base.Files:
    """Finds the files of a source and reads its configurations."""
    if source in weights.REGISTRY:
        path, written = weights.fetch(source), weights.REGISTRY[source].written
        folder = path if path.is_dir() else path.parent
    elif Path(source).is_dir():
        folder, written = Path(source).resolve(), {}
    else:
        names = ", ".join(sorted(weights.REGISTRY))
        raise AvjaxError(f"{source}: neither a registered name ({names}) nor a folder with config.json and weights")
    config = written.get("config.json") or _json(folder / "config.json")
    if config is None:
        raise AvjaxError(f"{folder}: no config.json in it; expected an encoder's folder in the hub's layout")
    if config.get("model_type") not in (*FAMILIES, "clip"):
        kinds = ", ".join((*FAMILIES, "clip"))
        raise AvjaxError(f"{folder}/config.json: model_type is {config.get('model_type')!r}, expected one of {kinds}")
    settings = written.get("preprocessor_config.json") or _json(folder / "preprocessor_config.json") or {}
    return base.Files(config, _tensors(folder), settings)


def _tensors(folder: Path) -> Path:
    """Finds the weights file in an encoder's folder."""
    files = [folder / name for name in _TENSORS if (folder / name).is_file()]
    if not files:
        raise AvjaxError(f"{folder}: no weights in it; expected model.safetensors, or one of {', '.join(_TENSORS[1:])}")
    return files[0]


def _json(file: Path) -> dict[str, Any] | None:
    return read_json(file, "fetch it again") if file.is_file() else None
