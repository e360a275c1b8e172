"""EmoAsst: frozen video and audio encoders, adapted to emotions by contrastive learning with prompts.

Wang and Yang 2024, "EmoAsst: emotion recognition assistant via text-guided transfer learning on pre-trained visual and
acoustic models". Section and equation numbers are the paper's. Shapes: b clip, t video step, s audio step, d width,
e width of text features, c class.

The module outputs one vector of length 1 per modality, and the logits of the zero-shot classifier (Eq. 2); the
classifiers that read the vectors are fitted after training (`Model.readers`). In training the video query is a prompt
with the label, drawn for each clip at each step; otherwise it is the text of the clip, and no label is read. The paper
trains both branches separately; as they share no parameters, their losses are simply added.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from avjax.errors import AvjaxError
from avjax.layers import PostNormBlock, Project, masked_mean
from avjax.models.base import Loss, Model, Output
from avjax.settings import STREAMS, FusionSettings, check_model_settings
from avjax.tasks import contrastive

TEMPERATURE = 0.07  # τ of the losses and of the zero-shot softmax over cosines
READERS = ("cache", "tuned", "zero", "probe")
PREDICTING = READERS[:3]  # the linear probe only evaluates features (Table 2)
CHOICES = {"visual_loss": ("clip", "supcon"), "reader": PREDICTING}
BOTH = "both"
_OF_MODULE = ("width", "heads", "inner", "queries", "dropout", "prompt", "label_in_query")
_EPS = 1e-5


class VisualFusion(nn.Module):
    """The visual fusion module (section 3.2.1): an encoder layer for each frame alone, then two decoder layers.

    The queries attend to the frames. With a single query, the decoder's self-attention gives its query and key
    projections no gradient; the encoder layer's never get one.
    """

    heads: int
    inner: int
    dropout: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, query: jax.Array, frames: jax.Array, mask: jax.Array, train: bool = False) -> jax.Array:
        """Maps queries (b, m, d) and frames (b, t, d) under mask (b, t) to (b, d), the mean over the queries."""
        block = functools.partial(PostNormBlock, self.heads, self.inner, nn.relu, _EPS, self.dtype, self.dropout)
        alone = block(name="frame")(frames.reshape(-1, 1, frames.shape[-1]), mask.reshape(-1, 1), train=train)
        frames = alone.reshape(frames.shape)
        every = jnp.ones(query.shape[:2], bool)
        for i in range(2):
            query = block(name=f"decoder_{i}")(query, every, frames, mask, train)
        return jnp.mean(query, 1)


class AuditoryAdapter(nn.Module):
    """The auditory adapter (section 3.3.1): three encoder layers over audio, then the mean over steps."""

    heads: int
    inner: int
    dropout: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, audio: jax.Array, mask: jax.Array, train: bool = False) -> jax.Array:
        """Maps audio (b, s, d) under mask (b, s) to (b, d)."""
        for i in range(3):
            block = PostNormBlock(self.heads, self.inner, nn.relu, _EPS, self.dtype, self.dropout, name=f"block_{i}")
            audio = block(audio, mask, train=train)
        return masked_mean(audio, mask)


class EmoAsst(nn.Module):
    """Both branches and the zero-shot classifier.

    Attributes:
      streams: of "text", "audio" and "video"; text is the query and the contrast where no prompt is drawn.
      width: d. Inputs of another width are mapped by a linear layer, and features to the width of the texts, if that
        differs, by another one.
      heads, inner: of all transformer layers; queries: m of the visual fusion module; dropout: rate, placed as in
        PyTorch's layers.
      prompt: contrast with prompts in training; False = with the text of the clip, as in rows without "+ prompt".
      label_in_query: whether the video query is the drawn prompt, with the label, as in the paper; False = always the
        text of the clip.
    """

    streams: tuple[str, ...] = ("text", "audio", "video")
    width: int = 512
    heads: int = 8
    inner: int = 2048
    queries: int = 1
    dropout: float = 0.1
    prompt: bool = True
    label_in_query: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, batch: Mapping[str, jax.Array], train: bool = False, with_label: bool = False) -> Output:
        """Reads `<stream> (b, n, w)`, `<stream>_mask (b, n)`, `classes (c, e)`, and in training `prompts (b, p, e)`.

        With `with_label`, the video query outside of training is the first prompt, which names the label, to measure
        how much is lost without it.
        """
        text = self._text(batch)
        drawn = self._drawn(batch) if train and self.prompt else text
        query = drawn if self.label_in_query else text
        if with_label:
            query = contrastive.unit(batch["prompts"][:, 0])
        branches = {"video": functools.partial(self._video, query), "audio": self._audio}
        features = {m: branches[m](batch, train) for m in modalities(self.streams)}
        rows, classes = jnp.stack([*features.values()]), contrastive.unit(batch["classes"])
        inputs = dict(zip(features, rows[:, None], strict=True))
        if len(features) > 1:
            inputs = {BOTH: rows} | inputs
        logits = {f"{name}_zero": zero_shot_scores(x, classes) / TEMPERATURE for name, x in inputs.items()}
        return Output(logits=logits, features=features | {"text": drawn}, attention={})

    def _text(self, batch: Mapping[str, jax.Array]) -> jax.Array:
        """Returns the text feature of each clip, (b, e) of length 1; zeros where it has none."""
        width = batch["classes"].shape[-1]
        if "text" not in self.streams:
            return jnp.zeros((batch["weight"].shape[0], width))
        if batch["text"].shape[-1] != width:
            raise AvjaxError(
                f"the model reads texts of width {batch['text'].shape[-1]}, the prompts are of {width}: set "
                'prompts.preset to "", the encoder of the texts, or model.text_source to "utterance"'
            )
        return contrastive.unit(masked_mean(batch["text"], batch["text_mask"]))

    def _drawn(self, batch: Mapping[str, jax.Array]) -> jax.Array:
        """Draws one of the prompts of each clip: (b, e), of length 1."""
        count, formats = batch["prompts"].shape[:2]
        index = jax.random.randint(self.make_rng("dropout"), (count, 1, 1), 0, formats)
        return contrastive.unit(jnp.take_along_axis(batch["prompts"], index, 1)[:, 0])

    def _video(self, text: jax.Array, batch: Mapping[str, jax.Array], train: bool) -> jax.Array:
        learned = self.param("query", nn.initializers.normal(0.02), (self.queries, self.width))
        query = learned[None].astype(self.dtype) + self._projected("text", text.astype(self.dtype))[:, None]
        fusion = VisualFusion(self.heads, self.inner, self.dropout, self.dtype, name="vfm")
        return self._feature(batch, "video", lambda x, mask: fusion(query, x, mask, train))

    def _audio(self, batch: Mapping[str, jax.Array], train: bool) -> jax.Array:
        adapter = AuditoryAdapter(self.heads, self.inner, self.dropout, self.dtype, name="aa")
        return self._feature(batch, "audio", lambda x, mask: adapter(x, mask, train))

    def _feature(self, batch: Mapping[str, jax.Array], stream: str, branch: Callable[..., jax.Array]) -> jax.Array:
        """Computes the feature of a modality, (b, e) of length 1; zeros where a clip lacks it."""
        mask = batch[f"{stream}_mask"]
        x = jnp.where(mask[..., None], batch[stream], 0).astype(self.dtype)
        feature, joint = branch(self._projected(stream, x), mask), batch["classes"].shape[-1]
        if joint != self.width:
            feature = Project((joint,), dtype=self.dtype, name=f"express_{stream}")(feature)
        return jnp.where(jnp.any(mask, -1)[:, None], contrastive.unit(feature), 0)

    def _projected(self, name: str, x: jax.Array) -> jax.Array:
        if x.shape[-1] == self.width:
            return x
        return Project((self.width,), dtype=self.dtype, name=f"project_{name}")(x)


def zero_shot_scores(rows: np.ndarray | jax.Array, text: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
    """Computes the cosines of clips to the class texts (Eq. 2), averaged over the modalities that a clip has.

    Args:
      rows: (…, k, m, d) features of m clips in k modalities, of length 1, or zeros where a clip lacks the modality.
      text: (…, c, d) class weights, of length 1.

    Returns:
      (…, m, c), zeros for a clip without any modality.
    """
    count = (rows != 0).any(-1).sum(-2).astype(rows.dtype).clip(1)  # (…, m)
    cosines = rows @ text.swapaxes(-1, -2)[..., None, :, :]
    return cosines.sum(-3) / count[..., None]


def modalities(streams: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the modalities among the streams, video first."""
    return tuple(m for m in ("video", "audio") if m in streams)


