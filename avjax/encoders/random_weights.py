"""Random weights for encoders whose weights are not available: shapes are true, features are meaningless.

They allow everything to be tried and timed; anything with "random" in its provenance is not a result.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from avjax.errors import AvjaxError

SEED = 0
# Recorded in provenance instead of a sha256.
PROVENANCE = f"random, seed {SEED}"
# The ids of the first and the last token of a text, by model_type.
_ENDS = {"bert": (101, 102), "distilbert": (101, 102), "clip_text_model": (49406, 49407)}
_FIRST_BYTE = 1000  # the id of byte 0: above BERT's special tokens


def params(shapes: Mapping[str, Any]) -> Mapping[str, Any]:
    """Draws params of the given shapes; kernels as in He et al. 2015, so that features do not vanish with depth."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)
    rng = np.random.default_rng(SEED)
    return jax.tree.unflatten(tree, [_drawn(rng, path[-1].key, leaf.shape) for path, leaf in leaves])


def _drawn(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name in ("bias", "mean"):
        return np.zeros(shape, np.float32)
    if name in ("scale", "var"):
        return np.ones(shape, np.float32)
    spread = math.sqrt(2 / math.prod(shape[:-1])) if name == "kernel" else 0.02
    return spread * rng.standard_normal(shape, np.float32)


def tokenizer(model_type: str) -> Any:
    """Returns a `tokenizers.Tokenizer` without a vocabulary: one token a byte, between a first and a last token.

    Raises:
      AvjaxError: the encoder takes no text.
    """
    if model_type not in _ENDS:
        raise AvjaxError(f"a {model_type} takes no text")
    import tokenizers
    from tokenizers import models, pre_tokenizers, processors

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    first, last = _ENDS[model_type]
    vocabulary = {letter: _FIRST_BYTE + i for i, letter in enumerate(letters)} | {"[first]": first, "[last]": last}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[first] $A [last]", special_tokens=[("[first]", first), ("[last]", last)]
    )
    return tokenizer
