"""Fusions whose streams share an encoder or learn each other's layers: UAVM, VAVL and LADDER.

Shapes: b clip, n step of a stream, p position, d width, c class. Every fusion reads any two or more streams
(`<stream> (b, n, w)` and `<stream>_mask (b, n)`); positions are counted from a clip's first real step.

A missing stream is an all-False mask: it takes no part in the fused answer (UAVM) or enters it as zeros (VAVL, LADDER),
and it costs nothing. Without any stream UAVM answers zeros, VAVL and LADDER what their biases say.
"""

import functools
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from avjax.layers.conformer import ConformerBlock, pack
from avjax.layers.dropout import Dropout
from avjax.layers.linear import Project
from avjax.layers.masking import align, masked_mean
from avjax.layers.transformer import PreNormBlock
from avjax.models.base import Fusion, Output, head_loss, stream_heads

Batch = Mapping[str, jax.Array]


def _present(batch: Batch, stream: str) -> jax.Array:
    """(b,): whether a clip has any step of a stream."""
    return jnp.any(batch[f"{stream}_mask"], -1)


# ---- UAVM ---------------------------------------------------------------------------------------------------------


class PositionedTransformer(nn.Module):
    """Norm, projection to the width where that differs, learned positions, `depth` pre-norm layers."""

    width: int
    heads: int
    depth: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Maps x (b, p, w) under mask (b, p) to (b, p, width)."""
        x = nn.LayerNorm(1e-6, self.dtype, use_fast_variance=False, name="norm")(x)
        if x.shape[-1] != self.width:
            x = Project((self.width,), dtype=self.dtype, name="project")(x)
        x += self.param("positions", nn.initializers.truncated_normal(0.02), x.shape[1:]).astype(x.dtype)[None]
        gelu = functools.partial(nn.gelu, approximate=False)
        for i in range(self.depth):
            unbiased = ("query", "key", "value")
            x = PreNormBlock(self.heads, 4 * self.width, gelu, 1e-5, self.dtype, unbiased, name=f"block_{i}")(x, mask)
        return x


class Uavm(nn.Module):
    """UAVM (Gong et al. 2022): each stream alone through layers of its own, then through layers that all share.

    The fused logits are the mean over the streams that a clip has, as the paper joins its two answers. A stream is
    averaged onto `positions` equal spans of the clip, which changes nothing where it has just as many steps.

    Attributes:
      width, heads: of every layer; depth, shared_depth: layers of each stream, and of all.
      positions: p, the number of learned positions; the paper has 30 for clips of ten seconds.
    """

    classes: int
    streams: tuple[str, ...] = ("audio", "video")
    width: int = 1024
    heads: int = 4
    depth: int = 3
    shared_depth: int = 3
    positions: int = 30
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, batch: Batch, train: bool = False) -> Output:
        """Logits "fusion" and one head per stream. `train` changes nothing: the paper has no dropout."""
        encoder = functools.partial(PositionedTransformer, self.width, self.heads, dtype=self.dtype)
        shared, norm = (
            encoder(self.shared_depth, name="shared"),
            nn.LayerNorm(1e-6, use_fast_variance=False, name="head_norm"),
        )
        head = nn.Dense(self.classes, name="head")
        features, logits = {}, {}
        for s in self.streams:
            packed = pack(batch[s], batch[f"{s}_mask"])
            spans = align(*packed, jnp.ones((len(packed[1]), self.positions), bool))
            x = shared(encoder(self.depth, name=s)(*spans), spans[1])
            features[s] = norm(masked_mean(x.astype(jnp.float32), spans[1]))
            logits[s] = head(features[s])
        present = jnp.stack([_present(batch, s) for s in self.streams], -1)  # b s
        together = lambda x: masked_mean(jnp.stack([x[s] for s in self.streams], 1), present)  # noqa: E731
        return Output({"fusion": together(logits)} | logits, {"fusion": together(features)} | features, {})


def uavm_loss(output: Output, batch: Batch, prior: jax.Array) -> dict[str, jax.Array]:
    """Cross entropy of each stream alone, weighted by the chance that the paper's training draws it: even."""
    streams = [head for head in output.logits if head != "fusion"]
    return {s: head_loss(output, batch, s) / len(streams) for s in streams}


# ---- VAVL ---------------------------------------------------------------------------------------------------------


class Perceptron(nn.Module):
    """VAVL's heads: width → `hidden[0]`, ReLU, dropout → `hidden[1]` → `outputs`; float32."""

    outputs: int
    hidden: tuple[int, int]
    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.relu(nn.Dense(self.hidden[0])(x))
        x = Dropout(self.dropout, train)(x)
        return nn.Dense(self.outputs)(nn.Dense(self.hidden[1])(x))


