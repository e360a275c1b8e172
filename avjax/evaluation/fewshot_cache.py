"""The few-shot cache classifier of EmoAsst (section 3.4, Eqs. 2–4; Tip-Adapter, Zhang et al. 2021).

A zero-shot classifier of texts is improved by a cache of labelled clips: each votes for its label, the more the nearer
it is. Nothing is trained, so a correction by a user takes effect at once. Features have length 1; a row of zeros means
that a clip lacks the modality, in which it neither receives nor gives votes. Scores of a `Cache` are float64; the
equations also take JAX arrays, inside jit.
"""

import dataclasses
import itertools
import types
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from avjax.datasets.labels import unknown_label
from avjax.errors import AvjaxError
from avjax.models.emoasst import TEMPERATURE, zero_shot_scores
from avjax.utils.storage import replacing

# Search space of `fit`: residual ratios of each modality, and sharpnesses around that of Tip-Adapter.
ALPHAS = (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
BETAS = (1.375, 2.75, 5.5, 11.0, 22.0, 44.0)
# Before a fit: the defaults of Tip-Adapter, whose zero-shot scores are 100 times the cosines of Eq. 2.
ALPHA, BETA = 0.01, 5.5
# No cache may be larger, whoever wrote the file.
LIMITS = types.MappingProxyType({"classes": 1_000, "modalities": 4, "entries": 16_384, "width": 65_536})
_CHARACTERS = 1_000  # of an id, a class, an origin
_UNPACKED = 1 << 31  # bytes of a file: above any cache within the limits
_ROWS = 1_024  # clips that are compared with all entries at a time
_LENGTH = 1e-3  # how far a length may be from 1: what half precision leaves
_DIGITS = 9  # to which scores of a fit are compared

Array = np.ndarray | jax.Array
Features = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Cache:
    """Labelled clips and the zero-shot classifier that they improve. Immutable: every change makes another.

    Attributes:
      classes: names of the c classes.
      text: (c, d) class weights of the zero-shot classifier, of length 1.
      ids: of the n entries, sorted by class, then id, each once.
      label: (n,) integers in [0, c).
      keys: modality → (n, d) features of length 1, zeros for an entry that lacks the modality.
      alpha: modality → residual ratio, from 0.
      beta: sharpness, above 0.
      origin: the trained run of the features; features of two runs cannot be compared.
    """

    classes: tuple[str, ...]
    text: np.ndarray
    ids: tuple[str, ...]
    label: np.ndarray
    keys: Features
    alpha: Mapping[str, float]
    beta: float
    origin: str = ""

    def __post_init__(self) -> None:
        settle = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731
        keys = {name: _frozen(rows, np.float32) for name, rows in self.keys.items()}
        settle("text", _frozen(self.text, np.float32))
        settle("label", _frozen(self.label, np.int32))
        settle("keys", types.MappingProxyType(keys))
        settle("alpha", types.MappingProxyType({name: float(ratio) for name, ratio in self.alpha.items()}))
        settle("beta", float(self.beta))

    @property
    def modalities(self) -> tuple[str, ...]:
        """Returns the modalities, in the order of the arrays that functions return."""
        return tuple(self.keys)


def _frozen(values: np.ndarray, dtype: type) -> np.ndarray:
    values = np.array(values, dtype)
    values.flags.writeable = False
    return values


# ---- Checks of files -----------------------------------------------------------------------------------------------


def check(cache: Cache) -> None:
    """Checks a cache that is read from a file or written to one.

    Raises:
      AvjaxError: the cache is not as `Cache` describes, or is larger than LIMITS.
    """
    _check_size(cache)
    _check_names(cache)
    _check_arrays(cache)
    _check_numbers(cache)


def _check_size(cache: Cache) -> None:
    sizes = {
        "classes": len(cache.classes),
        "modalities": len(cache.keys),
        "entries": len(cache.ids),
        "width": cache.text.shape[1],
    }
    for name, size in sizes.items():
        if not (name != "entries") <= size <= LIMITS[name]:
            raise AvjaxError(f"a cache with {name}: {size}; expected {int(name != 'entries')} to {LIMITS[name]}")


def _check_names(cache: Cache) -> None:
    for name in (*cache.classes, *cache.keys, *cache.ids, cache.origin or "-"):
        # NumPy drops a zero at the end of a text.
        if not isinstance(name, str) or not 0 < len(name) <= _CHARACTERS or "\0" in name:
            raise AvjaxError(
                f"{str(name)[:40]!r} in a cache; names are of 1 to {_CHARACTERS} characters, none of them 0"
            )
    if len(set(cache.classes)) < len(cache.classes):
        raise AvjaxError(f"classes are {cache.classes}; expected each once")
    if len(set(cache.ids)) < len(cache.ids):
        twice = next(i for i in cache.ids if cache.ids.count(i) > 1)
        raise AvjaxError(f"clip {twice!r} comes twice; expected each once")


def _check_arrays(cache: Cache) -> None:
    n, (c, d) = len(cache.ids), cache.text.shape
    _check_label(cache.label, n, len(cache.classes))
    if c != len(cache.classes):
        raise AvjaxError(
            f"text weights are {cache.text.shape}; expected a row for each of {len(cache.classes)} classes"
        )
    order = list(zip(cache.label.tolist(), cache.ids, strict=True))
    if order != sorted(order):
        raise AvjaxError("the entries of a cache are not sorted by class and id; make it by `add`")
    _check_rows("text", cache.text, c, d)
    if not np.linalg.norm(cache.text, axis=-1).all():
        raise AvjaxError("a class has text weights of zeros; expected length 1")
    for name, rows in cache.keys.items():
        _check_rows(name, rows, n, d)


def _check_label(label: np.ndarray, count: int, classes: int) -> None:
    if label.shape != (count,) or np.any((label < 0) | (label >= classes)):
        raise AvjaxError(f"labels are {label.dtype}{label.shape}; expected {count} integers from 0 to {classes - 1}")


def _check_rows(name: str, rows: np.ndarray, count: int, width: int) -> None:
    """Checks that the features of a modality are (count, width), each finite and of length 1, or zeros."""
    if rows.shape != (count, width):
        raise AvjaxError(f"features of {name} are {rows.shape}; expected {(count, width)}")
    length = np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64))
    wrong = np.flatnonzero(~((np.abs(length - 1) <= _LENGTH) | (length == 0)))
    if wrong.size:
        raise AvjaxError(
            f"features of {name}, row {wrong[0]}: length {length[wrong[0]]:.4g}; "
            "expected 1, or 0 where a clip lacks it: divide features by their length"
        )


