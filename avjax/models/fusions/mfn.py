"""MFN: an LSTM per modality and a gated memory of interactions between their cells.

Zadeh et al., "Memory Fusion Network for Multi-view Sequential Learning", AAAI 2018. Equation names are the paper's.
Shapes: b clip, n step, d width, m memory width, c class.

The paper's streams are aligned by words. This module averages every stream over `segment_count` equal spans of its
clip, a common clock; a stream with that many steps stays as it is. `as_released` reads the streams unchanged, which
must then have the same number of steps, and reads padding as zeros, as the released code does.

A missing modality is an all-False mask: its LSTM stays in state zero. Spans in which no stream has a real step leave
the memory unchanged.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from avjax.errors import AvjaxError
from avjax.layers import Dropout, Project, Recurrence, align, stream_inputs
from avjax.models.base import Batch, Fusion, Output, Streams
from avjax.models.fusions.base import FusionModule


class Perceptron(nn.Module):
    """Two dense layers with ReLU and dropout between them: (..., i) → (..., d)."""

    hidden: int
    width: int
    dropout: float
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps x (..., i) to (..., width)."""
        hidden = jax.nn.relu(Project((self.hidden,), dtype=self.dtype, name="hidden")(x))
        hidden = Dropout(self.dropout, train)(hidden)
        return Project((self.width,), dtype=self.dtype, name="out")(hidden)


class MemoryGate(nn.Module):
    """A gate γ of section 3.3; its first layer is split into the part of all steps at once and that of the memory."""

    hidden: int
    dropout: float
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, attended: jax.Array, memory_width: int, train: bool = False
    ) -> tuple[jax.Array, jax.Array, Callable[..., jax.Array]]:
        """Maps attended (b, n, d) to two arrays (b, n, hidden) and a gate: (a step of each, memory (b, m)) → (b, m)."""
        inputs = Project((self.hidden,), dtype=self.dtype, name="input")(attended)
        keep = Dropout(self.dropout, train)(jnp.ones_like(inputs))
        init = nn.initializers.lecun_normal()
        recurrent = self.param("memory", init, (memory_width, self.hidden)).astype(self.dtype)
        out = self.param("out", init, (self.hidden, memory_width)).astype(self.dtype)
        bias = self.param("out_bias", nn.initializers.zeros, (memory_width,))

        def gate(projected: jax.Array, kept: jax.Array, memory: jax.Array) -> jax.Array:
            hidden = jax.nn.relu(projected + memory.astype(self.dtype) @ recurrent) * kept
            return jax.nn.sigmoid((hidden @ out).astype(jnp.float32) + bias[None])

        return inputs, keep, gate


class Mfn(FusionModule):
    """Memory fusion network (Zadeh et al. 2018).

    The defaults are one point of the authors' grid search.

    Attributes:
      widths: of the streams' LSTMs.
      memory: m.
      attention, proposal, retain, update: hidden widths of D_a, D_u, γ1 and γ2; output: of the last layers.
      dropouts: rates in those five, in that order.
      segment_count: n of the common clock.
      as_released: read the streams without alignment, see the module docstring.
    """

    widths: Mapping[str, int] = dataclasses.field(default_factory=lambda: {"text": 128, "audio": 32, "video": 128})
    memory: int = 128
    attention: int = 128
    proposal: int = 128
    retain: int = 256
    update: int = 256
    output: int = 128
    dropouts: tuple[float, ...] = (0.2, 0.5, 0.7, 0.0, 0.5)
    segment_count: int = 20
    as_released: bool = False

    @nn.compact
    def __call__(self, batch: Batch, train: bool = False) -> Output:
        """Reads `<stream> (b, n, w)` and `<stream>_mask (b, n)`; features hold the last states as "states".

        Raises:
          AvjaxError: streams of different lengths with `as_released`.
        """
        steps, masks = self._clocked(*stream_inputs(batch, self.streams, self.dtype, self.as_released))
        states = [
            Recurrence(self.widths[s], dtype=self.dtype, name=f"{s}_states")(steps[s], masks[s]) for s in self.streams
        ]
        cells = jnp.concatenate([cell for _, cell in states], -1)
        before = jnp.pad(cells, ((0, 0), (1, 0), (0, 0)))[:, :-1]
        both = jnp.concatenate([before, cells], -1)  # c of [t-1, t]
        weights = self._perceptron("attention", 0, both.shape[-1])(both, train)
        weights = jax.nn.softmax(weights.astype(jnp.float32))
        real = jnp.any(jnp.stack([masks[s] for s in self.streams]), 0)
        memory = self._memory(weights * both, real, train)
        joint = jnp.concatenate([*(hidden[:, -1] for hidden, _ in states), memory], -1)
        fused = jax.nn.relu(Project((self.output,), dtype=self.dtype, name="output")(joint))
        fused = Dropout(self.dropouts[4], train)(fused)
        return self.predict(fused, {"states": joint})

    def _perceptron(self, name: str, index: int, width: int) -> Perceptron:
        return Perceptron(getattr(self, name), width, self.dropouts[index], self.dtype, name=name)

    def _clocked(self, steps: Streams, masks: Streams) -> tuple[Streams, Streams]:
        """Averages the streams onto one clock."""
        if self.as_released:
            lengths = {s: x.shape[1] for s, x in steps.items()}
            if len(set(lengths.values())) > 1:
                raise AvjaxError(
                    f"the streams have {lengths} steps; model.settings.as_released=True needs equal numbers"
                )
            return steps, masks
        clock = jnp.ones((len(steps[self.streams[0]]), self.segment_count), bool)
        aligned = {s: align(steps[s], masks[s], clock) for s in self.streams}
        return {s: x for s, (x, _) in aligned.items()}, {s: mask for s, (_, mask) in aligned.items()}

    def _memory(self, attended: jax.Array, real: jax.Array, train: bool) -> jax.Array:
        """Returns the last u (b, m) of u_t = γ1 ⊙ u_(t-1) + γ2 ⊙ tanh(û_t) over real spans (section 3.3), float32."""
        proposal = jnp.tanh(self._perceptron("proposal", 1, self.memory)(attended, train).astype(jnp.float32))
        *retained, retain = MemoryGate(self.retain, self.dropouts[2], self.dtype, name="retain")(
            attended, self.memory, train
        )
        *updated, update = MemoryGate(self.update, self.dropouts[3], self.dtype, name="update")(
            attended, self.memory, train
        )

        def step(memory: jax.Array, now: Any) -> tuple[jax.Array, None]:
            retained, updated, proposal, real = now
            new = retain(*retained, memory) * memory + update(*updated, memory) * proposal
            return jnp.where(real[:, None], new, memory), None

        over_time = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (retained, updated, proposal, real))
        memory, _ = jax.lax.scan(step, jnp.zeros(proposal[:, 0].shape, jnp.float32), over_time)
        return memory


FUSIONS: dict[str, Fusion] = {
    "mfn": Fusion(
        module=Mfn,
        small={"segment_count": 8},
        recipe={"optimizer": "adam", "learning_rate": 5e-4, "batch_size": 64, "weight_decay": 1e-4},
        paper="Zadeh et al. 2018, AAAI",
    ),
}
