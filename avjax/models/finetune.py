"""Models that fine-tune their encoders: built from a configuration, with the encoders saved after training.

A run reads the inputs of its encoders, as staged by a raw preset (`presets.Preset.raw`).
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from avjax import encoders
from avjax.encoders import bert, images, vit, wav2vec2, whisper
from avjax.errors import AvjaxError
from avjax.features import presets
from avjax.features.presets import Encoding
from avjax.models import etg_aver
from avjax.models import lora as tuning
from avjax.models.base import Model
from avjax.models.end_to_end import PRETRAINED, Encode, EndToEnd
from avjax.settings import EtgAverSettings
from avjax.utils.storage import replacing

FAMILIES = (bert, vit, wav2vec2, whisper)
_EPS = 1e-5


class Pretrained(Mapping):
    """The constants of every batch: `PRETRAINED` → {stream: params}.

    Weights are fetched and read on first use, so that a model can be described without them.
    """

    def __init__(self, encodings: Mapping[str, Encoding], random: bool) -> None:
        """Keeps the encoder of each stream; `random` is passed to `encoders.load`."""
        self._encodings, self._random = encodings, random

    def __getitem__(self, key: str) -> dict[str, Any]:
        if key != PRETRAINED:
            raise KeyError(key)
        return {stream: params for stream, (params, _) in self.weights.items()}

    def __iter__(self) -> Iterator[str]:
        return iter((PRETRAINED,))

    def __len__(self) -> int:
        return 1

    @functools.cached_property
    def weights(self) -> dict[str, tuple[dict[str, Any], dict[str, str]]]:
        """Loads the weights: stream → (params on the host, provenance of the encoder)."""
        out = {}
        for stream, e in self._encodings.items():
            encoder = encoders.load(e.source, layer=e.layer, pool=e.pool, dtype="float32", random=self._random)
            out[stream] = jax.device_get(encoder.params), encoder.provenance
        return out


def build(settings: EtgAverSettings, classes: int, task: str) -> Model:
    """Builds ETG-AVER with the encoders of `settings.encoders.preset`.

    Audio steps stay as the encoder returns them: the core averages them into segments. Features of a middle layer,
    which lack the encoder's final norm, are normalised to mean 0 and variance 1 in each step.

    Raises:
      AvjaxError: the preset does not stage raw inputs, or as `etg_aver.build`.
    """
    model, own = etg_aver.build(settings, classes, task), settings.encoders
    encodings = _encodings(own.preset, model.streams)
    encoded = tuple((stream, _encode(e, settings.dtype, own.remat)) for stream, e in encodings.items())
    tuned = tuning.Tuning(own.frozen, own.lora if own.tune == "lora" else None)
    return model.replace(
        module=EndToEnd(model.module, encoded, tuned),
        frame_stream="video" if "video" in encodings else "",
        constants=Pretrained(encodings, own.random),
    )


def _encodings(preset: str, streams: Sequence[str]) -> dict[str, Encoding]:
    chosen = presets.preset(preset)
    if not chosen.raw:
        raw = ", ".join(name for name, other in presets.PRESETS.items() if other.raw)
        raise AvjaxError(f"preset {preset!r} stages features, not the inputs of their encoders; take one of {raw}")
    available = {"video": chosen.image, "audio": chosen.speech, "text": chosen.text}
    return {stream: available[stream] for stream in streams}


def _encode(encoding: Encoding, dtype: str, remat: bool) -> Encode:
    family, module, settings = encoders.architecture(encoding.source, layer=encoding.layer, dtype=dtype)
    if family not in FAMILIES:
        families = ", ".join(f.__name__.rpartition(".")[2] for f in FAMILIES)
        raise AvjaxError(f"{encoding.source}: this encoder cannot be trained; those of {families} can")
    # On a CPU, XLA schedules the recomputation so that it takes time but saves no memory.
    module = module.clone(remat=remat and jax.default_backend() != "cpu")

    def run(params: Mapping[str, Any], inputs: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        features, real = encoders.pooled(*module.apply({"params": params}, inputs, mask), encoding.pool)
        if encoding.layer is not None:
            wide = features.astype(jnp.float32)
            features = jax.nn.standardize(wide, variance=jnp.var(wide, -1, keepdims=True), epsilon=_EPS)
        return (features[:, None], real[:, None]) if encoding.pool else (features, real)

    def of_frames(params: Mapping[str, Any], raw: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        b = raw.shape[0]
        frames = images.normalised(raw.reshape(-1, *raw.shape[2:]), settings)
        features, real = run(params, frames, mask.reshape(-1))
        return features.reshape(b, -1, features.shape[-1]), real.reshape(b, -1)

    def of_sequences(params: Mapping[str, Any], raw: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        return run(params, raw.swapaxes(1, 2) if family.INPUTS.rank == 3 else raw[..., 0], mask)

    return of_frames if family.INPUTS.length_axis is None else of_sequences


def write_merged(folder: Path, model: Model, best: Mapping[str, Any], names: Sequence[tuple[str, int]]) -> None:
    """Writes the encoders of a run trained with LoRA, the updates merged into the kernels; for other runs nothing.

    Each lane and stream has one file, `<fold>-<seed>-<stream>.safetensors`, with all params by their paths; its
    metadata hold the source and the sha256 of the pretrained weights.

    Args:
      folder: to write to.
      model: the model of the run.
      best: the variables of the lanes (`loop.State.best`).
      names: (fold, seed) of each lane.
    """
    if not (isinstance(model.module, EndToEnd) and model.module.tuning.lora):
        return
    for lane, (fold, seed) in enumerate(names):
        for stream, (params, provenance) in model.constants.weights.items():
            trained = jax.tree.map(lambda leaf, lane=lane: leaf[lane], best["params"].get(stream, {}))
            metadata = {key: provenance[key] for key in ("source", "sha256")}
            # A fold may be named after a folder.
            path = folder / f"{quote(fold, safe='')}-{seed}-{stream}.safetensors"
            _write(path, tuning.merged(model.module.tuning, params, trained), metadata)


def _write(path: Path, params: Mapping[str, Any], metadata: dict[str, str]) -> None:
    from safetensors.numpy import save

    flat = {name: np.asarray(leaf) for name, leaf in flatten_dict(params, sep="/").items()}
    with replacing(path, "wb") as file:
        file.write(save(flat, metadata))