def _check_numbers(cache: Cache) -> None:
    if set(cache.alpha) != set(cache.keys):
        raise AvjaxError(f"alpha is of {', '.join(cache.alpha)}; expected {', '.join(cache.keys)}")
    if not all(0 <= ratio < np.inf for ratio in cache.alpha.values()) or not 0 < cache.beta < np.inf:
        raise AvjaxError(f"alpha is {dict(cache.alpha)}, beta {cache.beta}; expected alpha from 0, and beta above 0")


# ---- Entries ------------------------------------------------------------------------------------------------------


def empty(classes: Iterable[str], text: np.ndarray, modalities: Iterable[str], origin: str) -> Cache:
    """Makes a cache without entries."""
    names = tuple(modalities)
    keys, alpha = dict.fromkeys(names, np.zeros((0, np.shape(text)[-1]))), dict.fromkeys(names, ALPHA)
    return Cache(tuple(classes), text, (), np.zeros(0, np.int32), keys, alpha, BETA, origin)


def add(cache: Cache, ids: Sequence[str], labels: Sequence[str], features: Features) -> Cache:
    """Adds clips; one whose id is in the cache replaces that entry: the last correction holds.

    Args:
      cache: to add to.
      ids: of m clips, each once.
      labels: names of their classes.
      features: modality → (m, d) of length 1, zeros for clips without it; a missing modality is zeros for all.

    Raises:
      AvjaxError: a label is no class.
    """
    ids, labels = list(ids), [str(name) for name in labels]
    wrong = [why for why in (unknown_label(label, cache.classes) for label in labels) if why]
    if wrong:
        raise AvjaxError(wrong[0])
    rows = _stacked(cache, features)
    label = np.array([cache.classes.index(name) for name in labels], np.int32)
    kept = _without(cache, ids)
    joined = np.concatenate([_keys(kept), rows], 1)
    return _sorted(cache, [*kept.ids, *ids], np.concatenate([kept.label, label]), joined)


