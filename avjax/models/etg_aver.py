"""ETG-AVER: a sentence generated from the clip guides the fusion of audio and video.

Wei et al., "Emotion-Aware Text Generation for Instructing Audio-Visual Emotion Recognition". Equation numbers are the
paper's. Shapes: b clip, n step of a stream (l token, s audio step, t video step), g segment, d width, c class.

One module covers every row of the paper's ablations, as each combines four choices: which streams are read, whether the
text reweights the others (Eqs. 3–4), how they are fused (Eq. 5 and Table IV), and whether every modality has a head of
its own (Eqs. 6–7).

A missing modality is an all-False mask; its weights, averages and contexts are zeros. Without audio, Eq. 5 attends
evenly to the video segments; without video it reads the audio segments instead. Without a sentence there is no query,
so the fused vector of Eq. 5 is zero and only the classifier's bias predicts.
"""

import functools
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from avjax.errors import AvjaxError
from avjax.layers import masked_mean, masked_softmax
from avjax.models.base import Model, Output, Stream, head_loss
from avjax.settings import EtgAverSettings
from avjax.tasks import losses

_SETTINGS = (
    "width",
    "guide",
    "fusion",
    "hlo",
    "weighting",
    "temperature",
    "query",
    "summary",
    "segment_count",
    "dropout",
)

# The paper's tables as settings of `config.model`, by the variant name in `--config file.py:name`.
VARIANTS: dict[str, dict[str, object]] = {
    "full": {},
    # Table III, from the bottom row up; `no_hlo` is also Figure 3 (c).
    "no_hlo": {"hlo": False},
    "concat_text": {"hlo": False, "guide": False, "fusion": "concat"},
    "concat": {"hlo": False, "guide": False, "fusion": "concat", "streams": ("audio", "video")},
    # Figure 3 (a) and (b).
    "no_etg": {"text_source": "constant"},
    "no_tmfef": {"guide": False, "fusion": "concat"},
    # Table IV: Eqs. 3–4 and the four losses stay.
    "fusion_concat": {"fusion": "concat"},
    "fusion_additive": {"fusion": "additive"},
    # Table V, in the order fusion, text, audio, video.
    "weights_equal": {"loss_weights": (1.0, 1.0, 1.0, 1.0)},
    "weights_fusion": {"loss_weights": (2.0, 1.0, 1.0, 1.0)},
    # Table VI.
    "text_audio": {"text_source": "audio"},
    "text_video": {"text_source": "video"},
    # One modality alone.
    "audio_only": {"hlo": False, "guide": False, "fusion": "concat", "streams": ("audio",)},
    "video_only": {"hlo": False, "guide": False, "fusion": "concat", "streams": ("video",)},
    "text_only": {"hlo": False, "guide": False, "fusion": "concat", "streams": ("text",)},
    # Readings of the equations that the paper leaves open.
    "ratio_weights": {"weighting": "ratio"},
    "summary_query": {"query": "summary"},
}


def cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    """Computes the cosine along the last axis (Eq. 3), 0 where either vector is zero; in float32."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    norm = jax.lax.rsqrt(jnp.maximum(jnp.sum(a * a, -1) * jnp.sum(b * b, -1), 1e-12))
    return jnp.sum(a * b, -1) * norm


def step_weights(similarity: jax.Array, mask: jax.Array, weighting: str, temperature: float) -> jax.Array:
    """Computes the step weights of Eq. 4: (b, n), summing to 1 over the valid steps, zeros for a clip without any.

    `softmax` divides the cosines by `temperature`; `ratio` is the paper's quotient with negative cosines clipped to 0,
    and even weights if none is positive.
    """
    if weighting == "softmax":
        return masked_softmax(similarity / temperature, mask)
    positive = jnp.where(mask, jnp.maximum(similarity, 0.0), 0.0)
    total = jnp.sum(positive, -1, keepdims=True)
    even = masked_softmax(jnp.zeros_like(similarity), mask)
    return jnp.where(total > 0, positive / jnp.where(total > 0, total, 1.0), even)


def segments(x: jax.Array, mask: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Averages a masked stream over `count` equal spans of its clip: the common time base of Eq. 5.

    Span g covers the steps from floor(g·n/count) up to ceil((g+1)·n/count), where n is the clip's own number of steps
    (up to its last valid one), so padding has no effect and a short clip leaves no span empty.

    Args:
      x: (b, n, d).
      mask: (b, n).
      count: number of spans.

    Returns:
      Averages (b, count, d) and their mask (b, count).
    """
    step = jnp.arange(x.shape[1])[None, None, :]  # (1, 1, n)
    span = jnp.arange(count)[None, :, None]  # (1, g, 1)
    length = jnp.max(jnp.where(mask, step[0] + 1, 0), -1)[:, None, None]  # (b, 1, 1)
    member = (
        (step >= span * length // count) & (step < -(-(span + 1) * length // count)) & mask[:, None, :]
    )  # (b, g, n)
    total = jnp.einsum("bgn,bnd->bgd", member.astype(x.dtype), jnp.where(mask[..., None], x, 0))
    size = jnp.sum(member, -1)
    return total / jnp.maximum(size, 1).astype(x.dtype)[..., None], size > 0


class Guide(nn.Module):
    """Eqs. 3–4: reweights the steps of a stream by their similarity to the text summary.

    A trained linear layer maps the text vector into the stream's space, as the encoders' spaces are unrelated.
    """

    weighting: str
    temperature: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, summary: jax.Array, has_text: jax.Array, x: jax.Array, mask: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Maps summary (b, d), has_text (b,), x (b, n, d) and mask (b, n) to x reweighted and its weights (b, n)."""
        mapped = nn.Dense(x.shape[-1], dtype=self.dtype, name="map")(summary)
        similarity = jnp.where(has_text[:, None], cosine(mapped[:, None, :], x), 0.0)
        weights = step_weights(similarity, mask, self.weighting, self.temperature)
        # Times the number of valid steps, so that even weights change nothing.
        scale = weights * jnp.sum(mask, -1, keepdims=True).astype(weights.dtype)
        return x * scale[..., None].astype(x.dtype), weights


class Linear(nn.Module):
    """Affine map of the last axis of x, (..., inputs) → (..., width), with a transpose (`transposed`)."""

    inputs: int
    width: int
    dtype: jnp.dtype

    def setup(self) -> None:
        """Creates kernel and bias."""
        self.kernel = self.param("kernel", nn.initializers.lecun_normal(), (self.inputs, self.width))
        self.bias = self.param("bias", nn.initializers.zeros, (self.width,))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x (..., inputs) to (..., width)."""
        y = jnp.tensordot(x.astype(self.dtype), self.kernel.astype(self.dtype), 1)
        return y + jnp.broadcast_to(self.bias.astype(self.dtype), y.shape)

    def transposed(self, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps rows (..., width) to a result (..., inputs) and an offset (...) with map(x)·row = x·result + offset.

        For products of many x with few rows, this maps the few rows instead of the many x.
        """
        rows = rows.astype(self.dtype)
        return rows @ self.kernel.T.astype(self.dtype), jnp.tensordot(rows, self.bias.astype(self.dtype), 1)


class TextQuery(nn.Module):
    """Eq. 5: attention with text as queries, audio as keys and video as values, on a common number of segments.

    `kind` "attention" is the scaled dot product, "additive" Bahdanau's v·tanh(Wq + Wk) (Table IV). The fused vector is
    the mean of the contexts of all tokens, computed from the tokens' mean weights.
    """

    kind: str
    width: int
    count: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self,
        text: Stream,
        audio: Stream,
        video: Stream,
        project: Linear | None = None,
        kept: jax.Array | float = 1.0,
    ) -> tuple[jax.Array, jax.Array]:
        """Maps the streams to the fused vector (b, d) and weights (b, l, g).

        Args:
          text: queries (b, l, w) and their mask.
          audio: keys (b, n, d) and their mask.
          video: values (b, n, d) and their mask.
          project: maps text to the model's width.
          kept: (b, 1, d), dropout factors of the text features.
        """
        text, text_mask = text
        linear = lambda name: Linear(self.width, self.width, self.dtype, name=name)  # noqa: E731
        audio, has_audio = segments(*audio, self.count)
        video, has_video = segments(*video, self.count)
        any_video = jnp.any(has_video, -1)
        source = jnp.where(any_video[:, None, None], video, audio)
        valid = jnp.where(any_video[:, None], has_video, has_audio)  # (b, g)
        # A segment without audio scores 0, so that without any audio the video segments get even weights.
        key = jnp.where(has_audio[..., None], linear("key")(audio), 0)
        if self.kind == "additive":
            query = linear("query")(kept * (project(text) if project else text))
            scores = jnp.where(has_audio[:, None, :], self._additive(query, key), 0)
        else:
            scores = self._dot(linear("query"), text, project, kept, key)
        weights = masked_softmax(scores, valid[:, None, :])  # (b, l, g)
        mean = masked_mean(weights, text_mask).astype(self.dtype)  # (b, g)
        fused = linear("value")(jnp.einsum("bg,bgd->bd", mean, source))
        defined = jnp.any(valid, -1) & jnp.any(text_mask, -1)
        return jnp.where(defined[:, None], fused, 0), weights

    def _dot(
        self, query: Linear, text: jax.Array, project: Linear | None, kept: jax.Array, key: jax.Array
    ) -> jax.Array:
        rows, offset = query.transposed(key / jnp.sqrt(self.width).astype(key.dtype))
        rows = rows * kept
        if project:
            rows, more = project.transposed(rows)
            offset = offset + more
        return jnp.einsum("blw,bgw->blg", text.astype(rows.dtype), rows) + offset[:, None]

    def _additive(self, query: Linear, key: jax.Array) -> jax.Array:
        vector = self.param("score", nn.initializers.lecun_normal(), (self.width, 1))[:, 0]
        hidden = jnp.tanh(query[:, :, None, :] + key[:, None, :, :])  # (b, l, g, d)
        return jnp.einsum("blgd,d->blg", hidden, vector.astype(hidden.dtype))


class EtgAver(nn.Module):
    """ETG-AVER and, by its settings, every row of the paper's Tables III–VI and Figure 3.

    Attributes:
      classes: number of classes c.
      width: model width d; streams of another width are mapped by a linear layer.
      streams: which of text, audio, video are read.
      guide: reweight audio and video by the text, Eqs. 3–4.
      fusion: "concat", "additive" or "attention"; "concat" concatenates the averaged streams.
      hlo: whether every stream has a head as well, Eqs. 6–7.
      weighting, temperature: Eq. 4, "softmax" or "ratio".
      query: the queries of Eq. 5, all text "tokens" or only the "summary".
      summary: the text's "first" token, or the "mean" of its tokens for encoders trained that way.
      segment_count: g of Eq. 5.
      dropout: rate on the features of the projected streams and of the fused vector, training only.
      dtype: compute dtype; parameters stay float32, as do softmax, cosine and logits.
    """

    classes: int
    width: int = 768
    streams: tuple[str, ...] = ("text", "audio", "video")
    guide: bool = True
    fusion: str = "attention"
    hlo: bool = True
    weighting: str = "softmax"
    temperature: float = 0.1
    query: str = "tokens"
    summary: str = "first"
    segment_count: int = 8
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, batch: Mapping[str, jax.Array], train: bool = False) -> Output:
        """Reads `<stream> (b, n, w)` and `<stream>_mask (b, n)` of its streams."""
        drop = nn.Dropout(self.dropout, deterministic=not train)
        masks = {s: batch[f"{s}_mask"] for s in self.streams}
        inputs = {s: jnp.where(masks[s][..., None], batch[s], 0).astype(self.dtype) for s in self.streams}
        maps = {s: self._map(s, inputs[s].shape[-1]) for s in self.streams}
        kept = {s: self._kept(len(masks[s]), train) for s in self.streams}
        vectors = dict.fromkeys(self.streams)
        steps = {s: self._mapped(maps[s], inputs[s], masks[s]) * kept[s] for s in self.streams if s != "text"}
        if "text" in self.streams:
            vectors["text"] = self._summary(maps["text"], inputs["text"], masks["text"]) * kept["text"][:, 0]
        attention = {}
        for s in steps:
            if self.guide:
                guide = Guide(self.weighting, self.temperature, self.dtype, name=f"guide_{s}")
                has_text = jnp.any(masks["text"], -1)
                steps[s], attention[s] = guide(vectors["text"], has_text, steps[s], masks[s])
            vectors[s] = masked_mean(steps[s], masks[s])
        if self.fusion == "concat":
            fused = jnp.concatenate([vectors[s] for s in self.streams], -1)
        else:
            fuse = TextQuery(self.fusion, self.width, self.segment_count, self.dtype, name="fuse")
            sources = (steps["audio"], masks["audio"]), (steps["video"], masks["video"])
            if self.query == "tokens":
                queries, extra = (inputs["text"], masks["text"]), (maps["text"], kept["text"])
            else:
                queries, extra = (vectors["text"][:, None], jnp.any(masks["text"], -1, keepdims=True)), ()
            fused, attention["fusion"] = fuse(queries, *sources, *extra)
        features = {"fusion": drop(fused)} | (vectors if self.hlo else {})
        logits = {head: self._classify(head, x) for head, x in features.items()}
        return Output(logits=logits, features=features, attention=attention)

    def _map(self, name: str, inputs: int) -> Linear | None:
        """Returns the layer that maps a stream to the model's width, None if it has that width."""
        return None if inputs == self.width else Linear(inputs, self.width, self.dtype, name=f"project_{name}")

    def _kept(self, clips: int, train: bool) -> jax.Array:
        """Draws dropout factors (b, 1, d), the same for all steps: independent ones would average out over steps."""
        drop = nn.Dropout(self.dropout, deterministic=not train)
        return drop(jnp.ones((clips, 1, self.width), self.dtype))

    def _mapped(self, project: Linear | None, x: jax.Array, mask: jax.Array) -> jax.Array:
        return jnp.where(mask[..., None], project(x), 0) if project else x

    def _summary(self, project: Linear | None, text: jax.Array, mask: jax.Array) -> jax.Array:
        """Summarises the text (b, l, w) in one vector (b, d); pooled first, so that only one row is mapped."""
        pooled, present = text[:, 0], mask[:, 0]
        if self.summary == "mean":
            pooled, present = masked_mean(text, mask), jnp.any(mask, -1)
        return self._mapped(project, pooled, present)

    def _classify(self, head: str, x: jax.Array) -> jax.Array:
        return nn.Dense(self.classes, name=f"head_{head}")(x.astype(jnp.float32))


def hierarchical_loss(
    output: Output,
    batch: Mapping[str, jax.Array],
    prior: jax.Array,
    *,
    weights: Mapping[str, float],
    imbalance: str,
    smoothing: float,
) -> dict[str, jax.Array]:
    """Computes one weighted cross entropy per head and clip (Eqs. 6–7), 0 for modalities that a clip lacks.

    Args:
      output: of the model.
      batch: with `label (b,)` and the masks of the streams.
      prior: (c,) class frequencies of the training labels, for the imbalance options.
      weights: head name → factor.
      imbalance: as `EtgAverSettings.imbalance`; "focal" replaces the cross entropy by the focal loss with γ = 2.
      smoothing: label smoothing, not used by the focal loss.

    Returns:
      {head: (b,)}.
    """
    factor = losses.balanced_weights(prior) if imbalance == "class_weights" else None
    entropy = functools.partial(losses.cross_entropy, smoothing=smoothing, class_weight=factor)
    cost = losses.focal if imbalance == "focal" else entropy
    terms = {}
    for head, logits in output.logits.items():
        if imbalance == "logit_adjustment":
            logits = losses.adjust_logits(logits, prior)
        loss = weights[head] * cost(logits, batch["label"])
        terms[head] = loss if head == "fusion" else jnp.where(jnp.any(batch[f"{head}_mask"], -1), loss, 0.0)
    return terms


def build(settings: EtgAverSettings, classes: int, task: str) -> Model:
    """Builds the model for a task; other tasks than "single" replace the cross entropy by their own loss.

    Raises:
      AvjaxError: a setting for single-label classification is used for another task.
    """
    if task != "single" and (settings.imbalance != "none" or settings.smoothing):
        raise AvjaxError(
            f"model.imbalance is {settings.imbalance!r}, model.smoothing {settings.smoothing}; both are for classes, "
            f"and the task is {task!r}: set 'none' and 0"
        )
    heads = ("fusion", *(settings.streams if settings.hlo else ()))
    weights = dict(zip(("fusion", "text", "audio", "video"), settings.loss_weights, strict=True))
    own = {key: getattr(settings, key) for key in _SETTINGS}
    module = EtgAver(classes=classes, streams=settings.streams, dtype=jnp.dtype(settings.dtype), **own)

    def loss(output: Output, batch: Mapping[str, jax.Array], prior: jax.Array) -> dict[str, jax.Array]:
        if task != "single":
            return {head: weights[head] * head_loss(output, batch, head, task) for head in output.logits}
        return hierarchical_loss(
            output, batch, prior, weights=weights, imbalance=settings.imbalance, smoothing=settings.smoothing
        )

    return Model(module=module, loss=loss, heads=heads, streams=settings.streams, task=task)