def contrast(visual: str, temperature: float = TEMPERATURE) -> Loss:
    """Returns the loss of both branches (sections 3.2.2 and 3.3.2).

    Clips without a modality, or without text, are left out of its loss and cost 0.

    Args:
      visual: the video loss, "clip", the symmetric loss of pairs, or "supcon"; that of audio is always SupCon (Eq. 1).
      temperature: τ.
    """

    def loss(output: Output, batch: Mapping[str, jax.Array], prior: jax.Array) -> dict[str, jax.Array]:
        text, terms = output.features["text"], {}
        has_text = batch["weight"] * jnp.any(text != 0, -1)
        for m in modalities(tuple(output.features)):
            x, counts = output.features[m], has_text * jnp.any(batch[f"{m}_mask"], -1)
            if m == "video" and visual == "clip":
                terms[m] = contrastive.clip_loss(x, text, counts, temperature=temperature)
            else:
                terms[m] = contrastive.supcon(x, text, batch["label"], counts, temperature=temperature)
        return terms

    return loss


def settings() -> dict[str, Any]:
    """Returns the settings with the paper's values; `CHOICES` lists the allowed strings."""
    return {name: getattr(EmoAsst, name) for name in _OF_MODULE} | {
        "visual_loss": "clip",
        "reader": "cache",
        "shots": 16,  # K, not stated by the paper
        "tune_steps": 100,  # of the tuned keys
        "tune_rate": 1e-3,
    }