class Vavl(nn.Module):
    """VAVL (Goncalves et al. 2023): Conformers of each stream, then one that all share, with a residual around it.

    Each stream has a head and rebuilds the mean of its own input; the fused head reads the joined streams without
    sending gradients into them. The released code lays batches out steps first for a block that expects clips first,
    so that clips attend to each other; here they attend within themselves, and with Transformer-XL's positions.

    Attributes:
      bottleneck: width of the first, unbiased map of a stream; width, heads, kernel: of the Conformers.
      depth, shared_depth: Conformer blocks of each stream, and of all.
      dropout: of the blocks; head_dropout: of the heads; both in training only.
    """

    classes: int
    streams: tuple[str, ...] = ("audio", "video")
    bottleneck: int = 50
    width: int = 512
    heads: int = 8
    kernel: int = 31
    depth: int = 3
    shared_depth: int = 2
    dropout: float = 0.1
    head_dropout: float = 0.1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, batch: Batch, train: bool = False) -> Output:
        """Logits "fusion" and one head per stream; features also hold "<stream>_rebuilt (b, w)"."""
        norm = nn.LayerNorm(1e-5, use_fast_variance=False, name="norm")
        shared = self._blocks("shared", self.shared_depth)
        features, rebuilt, logits = {}, {}, {}
        for s in self.streams:
            x, mask = pack(batch[s], batch[f"{s}_mask"])
            own = self._encode(s, x, mask, train)
            x = _through(shared, own, mask, train) + own
            features[s] = masked_mean(norm(x.astype(jnp.float32)), mask)
            logits[s] = self._head(f"head_{s}", self.classes)(features[s], train)
            rebuilt[f"{s}_rebuilt"] = self._head(f"rebuild_{s}", batch[s].shape[-1])(features[s], train)
        joined = jax.lax.stop_gradient(jnp.concatenate([features[s] for s in self.streams], -1))
        fused = self._head("head_fusion", self.classes)(joined, train)
        return Output({"fusion": fused} | logits, {"fusion": joined} | features | rebuilt, {})

    def _encode(self, stream: str, x: jax.Array, mask: jax.Array, train: bool) -> jax.Array:
        x = Project((self.bottleneck,), dtype=self.dtype, bias=False, name=f"{stream}_bottleneck")(x)
        x = Project((self.width,), dtype=self.dtype, name=f"{stream}_project")(x)
        x = Dropout(self.dropout, train)(x)
        return _through(self._blocks(stream, self.depth), x, mask, train)

    def _blocks(self, name: str, depth: int) -> list[ConformerBlock]:
        block = functools.partial(
            ConformerBlock, heads=self.heads, kernel=self.kernel, dropout=self.dropout, dtype=self.dtype
        )
        return [block(name=f"{name}_{i}") for i in range(depth)]

    def _head(self, name: str, outputs: int) -> Perceptron:
        return Perceptron(outputs, (self.width, self.width // 2), self.head_dropout, name=name)


def _through(blocks: list[ConformerBlock], x: jax.Array, mask: jax.Array, train: bool) -> jax.Array:
    for block in blocks:
        x = block(x, mask, train)
    return x


def vavl_loss(output: Output, batch: Batch, prior: jax.Array) -> dict[str, jax.Array]:
    """Cross entropy of every head, and twice the mean squared error of each stream's rebuilt mean (released code)."""
    terms = {head: head_loss(output, batch, head) for head in output.logits}
    for s in [head for head in output.logits if head != "fusion"]:
        target = masked_mean(batch[s].astype(jnp.float32), batch[f"{s}_mask"])
        error = jnp.mean((output.features[f"{s}_rebuilt"] - target) ** 2, -1)
        terms[f"{s}_rebuilt"] = jnp.where(_present(batch, s), 2.0 * error, 0.0)
    return terms


# ---- LADDER -------------------------------------------------------------------------------------------------------


class Denoise(nn.Module):
    """The ladder's combination of a corrupted layer with what comes from above (Rasmus et al. 2015, Eq. 2)."""

    @nn.compact
    def __call__(self, corrupted: jax.Array, above: jax.Array) -> jax.Array:
        """Maps two (b, d) to the estimate (b, d) of the clean layer."""
        mean, slope = (self._curve(name, above, first) for name, first in (("mean", 0.0), ("slope", 1.0)))
        return (corrupted - mean) * slope + mean

    def _curve(self, name: str, u: jax.Array, first: float) -> jax.Array:
        """a₁·sigmoid(a₂u + a₃) + a₄u + a₅, unit by unit, that starts as the constant `first`."""
        start = lambda _, shape: jnp.zeros(shape).at[1].set(1.0).at[4].set(first)  # noqa: E731
        a = self.param(name, start, (5, u.shape[-1]))[:, None]  # 5 1 d
        return a[0] * nn.sigmoid(a[1] * u + a[2]) + a[3] * u + a[4]


class Ladder(nn.Module):
    """LADDER: layers of each stream are rebuilt from the other streams' top and its own noisy layers.

    Goncalves and Busso (2023) give cross-modal ladder networks, after Rasmus et al. (2015), in words; this is our
    reading. Each stream's masked mean climbs layers of `widths`. In training noise is added to every layer that the
    classifier and the decoders read. A stream's decoder starts at the mean top of the other streams and comes down,
    joined at each layer by the stream's own noisy layer (`Denoise`). Layers are normalised within the clip, since norms
    over the batch would let clips change each other's answers.

    Attributes:
      widths: of the layers above the input.
      noise: standard deviation of the noise, training only (rng "dropout").
    """

    classes: int
    streams: tuple[str, ...] = ("audio", "video")
    widths: tuple[int, ...] = (512, 256)
    noise: float = 0.3
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, batch: Batch, train: bool = False) -> Output:
        """Logits "fusion"; features also hold "errors (b, streams · layers)", the decoders' mean squared errors."""
        present = {s: _present(batch, s) for s in self.streams}
        clean, noisy = {}, {}
        for s in self.streams:
            bottom = masked_mean(batch[s].astype(jnp.float32), batch[f"{s}_mask"])
            layers = [nn.Dense(w, dtype=self.dtype, name=f"{s}_up_{i}") for i, w in enumerate(self.widths)]
            clean[s] = _climb(layers, bottom, lambda x: x)
            noisy[s] = _climb(layers, bottom, self._corrupt if train else lambda x: x)
        tops = {s: jnp.where(present[s][:, None], noisy[s][-1], 0) for s in self.streams}
        errors = [self._errors(s, clean[s], noisy[s], tops, present) for s in self.streams]
        joined = jnp.concatenate(list(tops.values()), -1)
        features = {"fusion": joined, "errors": jnp.concatenate(errors, -1)}
        return Output({"fusion": nn.Dense(self.classes, name="head")(joined)}, features, {})

    def _corrupt(self, x: jax.Array) -> jax.Array:
        return x + self.noise * jax.random.normal(self.make_rng("dropout"), x.shape, x.dtype)

    def _errors(self, stream: str, clean, noisy, tops, present) -> jax.Array:
        """(b, layers), from the top down; zeros for clips that lack the stream or every other one."""
        others = [s for s in self.streams if s != stream]
        has = jnp.stack([present[s] for s in others], -1)
        estimate = masked_mean(jnp.stack([tops[s] for s in others], 1), has)
        errors = []
        for i in reversed(range(len(clean))):
            dense = nn.Dense(clean[i].shape[-1], dtype=self.dtype, name=f"{stream}_down_{i}")
            above = _standard(dense(estimate).astype(jnp.float32))
            estimate = Denoise(name=f"{stream}_denoise_{i}")(noisy[i], above)
            errors.append(jnp.mean((estimate - jax.lax.stop_gradient(clean[i])) ** 2, -1))
        both = present[stream] & has.any(-1)
        return jnp.where(both[:, None], jnp.stack(errors, -1), 0.0)


def _standard(x: jax.Array) -> jax.Array:
    """Zero mean and unit variance within each clip: (b, d) → (b, d)."""
    return nn.standardize(x, epsilon=1e-5)


def _climb(layers: list[nn.Dense], bottom: jax.Array, corrupt) -> list[jax.Array]:
    """The layers of one stream from its input up, each normalised, then corrupted, float32."""
    found = [corrupt(_standard(bottom))]
    for dense in layers:
        below = found[-1] if len(found) == 1 else nn.relu(found[-1])
        found.append(corrupt(_standard(dense(below).astype(jnp.float32))))
    return found


def ladder_loss(output: Output, batch: Batch, prior: jax.Array) -> dict[str, jax.Array]:
    """Cross entropy, and the mean of the decoders' errors over streams and layers, each with weight 1."""
    cost = jnp.mean(output.features["errors"], -1)
    return {"fusion": head_loss(output, batch, "fusion"), "reconstruction": cost}


FUSIONS: dict[str, Fusion] = {
    "uavm": Fusion(
        module=Uavm,
        loss=uavm_loss,
        heads=stream_heads,
        recipe={"optimizer": "adam", "learning_rate": 5e-5, "batch_size": 144, "weight_decay": 5e-7, "epochs": 10},
        small={"width": 128, "depth": 1, "shared_depth": 1, "positions": 8},
        paper="Gong, Liu, Rouditchenko, Glass 2022, IEEE Signal Processing Letters",
    ),
    "vavl": Fusion(
        module=Vavl,
        loss=vavl_loss,
        small={"width": 128, "depth": 1, "shared_depth": 1},
        heads=stream_heads,
        recipe={"optimizer": "adam", "learning_rate": 5e-5, "batch_size": 32, "weight_decay": 5e-7, "epochs": 20},
        paper="Goncalves, Leem, Lin, Sisman, Busso 2023, Versatile audio-visual learning",
    ),
    "ladder": Fusion(
        module=Ladder,
        loss=ladder_loss,
        least=2,
        recipe={"optimizer": "adam", "learning_rate": 5e-5, "batch_size": 32, "weight_decay": 5e-7, "epochs": 20},
        paper="Goncalves, Busso 2023, ICASSP",
    ),
}
