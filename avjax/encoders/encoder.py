"""A pretrained network with its preprocessing; batches are padded to a few shapes to limit recompilation."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from avjax.encoders import base, random_weights
from avjax.errors import AvjaxError
from avjax.layers import masked_mean

# Tokenizer files in folders without tokenizer.json: word pieces, or byte pairs.
_VOCABULARIES = (("vocab.txt",), ("vocab.json", "merges.txt"))


class Encoder:
    """A pretrained network with its preprocessing, as returned by `encoders.load`.

    Attributes:
      module, params: the Flax module, without `pool`, and its params on the device; a model may train them further.
      config: the architecture, an instance of the family's config class.
      settings: of the preprocessing, the contents of preprocessor_config.json.
      width: width of the features.
      longest: the longest input; None: no limit.
      random: whether the weights are random.
      provenance: everything that the features depend on, as strings: source, sha256, model_type, layer, pool and dtype.
    """

    def __init__(
        self,
        family: Any,
        module: Any,
        params: Mapping,
        provenance: dict[str, str],
        *,
        pool: str | None = None,
        files: base.Files | None = None,
    ) -> None:
        self.module, self.config = module, module.config
        self.width = module.config.joint if pool == "projected" else module.config.width
        self.longest = module.config.longest
        self.provenance = provenance
        self.random = provenance.get("sha256") == random_weights.PROVENANCE
        self._family = family
        self._steps = module.config.steps
        self._pool = pool
        self._files = files or base.Files({}, Path("model.safetensors"))
        self.settings = self._files.settings
        devices = jax.local_devices()
        mesh = jax.make_mesh((len(devices),), ("batch",), axis_types=(AxisType.Auto,), devices=devices)
        self._devices = len(devices)
        self._shard = NamedSharding(mesh, PartitionSpec("batch"))
        self.params = jax.device_put(_without_unused_blocks(module, params), NamedSharding(mesh, PartitionSpec()))

    def __call__(
        self, inputs: np.ndarray | jax.Array, mask: np.ndarray | jax.Array | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Encodes a batch. The features of a row depend neither on masked steps nor on the other rows.

        Batch and length are padded to a power of two or to three quarters of one, which keeps compilations few as sizes
        vary. The batch is split over all local devices.

        Args:
          inputs: token ids (b, l), waveforms (b, samples) at 16 kHz, images (b, h, w, 3) or log-mel (b, bins, frames),
            as returned by `prepare`.
          mask: (b, length) bool, True = real; (b,) for images; default all True.

        Returns:
          features (b, s, d) float32, zeros under a False mask, and their mask (b, s); with `pool`, (b, d) and (b,).

        Raises:
          AvjaxError: the shapes do not fit this encoder, or the input is longer than `longest`.
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
        """Encodes inputs that are on the device and leaves the results there; compiles for each new shape."""
        return run(self.module, self._pool, self.params, inputs, mask)

    def padded(self, inputs: np.ndarray, mask: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Pads inputs and mask to the bucket of their length; arguments and errors as in `__call__`."""
        mask, axis = self._family.INPUTS.masked(inputs, mask), self._family.INPUTS.length_axis
        if axis is None:
            return inputs, mask
        length = inputs.shape[axis]
        room = _bucket(length, self._family.INPUTS.least)
        # A bucket is cut to the encoder's longest input; the encoder itself refuses longer inputs.
        spare = max(length, min(room, self.longest or room)) - length
        padding = [(0, spare if a == axis else 0) for a in range(inputs.ndim)]
        return np.pad(inputs, padding), np.pad(mask, [(0, 0), (0, spare)])

    def prepare(self, raw: Any) -> tuple[np.ndarray, np.ndarray]:
        """Prepares raw data as this encoder's inputs and their mask, as the original processor does.

        Args:
          raw: texts; waveforms at 16 kHz, a sequence of (samples,) float32; or images, uint8 (n, h, w, 3) or a sequence
            of (h, w, 3).
        """
        if self._family.INPUTS.text:
            return self.tokenize(raw)
        return self._family.prepare(raw, self.settings)

    @functools.cached_property
    def tokenizer(self) -> Any:
        """Returns the `tokenizers.Tokenizer` of the encoder's folder.

        Raises:
          AvjaxError: the folder has no tokenizer.
        """
        if self.random:
            return random_weights.tokenizer(self.provenance["model_type"])
        return _read_tokenizer(self._files.tensors.parent)

    def tokenize(self, texts: Sequence[str], max_length: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Tokenizes texts to ids (b, l) int32 and mask (b, l) bool, where l is the length of the longest text.

        Args:
          texts: b strings.
          max_length: number of ids, special ones included, to which longer texts are cut; default `longest`.

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
        return base.pad_rows(rows, np.int32(self._files.config.get("pad_token_id") or 0))


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(
    module: Any, pool: str | None, params: Mapping, inputs: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Computes features and mask, pooled as in `load`; encoders of one architecture share compiled programs."""
    features, real = module.apply({"params": params}, inputs, mask)
    return pooled(jnp.where(real[..., None], features, 0).astype(jnp.float32), real, pool)


def pooled(features: jax.Array, mask: jax.Array, pool: str | None) -> tuple[jax.Array, jax.Array]:
    """Pools features (b, s, d) and mask (b, s) to (b, d) and (b,); returns them unchanged if `pool` is None.

    Example:
      >>> pooled(jnp.array([[[1.0], [3.0]]]), jnp.array([[True, True]]), "mean")[0].tolist()
      [[2.0]]
    """
    if pool in ("first", "projected"):
        return features[:, 0], mask[:, 0]
    if pool == "mean":
        return masked_mean(features, mask), mask.any(1)
    return features, mask


def _read_tokenizer(folder: Path) -> Any:
    """Reads the `tokenizers.Tokenizer` of a folder from tokenizer.json or the vocabulary files of older checkpoints.

    A tokenizer.json is read without transformers, whose import takes seconds at every start; the ids are the same.

    Raises:
      AvjaxError: the folder has neither, or transformers cannot read the vocabulary files.
    """
    if (file := folder / "tokenizer.json").is_file():
        import tokenizers

        return tokenizers.Tokenizer.from_file(str(file))
    if not any(all((folder / name).is_file() for name in names) for names in _VOCABULARIES):
        raise AvjaxError(
            f"{file}: no such file; put the tokenizer of this encoder there, or vocab.txt, or vocab.json "
            "with merges.txt"
        )
    import transformers

    # Never runs code from the folder, and never prompts for it.
    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, **options).backend_tokenizer
    except (AttributeError, OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise AvjaxError(
            f"{folder}: transformers makes no tokenizer of its files ({reason}); put a tokenizer.json there"
        ) from error


def _without_unused_blocks(module: Any, params: Mapping) -> Mapping:
    """Drops the params of the blocks above the requested layer."""
    if module.layer is None:
        return params
    return {k: v for k, v in params.items() if not k.startswith("block_") or int(k[6:]) < module.layer}


def _bucket(size: int, least: int = 1) -> int:
    """Rounds up to the next power of two, or to three quarters of it if that suffices."""
    power = 1 << max(0, size - 1).bit_length()
    return max(least, power * 3 // 4 if size <= power * 3 // 4 else power)