def remove(cache: Cache, ids: Sequence[str]) -> Cache:
    """Removes entries.

    Raises:
      AvjaxError: an id is not in the cache.
    """
    unknown = sorted(set(ids) - set(cache.ids))
    if unknown:
        raise AvjaxError(f"clip {unknown[0]!r} is not among the {len(cache.ids)} entries; nothing was removed")
    return _without(cache, ids)


def _without(cache: Cache, ids: Iterable[str]) -> Cache:
    removed = set(ids)
    stay = [i for i, name in enumerate(cache.ids) if name not in removed]
    return _sorted(cache, [cache.ids[i] for i in stay], cache.label[stay], _keys(cache)[:, stay])


def _sorted(cache: Cache, ids: Sequence[str], label: np.ndarray, keys: np.ndarray) -> Cache:
    """Returns the cache with the entries `ids` (n), `label` (n,), `keys` (modalities, n, d), sorted."""
    order = sorted(range(len(ids)), key=lambda i: (label[i], ids[i]))
    by_name = dict(zip(cache.modalities, keys[:, order], strict=True))
    return dataclasses.replace(cache, ids=tuple(ids[i] for i in order), label=label[order], keys=by_name)


def _keys(cache: Cache) -> np.ndarray:
    """Stacks keys as (modalities, n, d)."""
    return np.stack(list(cache.keys.values()))


def few(label: np.ndarray, ids: Sequence[str], classes_count: int, shots: int, seed: int) -> np.ndarray:
    """Draws up to `shots` clips of each class, whatever the order of the clips.

    The draw of a class depends on its own clips alone, and fewer shots are a subset of more.

    Args:
      label: (n,) integers in [0, classes_count).
      ids: (n), each once.
      classes_count: number of classes.
      shots: clips per class.
      seed: of the draw.

    Returns:
      indices of the clips, sorted by class, then id.
    """
    chosen = []
    for c in range(classes_count):
        members = sorted(np.flatnonzero(np.asarray(label) == c), key=lambda i: ids[i])
        drawn = np.random.default_rng([seed, c]).permutation(len(members))[:shots]
        chosen += [members[i] for i in sorted(drawn)]
    return np.array(chosen, int)


# ---- Equations ----------------------------------------------------------------------------------------------------


def affinity(rows: Array, keys: Array, among: Array | bool = True) -> Array:
    """Computes the cosines between clips and entries of each modality; −inf where the clip or the entry lacks it.

    The paper's Eq. 4 has those of the video for both modalities.

    Args:
      rows: (…, m, d) features of m clips; leading axes: modalities, lanes.
      keys: (…, n, d) of n entries, with the same leading axes.
      among: (…, m, n), False for entries that do not vote for a clip.

    Returns:
      (…, m, n).
    """
    xp = rows.__array_namespace__()
    both = (rows != 0).any(-1)[..., :, None] & (keys != 0).any(-1)[..., None, :] & among
    return xp.where(both, rows @ xp.swapaxes(keys, -1, -2), -xp.inf)


def votes(affinity: Array, one_hot: Array, beta: Array | float, alpha: Array | float = 1.0) -> Array:
    """Sums α exp(−β(1 − cosine)) (Eq. 4) over the entries of each class (Eq. 3).

    Args:
      affinity: (…, m, n), as `affinity` returns it.
      one_hot: (…, n, c), the class of each entry.
      beta: the sharpness β.
      alpha: the residual ratio α, 1 where it is applied later.

    Returns:
      (…, m, c).
    """
    xp = affinity.__array_namespace__()
    return (alpha * xp.exp(-beta * (1 - affinity))) @ one_hot


