"""ETG-AVER trained end to end with its encoders: from frames, audio and token ids to emotions.

The pretrained weights come with the batch, under `PRETRAINED`: one copy for all lanes. The module's parameters are the
core's and, under the name of its stream, the trained ones of each encoder (`avjax.models.lora`).
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict

from avjax.models import lora
from avjax.models.base import Output
from avjax.models.etg_aver import EtgAver

PRETRAINED = "pretrained"
# Clips that are encoded at once without gradients: evaluation has larger batches than training.
_AT_ONCE = 4

# (params, raw inputs (b, n, …), mask (b, n)) → features (b, s, d) and their mask (b, s).
Encode = Callable[[Mapping[str, Any], jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


class EndToEnd(nn.Module):
    """The core model on top of the encoders of its streams.

    Attributes:
      core: the model that reads the encoders' features.
      encoders: (stream, its encoder) pairs.
      tuning: which encoder weights are trained.
    """

    core: EtgAver
    encoders: tuple[tuple[str, Encode], ...]
    tuning: lora.Tuning

    @nn.compact
    def __call__(self, batch: Mapping[str, Any], train: bool = False) -> Output:
        """Reads encoder inputs `<stream> (b, n, …)`, `<stream>_mask (b, n)`, and {stream: params} at `PRETRAINED`."""
        if self.is_initializing():
            self.tuning.check(batch[PRETRAINED])
        encoded = dict(batch)
        for stream, encode in self.encoders:
            params = self._params(stream, batch[PRETRAINED][stream])
            raw, mask = batch[stream], batch[f"{stream}_mask"]
            features, real = encode(params, raw, mask) if train else _few_at_once(encode, params, raw, mask)
            encoded |= {stream: features, f"{stream}_mask": real}
        return self.core(encoded, train)

    def _params(self, stream: str, pretrained: Mapping[str, Any]) -> Mapping[str, Any]:
        if not self.tuning.chosen(stream, flatten_dict(pretrained, sep="/")):
            return pretrained
        trained = self.param(stream, lora.init_params, self.tuning, stream, pretrained)
        return lora.merged(self.tuning, pretrained, trained)


def _few_at_once(
    encode: Encode, params: Mapping[str, Any], raw: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
    def one(clip: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        features, real = encode(params, clip[0][None], clip[1][None])
        return features[0], real[0]

    return jax.lax.map(one, (raw, mask), batch_size=_AT_ONCE)
