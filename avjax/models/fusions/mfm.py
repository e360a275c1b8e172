"""MFM: a factor of the label and one of each modality, which together reconstruct the inputs.

Tsai et al., "Learning Factorized Multimodal Representations", ICLR 2019.
Shapes: b clip, n step of a stream, d width, c class.

The prior is a loss of a whole batch: it couples clips in training, not in prediction. A missing modality is an
all-False mask. It does not change the memory, and its reconstruction costs nothing. Without any stream only biases
predict.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from avjax.layers import Project, Recurrence, masked_mean, stream_inputs
from avjax.models.base import Batch, Fusion, Output, head_loss
from avjax.models.fusions.base import FusionModule, counted, for_clips, named, of_kind
from avjax.models.fusions.mfn import Mfn, Perceptron

# Weights of reconstruction and prior in the released run that has the widths of `Mfm`.
REBUILT: Mapping[str, float] = {"text": 1.0, "audio": 0.01, "video": 0.5}
PRIOR = 1.0


def _sizes(**sizes: int) -> Any:
    return dataclasses.field(default_factory=lambda: sizes)


class Mfm(FusionModule):
    """Multimodal factorization model (Tsai et al. 2019).

    A memory fusion network (`Mfn`) maps all streams to the latent variable of the label, and an LSTM each stream to
    its own. A perceptron maps each latent variable to a factor. Only the label's factor is classified; together with
    the factor of a stream it reconstructs that stream's mean over real steps, where the paper reconstructs every step.
    The label's latent variable is the output of the memory network's own output layers, one more than in the released
    code.

    The defaults are those of the most accurate run that the authors' code records (MOSI). The paper's second model,
    which infers the latent variables of missing modalities, is not implemented.

    Attributes:
      latents: widths of the latent variables of the label and of each stream; factors: of their factors.
      dropouts: rates inside the perceptrons from latent variables to factors.
      widths: of the memory network's LSTMs; memory: of its memory; hidden: of its inner layers; memory_dropout: rate in
        them.
      segment_count: spans of its common clock.
    """

    latents: Mapping[str, int] = _sizes(label=32, text=32, audio=8, video=80)
    factors: Mapping[str, int] = _sizes(label=16, text=88, audio=8, video=8)
    dropouts: Mapping[str, float] = _sizes(label=0.0, text=0.2, audio=0.2, video=0.7)
    widths: Mapping[str, int] = _sizes(text=88, audio=64, video=48)
    memory: int = 64
    hidden: int = 128
    memory_dropout: float = 0.5
    segment_count: int = 20

    @nn.compact
    def __call__(self, batch: Batch, train: bool = False) -> Output:
        """Reads `<stream> (b, n, w)` and `<stream>_mask (b, n)` of its streams.

        Features hold "latent_label" and "latent_<stream>", and "rebuilt_<stream>" (b, w), the means.
        """
        steps, masks = stream_inputs(batch, self.streams, self.dtype)
        latents = {"label": self._memory()(batch, train).logits["fusion"]}
        latents |= {s: self._latent(s, steps[s], masks[s]) for s in self.streams}
        factors = {name: self._factor(name, x, train) for name, x in latents.items()}
        rebuilt = {}
        for s in self.streams:
            both = jnp.concatenate([factors["label"], factors[s]], -1)
            decoder = Perceptron(both.shape[-1], batch[s].shape[-1], 0.0, self.dtype, name=f"rebuild_{s}")
            rebuilt[s] = decoder(both)
        fused = jax.nn.relu(Project((self.factors["label"],), dtype=self.dtype, name="fuse")(factors["label"]))
        return self.predict(fused, named("latent", latents) | named("rebuilt", rebuilt))

    def _memory(self) -> Mfn:
        inner = dict.fromkeys(("attention", "proposal", "retain", "update", "output"), self.hidden)
        return Mfn(
            self.latents["label"], self.streams, self.dtype, self.widths, self.memory, **inner,
            dropouts=(self.memory_dropout,) * 5, segment_count=self.segment_count, name="memory_network",
        )  # fmt: skip

    def _latent(self, stream: str, x: jax.Array, mask: jax.Array) -> jax.Array:
        width = self.latents[stream]
        hidden, _ = Recurrence(width, dtype=self.dtype, name=f"{stream}_states")(x, mask)
        return Project((width,), dtype=self.dtype, name=f"{stream}_latent")(hidden[:, -1])

    def _factor(self, name: str, latent: jax.Array, train: bool) -> jax.Array:
        width = self.factors[name]
        return jax.nn.relu(
            Perceptron(width, width, self.dropouts[name], self.dtype, name=f"{name}_factor")(latent, train)
        )


def normal_discrepancy(z: jax.Array, rows: jax.Array) -> jax.Array:
    """Computes the squared maximum mean discrepancy of latent variables to the standard normal distribution.

    The kernel is the released one, exp(-|x - y|² / d²). The released code draws as many normal vectors as there are
    clips; this uses the exact expectation over such draws, up to a constant:
    E k(x, z) = (d²/(d²+2))^(d/2) · exp(-|z|²/(d²+2)) and E k(x, x') = (d²/(d²+4))^(d/2).

    Args:
      z: (b, d) float32.
      rows: (b,), which rows count.

    Returns:
      () float32; 0 where none does.
    """
    width = z.shape[-1]
    square, half = float(width**2), width / 2
    count = jnp.sum(rows)
    pairs = rows[:, None] & rows[None]
    alike = jnp.exp(-jnp.sum((z[:, None] - z[None]) ** 2, -1) / square)
    among = jnp.sum(jnp.where(pairs, alike, 0)) / jnp.maximum(count, 1) ** 2
    near = jnp.exp(-jnp.sum(z**2, -1, keepdims=True) / (square + 2))
    across = (square / (square + 2)) ** half * masked_mean(near, rows)[0]
    return jnp.where(count > 0, among - 2 * across + (square / (square + 4)) ** half, 0.0)


def mfm_loss(output: Output, batch: Batch, task: str) -> dict[str, jax.Array]:
    """Computes cross entropy, the squared error of each stream's reconstructed mean, and the latent variables' prior.

    The weights are those of the released run with the default settings. A missing stream is not reconstructed, and the
    prior of the label's latent variable covers clips that have any stream.
    """
    rebuilt, latents = of_kind(output, "rebuilt"), of_kind(output, "latent")
    rows = {s: counted(batch, s) for s in rebuilt}
    rows["label"] = functools.reduce(jnp.logical_or, list(rows.values()))
    terms = {"fusion": head_loss(output, batch, "fusion", task)}
    for s, x in rebuilt.items():
        target = masked_mean(batch[s].astype(jnp.float32), batch[f"{s}_mask"])
        terms[f"{s}_rebuilt"] = REBUILT[s] * jnp.where(rows[s], jnp.mean((x - target) ** 2, -1), 0.0)
    discrepancy = sum(normal_discrepancy(z, rows[name]) for name, z in latents.items())
    return terms | {"prior": for_clips(batch, PRIOR * discrepancy)}


FUSIONS: dict[str, Fusion] = {
    "mfm": Fusion(
        module=Mfm,
        small={"segment_count": 8},
        loss=mfm_loss,
        recipe={"optimizer": "adam", "learning_rate": 1e-3, "batch_size": 32, "weight_decay": 0.0, "epochs": 200},
        paper="Tsai, Liang, Zadeh, Morency, Salakhutdinov 2019, ICLR",
    ),
}