def check(given: FusionSettings) -> None:
    """Checks streams and own settings.

    Raises:
      AvjaxError: a setting is unknown or does not fit, or the streams have neither video nor audio.
    """
    check_model_settings(given.settings, settings(), CHOICES)
    if not modalities(given.streams) or not set(given.streams) <= set(STREAMS):
        raise AvjaxError(f"model.streams is {given.streams}; EmoAsst reads video, audio or both, and text beside them")
    if "text" not in given.streams and not given.settings.get("prompt", EmoAsst.prompt):
        raise AvjaxError("model.settings.prompt=False trains by the text of the clips; add text to model.streams")


def build(given: FusionSettings, classes: int, task: str) -> Model:
    """Builds the model from checked settings (`check`)."""
    own, read = settings() | dict(given.settings), modalities(given.streams)
    shape = {key: own[key] for key in _OF_MODULE}
    module = EmoAsst(streams=given.streams, dtype=jnp.dtype(given.dtype), **shape)
    predicted = (BOTH, *read) if len(read) > 1 else read
    primary = f"{predicted[0]}_{own['reader']}"
    others = [head for m in predicted for reader in READERS if (head := f"{m}_{reader}") != primary]
    return Model(
        module=module,
        loss=contrast(own["visual_loss"]),
        heads=tuple(f"{m}_zero" for m in predicted),
        streams=given.streams,
        task=task,
        readers=(primary, *others),
        whole_batch=True,
    )
