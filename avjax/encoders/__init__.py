"""Pretrained encoders: one registry of families, and `load`, which gives a callable that compiles itself.

A family is a module with

    INPUTS                         how its inputs look (`base.Inputs`)
    build(config, dtype, layer)    → Flax module; its `.config` has `width`, `longest` and `steps(length)`
    convert(tensors, config)       → its params
    prepare(raw, settings)         → inputs and mask, as the original's processor makes them

and the Flax module maps (inputs, mask) → (features (b, s, d), mask (b, s)).
"""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

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
from avjax.errors import AvjaxError
from avjax.layers.masking import masked_mean
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
# Where weights are looked for in a folder, in this order; `formats` reads them.
_TENSORS = ("model.safetensors", "pytorch_model.bin", "model.onnx", "model.bin")


def load(
    source: str | os.PathLike,
    *,
    tower: str | None = None,
    layer: int | None = None,
    pool: str | None = None,
    dtype: jnp.dtype | str | None = None,
    weights_dir: str | os.PathLike | None = None,
    random: bool = False,
) -> "Encoder":
    """Loads a pretrained encoder.

    Args:
      source: a name of `weights.REGISTRY`, such as "minilm", or a folder in the hub's layout: config.json with
        `model_type`, model.safetensors (or pytorch_model.bin, which is read strictly), and tokenizer.json for text. A
        folder is trusted; its sha256 is recorded.
      tower: "vision" or "text", of a source that has both.
      layer: the features after so many blocks, transformers' `hidden_states[layer]`, instead of `last_hidden_state`;
        blocks above it are not computed.
      pool: "first", the first step (the class token), "mean" over the real steps, or "projected", the embedding in the
        joint space of a source with two towers; None = all steps.
      dtype: of the matrix products; by default bfloat16 on accelerators and float32 on CPU. Params stay float32.
      weights_dir: see `weights.fetch`.
      random: weights drawn at random, of the true shape, of a registered name; nothing is fetched (`untrained`).
    Raises:
      AvjaxError: the source is neither, no family computes it, it has no such tower or layer, or its tensors do not
        fit.
    """
    if pool not in (None, *POOLS):
        raise AvjaxError(f"pool is {pool!r}, expected one of {', '.join(POOLS)}, or None for all steps")
    files = _stated(source) if random else _found(source, weights_dir)
    files = dataclasses.replace(files, config=_of_tower(files.config, tower))
    family = FAMILIES[files.config["model_type"]]
    dtype = jnp.dtype(dtype or default_dtype())
    module = family.build(files.config, dtype, layer)
    base.known_layer(layer, module.config.layers)
    more = {}
    if pool == "projected":
        module, more = _projected(module), {"projected": True}
    if random:
        params = random_weights.params(family.shapes(module.config, **more))
    else:
        params = family.convert(formats.read(files.tensors), module.config, **more)
    provenance = {
        "source": str(source) if source in weights.REGISTRY else files.tensors.parent.name,
        "sha256": random_weights.STATED if random else sha256(files.tensors),
        "model_type": files.config["model_type"],
        "layer": "last" if layer is None else str(layer),
        "pool": pool or "none",
        "dtype": dtype.name,
    }
    return Encoder(family, module, params, provenance, pool=pool, files=files)


def architecture(
    source: str, *, layer: int | None = None, dtype: jnp.dtype | str | None = None
) -> tuple[Any, Any, Mapping[str, Any]]:
    """What computes an encoder, without its weights: those of a registered name need not be at hand.

    Args:
      source, layer, dtype: as for `load`.
    Returns:
      its family, its Flax module, and the contents of its preprocessor_config.json.
    Raises:
      AvjaxError: as `load`, of anything but the weights of a registered name.
    """
    files = _stated(source) if source in weights.REGISTRY else _found(source, None)
    family = FAMILIES[_of_tower(files.config, None)["model_type"]]
    module = family.build(files.config, jnp.dtype(dtype or default_dtype()), layer)
    base.known_layer(layer, module.config.layers)
    return family, module, files.settings