def combined(zero: Array, votes: Array, alpha: Array) -> Array:
    """Adds the votes of the modalities, by alpha (…, k), to the zero-shot scores (Eqs. 2 + 3): (…, m, c)."""
    return zero + (alpha[..., :, None, None] * votes).sum(-3)


# ---- Predictions --------------------------------------------------------------------------------------------------


def zero_shot(cache: Cache, features: Features) -> np.ndarray:
    """Computes the zero-shot scores of clips (Eq. 2), (m, c) float64; zeros for a clip without any modality.

    `features` are as for `add`.
    """
    return _zero_shot(cache, _stacked(cache, features))


def _zero_shot(cache: Cache, rows: np.ndarray) -> np.ndarray:
    return zero_shot_scores(rows, cache.text.astype(np.float64))


def predict(cache: Cache, features: Features) -> np.ndarray:
    """Computes the scores of clips (Eqs. 2 + 3), zero-shot and the votes of the entries by alpha: (m, c) float64.

    `features` are as for `add`.
    """
    rows = _stacked(cache, features)
    alpha = np.array([cache.alpha[name] for name in cache.modalities])
    return combined(_zero_shot(cache, rows), _votes(cache, rows, (cache.beta,), apart=False)[0], alpha)


def _votes(cache: Cache, rows: np.ndarray, betas: Sequence[float], apart: bool) -> np.ndarray:
    """Counts the votes for each β, (betas, k, m, c); `apart`: the rows are the keys, without their own vote.

    Rows are processed in blocks, as the affinities of all rows and keys are large.
    """
    keys, one_hot = _keys(cache).astype(np.float64), np.eye(len(cache.classes))[cache.label]
    out = np.zeros((len(betas), *rows.shape[:2], len(cache.classes)))
    for first in range(0, rows.shape[1], _ROWS):
        part = np.arange(first, min(first + _ROWS, rows.shape[1]))
        others = (part[:, None] != np.arange(keys.shape[1]))[None] if apart else True
        near = affinity(rows[:, part], keys, others)
        for i, beta in enumerate(betas):
            out[i, :, part[0] : part[-1] + 1] = votes(near, one_hot, beta)
    return out


def _stacked(cache: Cache, features: Features) -> np.ndarray:
    """Stacks the features of clips as (modalities, m, d) float64, with zeros for missing modalities."""
    shape = np.shape(next(iter(features.values())))
    return np.stack([np.asarray(features.get(name, np.zeros(shape)), np.float64) for name in cache.modalities])


# ---- Alpha and beta -----------------------------------------------------------------------------------------------


def fit(cache: Cache, held_out: tuple[Features, np.ndarray] | None = None) -> Cache:
    """Chooses alpha of each modality from ALPHAS, and beta from BETAS, by unweighted average recall.

    Ties are broken by the lower cross entropy of softmax(scores / TEMPERATURE), then by the smaller alphas, in the
    order of the modalities, then by the smaller beta.

    Args:
      cache: to fit.
      held_out: features of m clips as for `add`, and their labels (m,) integers; or None for the entries, each without
        its own vote.

    Returns:
      the cache with the chosen alpha and beta.

    Raises:
      AvjaxError: there is no clip to fit on.
    """
    if held_out is None:
        rows, label = _keys(cache).astype(np.float64), cache.label
    else:
        rows, label = _stacked(cache, held_out[0]), held_out[1]
    if not len(label):
        raise AvjaxError("no clip to fit alpha and beta on; add some to the cache, or give some that are held out")
    zero, choices = _zero_shot(cache, rows), []
    for beta, vote in zip(BETAS, _votes(cache, rows, BETAS, apart=held_out is None), strict=True):
        for alpha in itertools.product(ALPHAS, repeat=len(vote)):
            choices.append((*_quality(combined(zero, vote, np.array(alpha)), label), alpha, beta))
    *_, alpha, beta = min(choices)
    return dataclasses.replace(cache, alpha=dict(zip(cache.modalities, alpha, strict=True)), beta=beta)


