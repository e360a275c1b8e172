"""EmoAsst: frozen encoders of picture and sound, adapted to emotions by contrast with prompts that name them.

Wang and Yang 2024, "EmoAsst: emotion recognition assistant via text-guided transfer learning on pre-trained visual and
acoustic models". Section and equation numbers are the paper's. Shapes: b clip, t video step, s audio step, d width,
e width of the texts, c class.

The module gives one vector of length 1 for each modality, and the answers of the zero-shot classifier (Eq. 2); the
classifiers that read the vectors come after training (`Model.readers`). In training the query of the picture is a
prompt, drawn for each clip at each step, that names the label; everywhere else it is the text of the clip alone, and no
label is read. The paper trains both branches separately: they share no parameter, and their losses are added.
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

TEMPERATURE = 0.07  # τ of the losses, and at which cosines become probabilities
READERS = ("cache", "tuned", "zero", "probe")
PREDICTING = READERS[:3]  # the linear probe measures features (Table 2)
CHOICES = {"visual_loss": ("clip", "supcon"), "reader": PREDICTING}
BOTH = "both"
_OF_MODULE = ("width", "heads", "inner", "queries", "dropout", "prompt", "label_in_query")
_EPS = 1e-5


class VisualFusion(nn.Module):
    """The visual fusion module (section 3.2.1): an encoder layer for each frame alone, then two decoder layers.

    The queries ask the frames; with one of them the decoder's self-attention leaves its query and key without gradient,
    as the encoder layer's always are.
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
    """The auditory adapter (section 3.3.1): three encoder layers over the sound, and the mean of its steps."""

    heads: int
    inner: int
    dropout: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, sound: jax.Array, mask: jax.Array, train: bool = False) -> jax.Array:
        """Maps sound (b, s, d) under mask (b, s) to (b, d)."""
        for i in range(3):
            block = PostNormBlock(self.heads, self.inner, nn.relu, _EPS, self.dtype, self.dropout, name=f"block_{i}")
            sound = block(sound, mask, train=train)
        return masked_mean(sound, mask)


class EmoAsst(nn.Module):
    """Both branches and the zero-shot classifier.

    Attributes:
      streams: of "text", "audio" and "video"; text is what the query and the contrast say where no prompt is drawn.
      width: d. What has another width enters by a linear layer, and where the texts have another, which features are
        compared with, features leave by one.
      heads, inner: of all transformer layers; queries: m of the visual fusion module; dropout: as PyTorch's layers have
        it.
      prompt: contrast with prompts in training; False = with the text of the clip, as rows without "+ prompt" do.
      label_in_query: whether the query of the video is the drawn prompt too, with the label, as in the paper; False =
        always the text of the clip.
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

        Args:
          with_label: outside of training, query the video with the first prompt, which names the label: to measure how
            much is lost without it.
        """
        said = self._said(batch)
        drawn = self._drawn(batch) if train and self.prompt else said
        query = drawn if self.label_in_query else said
        if with_label:
            query = contrastive.unit(batch["prompts"][:, 0])
        branches = {"video": functools.partial(self._seen, query), "audio": self._heard}
        features = {m: branches[m](batch, train) for m in modalities(self.streams)}
        rows, classes = jnp.stack([*features.values()]), contrastive.unit(batch["classes"])
        asked = dict(zip(features, rows[:, None], strict=True))
        if len(features) > 1:
            asked = {BOTH: rows} | asked
        logits = {f"{name}_zero": zero_shot_scores(some, classes) / TEMPERATURE for name, some in asked.items()}
        return Output(logits=logits, features=features | {"text": drawn}, attention={})

    def _said(self, batch: Mapping[str, jax.Array]) -> jax.Array:
        """What the text of each clip says, (b, e) of length 1; zeros where it has none."""
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
        """One of the prompts of each clip, (b, e) of length 1."""
        count, formats = batch["prompts"].shape[:2]
        place = jax.random.randint(self.make_rng("dropout"), (count, 1, 1), 0, formats)
        return contrastive.unit(jnp.take_along_axis(batch["prompts"], place, 1)[:, 0])

    def _seen(self, text: jax.Array, batch: Mapping[str, jax.Array], train: bool) -> jax.Array:
        asked = self.param("query", nn.initializers.normal(0.02), (self.queries, self.width))
        query = asked[None].astype(self.dtype) + self._fitting("text", text.astype(self.dtype))[:, None]
        fusion = VisualFusion(self.heads, self.inner, self.dropout, self.dtype, name="vfm")
        return self._of(batch, "video", lambda x, mask: fusion(query, x, mask, train))

    def _heard(self, batch: Mapping[str, jax.Array], train: bool) -> jax.Array:
        adapter = AuditoryAdapter(self.heads, self.inner, self.dropout, self.dtype, name="aa")
        return self._of(batch, "audio", lambda x, mask: adapter(x, mask, train))

    def _of(self, batch: Mapping[str, jax.Array], stream: str, branch: Callable[..., jax.Array]) -> jax.Array:
        """The feature of a modality, (b, e) of length 1; zeros where a clip lacks it."""
        mask = batch[f"{stream}_mask"]
        x = jnp.where(mask[..., None], batch[stream], 0).astype(self.dtype)
        feature, joint = branch(self._fitting(stream, x), mask), batch["classes"].shape[-1]
        if joint != self.width:
            feature = Project((joint,), dtype=self.dtype, name=f"express_{stream}")(feature)
        return jnp.where(jnp.any(mask, -1)[:, None], contrastive.unit(feature), 0)

    def _fitting(self, name: str, x: jax.Array) -> jax.Array:
        if x.shape[-1] == self.width:
            return x
        return Project((self.width,), dtype=self.dtype, name=f"project_{name}")(x)