def default_dtype() -> str:
    """What matrix products are computed in, unless asked otherwise."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


class Encoder:
    """A pretrained network with its preprocessing; `load` makes it.

    Attributes:
      module, params: the Flax module and its params, on the device, which a model may train further; `pool` is not
        part of it.
      config: the architecture, of the family's own class.
      settings: of preprocessing, the contents of preprocessor_config.json.
      width: of the features.
      longest: the longest input, None where there is no limit.
      random: whether its weights were drawn at random.
      provenance: source, sha256, model_type, layer, pool and dtype, as strings: what the features depend on.
    """

    def __init__(
        self,
        family: Any,
        module: Any,
        params: Mapping,
        provenance: dict[str, str],
        *,
        pool: str | None = None,
        files: "base.Files | None" = None,
    ):
        self.module, self.config = module, module.config
        self.width = module.config.joint if pool == "projected" else module.config.width
        self.longest = module.config.longest
        self.provenance = provenance
        self.random = provenance.get("sha256") == random_weights.STATED
        self._family = family
        self._steps = module.config.steps
        self._pool = pool
        self._files = files or base.Files({}, Path("model.safetensors"))
        self.settings = self._files.settings
        devices = jax.local_devices()
        mesh = jax.make_mesh((len(devices),), ("batch",), axis_types=(AxisType.Auto,), devices=devices)
        self._devices = len(devices)
        self._shard = NamedSharding(mesh, PartitionSpec("batch"))
        self.params = jax.device_put(_needed(module, params), NamedSharding(mesh, PartitionSpec()))

        @jax.jit
        def run(params: Mapping, inputs: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
            features, real = module.apply({"params": params}, inputs, mask)
            features = jnp.where(real[..., None], features, 0).astype(jnp.float32)
            return pooled(features, real, pool)

        self._run = run

    def __call__(
        self, inputs: np.ndarray | jax.Array, mask: np.ndarray | jax.Array | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Encodes a batch. What lies under a False mask, and who else is in the batch, does not change the answer.

        Batch and length are padded to a power of two or to three quarters of it, so that there are few compilations
        however sizes vary; all local devices share the batch.

        Args:
          inputs: token ids (b, l), waveforms (b, samples) at 16 kHz, images (b, h, w, 3) or log-mel (b, bins, frames),
            as `prepare` gives them.
          mask: (b, length) bool, True = real; (b,) for images; default all True.
        Returns:
          features (b, s, d) float32, zeros under a False mask, and their mask (b, s); with `pool`, (b, d) and (b,).
        Raises:
          AvjaxError: the shapes are not those of this encoder, or the input is longer than `longest`.
        """
        inputs = np.asarray(inputs)
        batch, axis = len(inputs), self._family.INPUTS.length_axis
        rows = _bucket(-(-batch // self._devices)) * self._devices
        wide = [np.pad(x, [(0, rows - batch)] + [(0, 0)] * (x.ndim - 1)) for x in self.padded(inputs, mask)]
        features, real = self.on_device(*jax.device_put(wide, self._shard))
        features, real = np.asarray(features)[:batch], np.asarray(real)[:batch]
        if self._pool or axis is None:
            return features, real
        steps = self._steps(inputs.shape[axis])
        return features[:, :steps], real[:, :steps]

    def on_device(self, inputs: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What a call computes, of inputs that lie on the device, left there; compiled for each new shape."""
        return self._run(self.params, inputs, mask)

    def padded(self, inputs: np.ndarray, mask: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and mask with their length padded to its bucket; arguments and errors as in a call."""
        mask, axis = self._family.INPUTS.masked(inputs, mask), self._family.INPUTS.length_axis
        if axis is None:
            return inputs, mask
        length = inputs.shape[axis]
        room = _bucket(length, self._family.INPUTS.least)
        # A bucket longer than the encoder takes is cut to that; a longer input is the encoder's to refuse.
        spare = max(length, min(room, self.longest or room)) - length
        padding = [(0, spare if a == axis else 0) for a in range(inputs.ndim)]
        return np.pad(inputs, padding), np.pad(mask, [(0, 0), (0, spare)])

    def prepare(self, raw: Any) -> tuple[np.ndarray, np.ndarray]:
        """What this encoder takes, made as the original's processor makes it: inputs and mask.

        Args:
          raw: texts; or waveforms at 16 kHz, a sequence of (samples,) float32; or pictures, uint8 (n, h, w, 3) or a
            sequence of (h, w, 3).
        """
        if self._family.INPUTS.text:
            return self.tokenize(raw)
        return self._family.prepare(raw, self.settings)

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The `tokenizers.Tokenizer` of tokenizer.json: the ids of transformers' fast tokenizers without their import.

        Raises:
          AvjaxError: the folder has none.
        """
        if self.random:
            return random_weights.tokenizer(self.provenance["model_type"])
        file = self._files.tensors.with_name("tokenizer.json")
        if not file.is_file():
            raise AvjaxError(f"{file}: no such file; put the tokenizer of this encoder there")
        import tokenizers

        return tokenizers.Tokenizer.from_file(str(file))

    def tokenize(self, texts: Sequence[str], max_length: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Texts → ids (b, l) int32 and mask (b, l) bool, l being the longest text's.

        Args:
          texts: b strings.
          max_length: longer texts are cut to this many ids, special ones included; default `longest`.
        Raises:
          AvjaxError: `max_length` leaves no room for text, or exceeds `longest`.
        """
        limit = self.longest if max_length is None else max_length
        special = self.tokenizer.num_special_tokens_to_add(False)
        if not special < limit <= self.longest:
            raise AvjaxError(f"max_length is {limit}, expected {special + 1} to {self.longest}")
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(limit)
        rows = [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts))]
        lengths = np.array([len(row) for row in rows], int)
        mask = np.arange(lengths.max(initial=0))[None] < lengths[:, None]
        ids = np.full(mask.shape, self._files.config.get("pad_token_id") or 0, np.int32)
        ids[mask] = np.concatenate([np.empty(0, np.int32), *rows])
        return ids, mask


def pooled(features: jax.Array, mask: jax.Array, pool: str | None) -> tuple[jax.Array, jax.Array]:
    """Features (b, s, d) and mask (b, s), or what `pool` (see `load`) makes of them, (b, d) and (b,)."""
    if pool in ("first", "projected"):
        return features[:, 0], mask[:, 0]
    if pool == "mean":
        return masked_mean(features, mask), mask.any(1)
    return features, mask


def _needed(module: Any, params: Mapping) -> Mapping:
    """Without the blocks above the layer that is asked for."""
    if module.layer is None:
        return params
    return {k: v for k, v in params.items() if not k.startswith("block_") or int(k[6:]) < module.layer}


def _bucket(size: int, least: int = 1) -> int:
    """The next power of two, or three quarters of it where that is enough."""
    power = 1 << max(0, size - 1).bit_length()
    return max(least, power * 3 // 4 if size <= power * 3 // 4 else power)


def _projected(module: Any) -> Any:
    """The module that gives embeddings in its joint space."""
    if not hasattr(module, "projected"):
        raise AvjaxError(f"pool is 'projected', but a {type(module).__name__} has no joint space to project into")
    return module.clone(projected=True)


def _of_tower(config: Mapping[str, Any], tower: str | None) -> Mapping[str, Any]:
    """Of the configuration of a source with two towers that of the one asked for; another as it is."""
    if config["model_type"] == "clip":
        return clip.tower_config(config, tower)
    if tower is not None:
        raise AvjaxError(f"tower is {tower!r}, but a {config['model_type']} has none to choose from; leave it out")
    return config


def _stated(source: str | os.PathLike) -> base.Files:
    """What the registry says of a source, without its files."""
    written = weights.REGISTRY[source].written if source in weights.REGISTRY else {}
    if "config.json" not in written:
        known = ", ".join(sorted(name for name, entry in weights.REGISTRY.items() if "config.json" in entry.written))
        raise AvjaxError(f"{source}: random weights take an encoder whose shape is registered, one of {known}")
    return base.Files(written["config.json"], Path("model.safetensors"), written.get("preprocessor_config.json", {}))


def _found(source: str | os.PathLike, weights_dir: str | os.PathLike | None) -> base.Files:
    """Where the files of a source are, and what they say."""
    if source in weights.REGISTRY:
        entry, place = weights.REGISTRY[source], weights.fetch(source, weights_dir)
        folder, written = (place if place.is_dir() else place.parent), entry.written
    elif Path(source).is_dir():
        folder, written = Path(source).resolve(), {}
    else:
        names = ", ".join(sorted(weights.REGISTRY))
        raise AvjaxError(f"{source}: neither a registered name ({names}) nor a folder with config.json and weights")
    config = written.get("config.json") or _json(folder / "config.json")
    if config is None:
        raise AvjaxError(f"{folder}: no config.json in it; expected an encoder's folder in the hub's layout")
    if config.get("model_type") not in (*FAMILIES, "clip"):
        known = ", ".join((*FAMILIES, "clip"))
        raise AvjaxError(f"{folder}/config.json: model_type is {config.get('model_type')!r}, expected one of {known}")
    settings = written.get("preprocessor_config.json") or _json(folder / "preprocessor_config.json") or {}
    return base.Files(config, _tensors(folder), settings)


def _tensors(folder: Path) -> Path:
    """The file of the weights in an encoder's folder."""
    there = [folder / name for name in _TENSORS if (folder / name).is_file()]
    if not there:
        raise AvjaxError(f"{folder}: no weights in it; expected model.safetensors, or one of {', '.join(_TENSORS[1:])}")
    return there[0]


def _json(file: Path) -> dict[str, Any] | None:
    return read_json(file, "fetch it again") if file.is_file() else None