def _quality(scores: np.ndarray, label: np.ndarray) -> tuple[float, float]:
    """Computes the negative unweighted average recall of scores (m, c), and their mean cross entropy."""
    present, index, size = np.unique(label, return_inverse=True, return_counts=True)
    recall = np.sum((scores.argmax(-1) == label) / size[index]) / len(present)
    logits = (scores - scores.max(-1, keepdims=True)) / TEMPERATURE
    entropy = np.mean(np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(label)), label])
    return round(-float(recall), _DIGITS), round(float(entropy), _DIGITS)


# ---- Files --------------------------------------------------------------------------------------------------------

_FORMAT = "avjax cache 1"


def save(cache: Cache, path: Path) -> None:
    """Writes a cache atomically, as an .npz of numbers and text.

    Raises:
      AvjaxError: it cannot be written, or `load` would refuse it.
    """
    check(cache)
    arrays = {
        "format": np.array(_FORMAT),
        "classes": np.array(cache.classes),
        "text": cache.text,
        "ids": np.array(cache.ids, str),
        "label": cache.label,
        "modalities": np.array(cache.modalities),
        "keys": _keys(cache),
        "alpha": np.array([cache.alpha[name] for name in cache.modalities]),
        "beta": np.array(cache.beta),
        "origin": np.array(cache.origin),
    }
    try:
        with replacing(path, "wb") as file:
            np.savez(file, **arrays)
    except OSError as error:
        raise AvjaxError(f"{path}: cannot be written ({error.strerror}); choose another path") from error


# Name → kind of dtype and number of axes.
_MEMBERS = {
    "classes": ("U", 1),
    "text": ("f4", 2),
    "ids": ("U", 1),
    "label": ("i4", 1),
    "modalities": ("U", 1),
    "keys": ("f4", 3),
    "alpha": ("f8", 1),
    "beta": ("f8", 0),
    "origin": ("U", 0),
}


def load(path: Path) -> Cache:
    """Reads what `save` wrote, bit for bit.

    Raises:
      AvjaxError: the file does not exist, is not a cache, is damaged, or is beyond LIMITS.
    """
    arrays = _read(path)
    name = arrays.pop("format", None)
    if name is None or name.shape or str(name) != _FORMAT:
        raise AvjaxError(f"{path}: not {_FORMAT!r}; give a file that `save` wrote")
    for name, (dtype, axes) in _MEMBERS.items():
        array = arrays.get(name)
        if array is None or array.ndim != axes or array.dtype.str.lstrip("<>=|")[: len(dtype)] != dtype:
            raise AvjaxError(f"{path}: {name} is missing or of another kind; the file is damaged, restore a copy")
    try:
        cache = _restored(arrays)
        check(cache)
        return cache
    except (AvjaxError, ValueError) as error:
        raise AvjaxError(f"{path}: {error}; the file is damaged, restore a copy") from error


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as raw:
            with zipfile.ZipFile(raw) as packed:
                size = sum(member.file_size for member in packed.infolist())
            if size > _UNPACKED:
                raise ValueError(f"{size} bytes when unpacked, above {_UNPACKED}")
            raw.seek(0)
            with np.load(raw, allow_pickle=False) as file:
                return {name: np.asarray(file[name]) for name in file.files}
    except Exception as error:  # a damaged file raises errors of many kinds
        reason = f"{type(error).__name__}: {error}"
        raise AvjaxError(f"{path}: not a readable cache ({reason}); give a file that `save` wrote") from error


def _restored(arrays: Mapping[str, np.ndarray]) -> Cache:
    names = arrays["modalities"].tolist()
    return Cache(
        classes=tuple(arrays["classes"].tolist()),
        text=arrays["text"],
        ids=tuple(arrays["ids"].tolist()),
        label=arrays["label"],
        keys=dict(zip(names, arrays["keys"], strict=True)),
        alpha=dict(zip(names, arrays["alpha"].tolist(), strict=True)),
        beta=float(arrays["beta"]),
        origin=str(arrays["origin"]),
    )