def zero_shot_scores(rows: np.ndarray | jax.Array, text: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
    """Computes the cosines of clips to the class texts (Eq. 2), the mean over the modalities that a clip has.

    Args:
      rows: (…, k, m, d) features of m clips in k modalities, of length 1, or zeros where a clip lacks the modality.
      text: (…, c, d) class weights, of length 1.

    Returns:
      (…, m, c), zeros for a clip without any.
    """
    count = (rows != 0).any(-1).sum(-2).astype(rows.dtype).clip(1)  # (…, m)
    cosines = rows @ text.swapaxes(-1, -2)[..., None, :, :]
    return cosines.sum(-3) / count[..., None]


def modalities(streams: tuple[str, ...]) -> tuple[str, ...]:
    """Of the streams those that are recognised, picture first."""
    return tuple(m for m in ("video", "audio") if m in streams)


def contrast(visual: str, temperature: float = TEMPERATURE) -> Loss:
    """The losses of both branches (sections 3.2.2 and 3.3.2): clips in which a modality or the text is missing cost
    nothing there and are in nobody's set.

    Args:
      visual: "clip", the symmetric loss of pairs, or "supcon"; the sound's is always SupCon (Eq. 1).
    """

    def loss(output: Output, batch: Mapping[str, jax.Array], prior: jax.Array) -> dict[str, jax.Array]:
        text, terms = output.features["text"], {}
        there = batch["weight"] * jnp.any(text != 0, -1)
        for m in modalities(tuple(output.features)):
            x, counts = output.features[m], there * jnp.any(batch[f"{m}_mask"], -1)
            if m == "video" and visual == "clip":
                terms[m] = contrastive.clip_loss(x, text, counts, temperature=temperature)
            else:
                terms[m] = contrastive.supcon(x, text, batch["label"], counts, temperature=temperature)
        return terms

    return loss


def settings() -> dict[str, Any]:
    """What `model.settings` may hold, with the paper's values; `CHOICES` has those that are words."""
    return {name: getattr(EmoAsst, name) for name in _OF_MODULE} | {
        "visual_loss": "clip",
        "reader": "cache",
        "shots": 16,  # K, not stated
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
    """Makes the model of settings that `check` has passed."""
    own, read = settings() | dict(given.settings), modalities(given.streams)
    shape = {key: own[key] for key in _OF_MODULE}
    module = EmoAsst(streams=given.streams, dtype=jnp.dtype(given.dtype), **shape)
    answered = (BOTH, *read) if len(read) > 1 else read
    primary = f"{answered[0]}_{own['reader']}"
    others = [head for m in answered for reader in READERS if (head := f"{m}_{reader}") != primary]
    return Model(
        module=module,
        loss=contrast(own["visual_loss"]),
        heads=tuple(f"{m}_zero" for m in answered),
        streams=given.streams,
        task=task,
        readers=(primary, *others),
        whole_batch=True,
    )
