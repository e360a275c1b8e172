"""BERT (Devlin et al. 2019) and DistilBERT (Sanh et al. 2019): word pieces → one vector a piece.

DistilBERT is the same network without token types; its checkpoints differ only in names. A text is always a single
segment, so the token type is always 0.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from avjax.encoders import base, weights
from avjax.encoders.base import Inputs
from avjax.errors import AvjaxError
from avjax.layers import PostNormBlock

INPUTS = Inputs("token ids (batch, length)", rank=2, length_axis=1, least=8, text=True)


@dataclasses.dataclass(frozen=True)
class BertConfig(base.TextConfig):
    """Architecture of a checkpoint; widths are numbers of units."""

    model_type: str  # "bert" or "distilbert"
    vocab: int
    width: int
    layers: int
    heads: int
    inner: int  # width of the feed-forward layer
    positions: int  # the longest text, in word pieces
    types: int  # token types; 0 for DistilBERT, which has none
    activation: str
    eps: float  # of layer normalisation

    @classmethod
    def from_hub(cls, config: Mapping[str, Any]) -> "BertConfig":
        """Reads the contents of the hub's config.json.

        Raises:
          AvjaxError: a value is missing, or asks for an unsupported variant.
        """
        fields = base.read(config, _KEYS[config["model_type"]])
        base.activation(fields["activation"])
        if config.get("position_embedding_type", "absolute") != "absolute" or config.get("is_decoder"):
            raise AvjaxError("only BERT encoders with absolute positions are supported; see config.json")
        return cls(**{"types": 0, "eps": 1e-12} | fields)


_KEYS = {
    "bert": {
        "model_type": "model_type",
        "vocab": "vocab_size",
        "width": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "inner": "intermediate_size",
        "positions": "max_position_embeddings",
        "types": "type_vocab_size",
        "activation": "hidden_act",
        "eps": "layer_norm_eps",
    },
    "distilbert": {
        "model_type": "model_type",
        "vocab": "vocab_size",
        "width": "dim",
        "layers": "n_layers",
        "heads": "n_heads",
        "inner": "hidden_dim",
        "positions": "max_position_embeddings",
        "activation": "activation",
    },
}


class Bert(nn.Module):
    """The encoder without pooler and heads. Params are float32; `dtype` is the dtype of matrix products.

    `layer` is the number of blocks to compute; None: all. With `remat`, gradients recompute activations within blocks
    to save memory.
    """

    config: BertConfig
    dtype: jnp.dtype = jnp.float32
    layer: int | None = None
    remat: bool = False

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps token ids (b, l) int32 with mask (b, l) bool to hidden states (b, l, d) in `dtype`, and the mask.

        Raises:
          AvjaxError: l exceeds the number of positions.
        """
        c = self.config
        if ids.shape[1] > c.positions:
            raise AvjaxError(f"{ids.shape[1]} word pieces, but this encoder has {c.positions} positions; truncate")
        ids = jnp.where(mask, ids, 0)  # an id outside the vocabulary would give NaN, even in the padding
        x = nn.Embed(c.vocab, c.width, name="words")(ids)  # b l d
        x += nn.Embed(c.positions, c.width, name="positions")(jnp.arange(ids.shape[1]))[None]
        if c.types:
            x += nn.Embed(c.types, c.width, name="types")(jnp.zeros((1, 1), jnp.int32))
        x = nn.LayerNorm(c.eps, self.dtype, use_fast_variance=False, name="embedding_norm")(x)
        block = nn.remat(PostNormBlock) if self.remat else PostNormBlock
        for i in range(base.block_count(self.layer, c.layers)):
            activation = base.activation(c.activation)
            x = block(c.heads, c.inner, activation, c.eps, self.dtype, name=f"block_{i}")(x, mask)
        return x, mask


def build(config: Mapping[str, Any], dtype: jnp.dtype, layer: int | None) -> Bert:
    """Builds the module from the contents of a hub config.json."""
    return Bert(BertConfig.from_hub(config), dtype, layer)


def shapes(config: BertConfig) -> dict[str, Any]:
    """Returns the shapes of the params of `Bert(config)` without computing them."""
    return base.shapes(Bert(config), ((1, 1), jnp.int32), ((1, 1), jnp.bool_))


_TOP = {
    "words": "embeddings.word_embeddings",
    "positions": "embeddings.position_embeddings",
    "types": "embeddings.token_type_embeddings",
    "embedding_norm": "embeddings.LayerNorm",
}
_BLOCK = {
    "bert": {
        "attention/query": "attention.self.query",
        "attention/key": "attention.self.key",
        "attention/value": "attention.self.value",
        "attention/out": "attention.output.dense",
        "attention_norm": "attention.output.LayerNorm",
        "up": "intermediate.dense",
        "down": "output.dense",
        "norm": "output.LayerNorm",
    },
    "distilbert": {
        "attention/query": "attention.q_lin",
        "attention/key": "attention.k_lin",
        "attention/value": "attention.v_lin",
        "attention/out": "attention.out_lin",
        "attention_norm": "sa_layer_norm",
        "up": "ffn.lin1",
        "down": "ffn.lin2",
        "norm": "output_layer_norm",
    },
}
_LAYERS = {"bert": "encoder.layer", "distilbert": "transformer.layer"}
# Heads of pretraining and fine-tuning, the pooler, and a constant in old checkpoints.
IGNORED = re.compile(r"^(pooler|cls|vocab_\w+|pre_classifier|classifier|qa_outputs)\.|^embeddings\.position_ids$")


def convert(tensors: Mapping[str, np.ndarray], config: BertConfig) -> dict[str, Any]:
    """Converts a PyTorch checkpoint, with or without its model's prefix, to the params of `Bert(config)`.

    Raises:
      AvjaxError: tensors are missing, left over and not IGNORED, or of a wrong shape; the message names them.
    """
    plain = {_plain(name, config.model_type): tensor for name, tensor in tensors.items()}
    kind = config.model_type
    name_of = functools.partial(base.torch_name, top=_TOP, layers=_LAYERS[kind], block=_BLOCK[kind])
    return weights.convert(plain, shapes(config), name_of, IGNORED)


def _plain(name: str, model_type: str) -> str:
    # Checkpoints converted from TensorFlow, such as bert-base-uncased, name scale and bias of norms gamma and beta.
    return name.removeprefix(f"{model_type}.").replace(".gamma", ".weight").replace(".beta", ".bias")
