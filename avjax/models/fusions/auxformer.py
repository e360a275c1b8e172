"""AuxFormer: a crossmodal network, and an auxiliary network for each modality.

Goncalves and Busso, "AuxFormer: Robust Approach to Audiovisual Emotion Recognition", ICASSP 2022.
Shapes: b clip, n step of a stream, d width, c class.

The released system has no masks: see `avjax.layers.crossmodal`, whose `as_released` restores its behaviour. By default
the last real step of a clip predicts. A missing modality is an all-False mask: its own vector is zero.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from avjax.layers import CrossmodalEncoder, Project, last_step, stream_inputs
from avjax.models.base import Batch, Fusion, Output, Streams, head_loss, stream_heads
from avjax.models.fusions.base import FusionModule
from avjax.models.fusions.mult import Residual


class AuxFormer(FusionModule):
    """AuxFormer (Goncalves and Busso 2022): a crossmodal network and one auxiliary network for each modality.

    Main network: each of two streams attends to the other, then to itself with learned mixtures; their last steps are
    concatenated. Auxiliary networks: a transformer applied three times, and a perceptron and head that the streams
    share. The defaults are those of the released code, whose audio projection has no bias.

    Attributes:
      streams: two of text, audio, video.
      width: d; a stream of this width is not projected, like the paper's video; heads: divides it.
      layers: blocks of every transformer.
      hidden: widths of the auxiliary perceptron.
      repeats: number of times that an auxiliary transformer is applied.
      causal, as_released: as in `MulT`; the dropouts likewise.
    """

    streams: tuple[str, ...] = ("audio", "video")
    width: int = 50
    heads: int = 10
    layers: int = 5
    hidden: tuple[int, ...] = (512, 256)
    repeats: int = 3
    causal: bool = True
    dropout: float = 0.1
    attention_dropout: float = 0.1
    embedding_dropout: float = 0.25
    out_dropout: float = 0.2
    as_released: bool = False

    @nn.compact
    def __call__(self, batch: Batch, train: bool = False) -> Output:
        """Reads `<stream> (b, n, w)` and `<stream>_mask (b, n)` of its streams; heads "fusion" and the streams."""
        steps, masks = stream_inputs(batch, self.streams, self.dtype, self.as_released)
        steps = {s: self._project(s, steps[s]) for s in self.streams}
        pairs = zip(self.streams, self.streams[::-1], strict=True)
        joint = jnp.concatenate([self._cross(s, other, steps, masks, train) for s, other in pairs], -1)
        features = {"fusion": Residual(joint.shape[-1:], self.out_dropout, self.dtype, name="fuse")(joint, train)}
        auxiliary = Residual(self.hidden, self.out_dropout, self.dtype, name="auxiliary")
        features |= {s: auxiliary(self._alone(s, steps[s], masks[s], train), train) for s in self.streams}
        shared = nn.Dense(self.classes, name="head_auxiliary")
        heads = {"fusion": nn.Dense(self.classes, name="head_fusion")} | dict.fromkeys(self.streams, shared)
        logits = {name: heads[name](x.astype(jnp.float32)) for name, x in features.items()}
        return Output(logits=logits, features=features, attention={})

    def _project(self, stream: str, x: jax.Array) -> jax.Array:
        if x.shape[-1] == self.width:
            return x
        return Project((self.width,), dtype=self.dtype, bias=False, name=f"project_{stream}")(x)

    def _cross(self, stream: str, other: str, steps: Streams, masks: Streams, train: bool) -> jax.Array:
        cross = self._encoder(f"{stream}_with_{other}", attention_dropout=0.0)
        x = cross(steps[stream], masks[stream], steps[other], masks[other], train)
        own = self._encoder(f"{stream}_memory", placed=False, mixed=True)
        return last_step(own(x, masks[stream], train=train), masks[stream])

    def _alone(self, stream: str, x: jax.Array, mask: jax.Array, train: bool) -> jax.Array:
        encoder = self._encoder(f"{stream}_alone", placed=False)
        for _ in range(self.repeats):
            x = encoder(x, mask, train=train)
        return last_step(x, mask)

    def _encoder(self, name: str, **more: Any) -> CrossmodalEncoder:
        settings = {"dropout": self.dropout, "attention_dropout": self.attention_dropout} | more
        return CrossmodalEncoder(
            self.layers, self.heads, self.causal, embedding_dropout=self.embedding_dropout,
            as_released=self.as_released, dtype=self.dtype, name=name, **settings,
        )  # fmt: skip


def auxformer_loss(output: Output, batch: Batch, task: str) -> dict[str, jax.Array]:
    """Computes a third of the cross entropy of each head: {head: (b,)}, 0 for modalities that a clip lacks."""
    return {head: head_loss(output, batch, head, task) / 3 for head in output.logits}


FUSIONS: dict[str, Fusion] = {
    "auxformer": Fusion(
        module=AuxFormer,
        loss=auxformer_loss,
        small={"layers": 1, "repeats": 1},
        heads=stream_heads,
        least=2,
        most=2,
        recipe={"optimizer": "adam", "learning_rate": 7.25e-4, "batch_size": 32, "epochs": 30, "weight_decay": 0.0},
        paper="Goncalves and Busso 2022, ICASSP",
    ),
}
