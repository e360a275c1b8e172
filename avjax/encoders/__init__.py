"""Pretrained encoders: one registry of families, and `load`, which gives a callable that compiles itself.

A family is a module with `build(config, dtype)` → Flax module (with `.config.width` and `.config.positions`) and
`convert(tensors, config)` → its params; the Flax module maps (inputs (b, l), mask (b, l)) → features (b, l, d).
"""

import functools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from avjax.encoders import bert, weights
from avjax.errors import AvjaxError

FAMILIES = {"bert": bert, "distilbert": bert}  # model_type of the hub's config.json → family
_SMALLEST_BUCKET = 8


def load(
    source: str | os.PathLike, *, dtype: jnp.dtype | str | None = None, weights_dir: str | os.PathLike | None = None
) -> "Encoder":
    """Loads a pretrained encoder.

    Args:
      source: a name of `weights.REGISTRY`, such as "minilm", or a folder in the hub's layout: config.json with
        `model_type`, model.safetensors, and tokenizer.json for text. A folder is trusted; its sha256 is recorded.
      dtype: of the matrix products, float32 by default; params stay float32.
      weights_dir: see `weights.fetch`.
    Raises:
      AvjaxError: the source is neither, no family computes it, or its tensors do not fit.
    """
    folder = _folder(source, weights_dir)
    config = _read_config(folder)
    family = FAMILIES[config["model_type"]]
    dtype = jnp.dtype(dtype or jnp.float32)
    module = family.build(config, dtype)
    file = folder / "model.safetensors"
    params = family.convert(weights.read_tensors(file), module.config)
    provenance = {
        "source": str(source) if source in weights.REGISTRY else folder.name,
        "sha256": weights.sha256(file),
        "model_type": config["model_type"],
        "dtype": dtype.name,
    }
    return Encoder(module, params, provenance, folder / "tokenizer.json", config.get("pad_token_id") or 0)


class Encoder:
    """A pretrained network with its tokenizer; `load` makes it.

    Attributes:
      width: of the features.
      positions: the longest input.
      provenance: source, sha256, model_type and dtype, as strings: what the features depend on.
    """

    def __init__(self, module: Any, params: Mapping, provenance: dict[str, str], tokenizer_file: Path, pad: int):
        self.width = module.config.width
        self.positions = module.config.positions
        self.provenance = provenance
        self._params = jax.device_put(params)
        self._tokenizer_file = tokenizer_file
        self._pad = pad

        @jax.jit
        def run(params: Mapping, inputs: jax.Array, mask: jax.Array) -> jax.Array:
            features = module.apply({"params": params}, inputs, mask)
            return jnp.where(mask[..., None], features, 0).astype(jnp.float32)

        self._run = run

    def __call__(self, inputs: np.ndarray | jax.Array, mask: np.ndarray | jax.Array) -> tuple[np.ndarray, np.ndarray]:
        """Encodes a batch. What lies under a False mask, and who else is in the batch, does not change the answer.

        Batch and length are padded to powers of two, so that there are few compilations however sizes vary.

        Args:
          inputs: (b, l); for text, int32 ids.
          mask: (b, l) bool, True = real.
        Returns:
          last_hidden_state (b, l, d) float32, zeros under a False mask; and the mask (b, l).
        Raises:
          AvjaxError: the shapes differ, or l exceeds `positions`.
        """
        inputs, mask = np.asarray(inputs), np.asarray(mask, bool)
        if inputs.shape != mask.shape or inputs.ndim != 2:
            raise AvjaxError(f"inputs {inputs.shape} and mask {mask.shape}: expected both to be (batch, length)")
        batch, length = mask.shape
        # A bucket longer than the encoder takes is cut to what it takes; a longer input is the encoder's to refuse.
        room = max(length, min(_bucket(length), self.positions))
        padding = [(0, _bucket(batch) - batch), (0, room - length)]
        features = self._run(self._params, np.pad(inputs, padding), np.pad(mask, padding))
        return np.asarray(features)[:batch, :length], mask

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The `tokenizers.Tokenizer` of tokenizer.json: the ids of transformers' fast tokenizers without their import.

        Raises:
          AvjaxError: the folder has none.
        """
        if not self._tokenizer_file.is_file():
            raise AvjaxError(f"{self._tokenizer_file}: no such file; put the tokenizer of this encoder there")
        import tokenizers

        return tokenizers.Tokenizer.from_file(str(self._tokenizer_file))

    def tokenize(self, texts: Sequence[str], max_length: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Texts → ids (b, l) int32 and mask (b, l) bool, l being the longest text's.

        Args:
          texts: b strings.
          max_length: longer texts are cut to this many ids, special ones included; default `positions`.
        Raises:
          AvjaxError: `max_length` leaves no room for text, or exceeds `positions`.
        """
        limit = self.positions if max_length is None else max_length
        special = self.tokenizer.num_special_tokens_to_add(False)
        if not special < limit <= self.positions:
            raise AvjaxError(f"max_length is {limit}, expected {special + 1} to {self.positions}")
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(limit)
        rows = [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts))]
        lengths = np.array([len(row) for row in rows], int)
        mask = np.arange(lengths.max(initial=0))[None] < lengths[:, None]
        ids = np.full(mask.shape, self._pad, np.int32)
        ids[mask] = np.concatenate([np.empty(0, np.int32), *rows])
        return ids, mask


def _bucket(size: int) -> int:
    return max(_SMALLEST_BUCKET, 1 << (size - 1).bit_length())


def _folder(source: str | os.PathLike, weights_dir: str | os.PathLike | None) -> Path:
    if source in weights.REGISTRY:
        return weights.fetch(source, weights_dir)
    if not Path(source).is_dir():
        names = ", ".join(sorted(weights.REGISTRY))
        raise AvjaxError(f"{source}: neither a registered name ({names}) nor a folder with config.json and weights")
    return Path(source).resolve()


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise AvjaxError(f"{folder}: no config.json in it; expected an encoder's folder in the hub's layout")
    config = json.loads(file.read_text())
    if config.get("model_type") not in FAMILIES:
        raise AvjaxError(f"{file}: model_type is {config.get('model_type')!r}, expected one of {', '.join(FAMILIES)}")
    return config
