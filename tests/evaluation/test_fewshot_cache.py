"""The few-shot cache: equations by hand and by plain loops, entries, leave-one-out, the fit, files that lie."""

import dataclasses
import itertools
import math
import time

import numpy as np
import pytest

from avjax.errors import AvjaxError
from avjax.evaluation import fewshot_cache as caching
from avjax.evaluation.fewshot_cache import Cache, add, check, empty, few, fit, predict, remove, zero_shot

CLASSES = ("anger", "joy", "neutral")
MODALITIES = ("video", "audio")


def units(rng: np.random.Generator, *shape: int) -> np.ndarray:
    x = rng.normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def lacking(rng: np.random.Generator, count: int, width: int = 6) -> dict[str, np.ndarray]:
    """Features of clips of which the second has no video, the third no audio, and the fourth neither."""
    out = {name: units(rng, count, width) for name in MODALITIES}
    out["video"][1:4:2] = 0
    out["audio"][2:4] = 0
    return out


def filled(entries: int = 9, width: int = 6, seed: int = 0) -> Cache:
    rng = np.random.default_rng(seed)
    base = empty(CLASSES, units(rng, 3, width), MODALITIES, "run 1")
    ids, labels = [f"c{i}" for i in range(entries)], [CLASSES[i % 3] for i in range(entries)]
    entered = add(base, ids, labels, lacking(rng, entries, width))
    return dataclasses.replace(entered, alpha={"video": 0.7, "audio": 0.2}, beta=3.0)


def same(a: Cache, b: Cache) -> bool:
    """Whether two caches agree bit for bit."""
    plain = all(getattr(a, f) == getattr(b, f) for f in ("classes", "ids", "alpha", "beta", "origin", "modalities"))
    arrays = [(a.text, b.text), (a.label, b.label), *((a.keys[m], b.keys[m]) for m in a.keys)]
    return plain and all(x.dtype == y.dtype and x.tobytes() == y.tobytes() for x, y in arrays)


# ---- Equations ----------------------------------------------------------------------------------------------------


def by_hand() -> Cache:
    """Two classes with texts along the axes; an entry of joy, with audio alone, and two of anger."""
    base = empty(("anger", "joy"), np.eye(2), MODALITIES, "")
    keys = {"video": [[1, 0], [0, 1], [0, 0]], "audio": [[0, 1], [0, 0], [0.6, 0.8]]}
    entered = add(base, ["a", "b", "c"], ["anger", "anger", "joy"], {k: np.array(v) for k, v in keys.items()})
    return dataclasses.replace(entered, alpha={"video": 2, "audio": 0.5}, beta=1)


def test_scores_by_hand():
    clips = {"video": np.array([[0.6, 0.8], [0, 0]]), "audio": np.array([[1.0, 0], [0, 1]])}
    # Eq. 2: both modalities; audio alone.
    np.testing.assert_allclose(zero_shot(by_hand(), clips), [[0.8, 0.4], [0, 1]], rtol=1e-6)
    # Eqs. 3 and 4. First clip: anger by video at cosines 0.6 and 0.8 and by audio at 0, joy by audio at 0.6; second
    # clip: by audio alone, at 1 and 0.8.
    first = 2 * (math.exp(-0.4) + math.exp(-0.2)) + 0.5 * math.exp(-1), 0.5 * math.exp(-0.4)
    expected = [[0.8 + first[0], 0.4 + first[1]], [0.5, 1 + 0.5 * math.exp(-0.2)]]
    np.testing.assert_allclose(predict(by_hand(), clips), expected, rtol=1e-6)
    rows, keys = (np.stack([*given.values()]) for given in (clips, by_hand().keys))
    near = caching.affinity(rows, keys)
    np.testing.assert_allclose(near[0], [[0.6, 0.8, -np.inf], [-np.inf] * 3], rtol=1e-6)
    np.testing.assert_allclose(near[1], [[0, -np.inf, 0.6], [1, -np.inf, 0.8]], rtol=1e-6)
    voted = caching.votes(np.array([[[1, 0.5, -np.inf]]]), np.eye(3), 4.0)
    np.testing.assert_allclose(voted, [[[1, math.exp(-2), 0]]])


def predicted(cache: Cache, features) -> list[list[float]]:
    """Eqs. 2–4 for one number at a time."""
    out = []
    for i in range(len(features["video"])):
        has = [m for m in MODALITIES if any(features[m][i])]
        row = []
        for c in range(len(cache.classes)):
            score = sum(float(np.float64(features[m][i]) @ np.float64(cache.text[c])) for m in has) / max(len(has), 1)
            for m, j in itertools.product(has, range(len(cache.ids))):
                if cache.label[j] == c and any(cache.keys[m][j]):
                    cosine = float(np.float64(features[m][i]) @ np.float64(cache.keys[m][j]))
                    score += cache.alpha[m] * math.exp(-cache.beta * (1 - cosine))
            row.append(score)
        out.append(row)
    return out


@pytest.mark.parametrize("rows", [2, 1024])
def test_scores_against_plain_loops(rows, monkeypatch):
    monkeypatch.setattr(caching, "_ROWS", rows)
    features = lacking(np.random.default_rng(1), 5)
    scores = predict(filled(), features)
    np.testing.assert_allclose(scores, predicted(filled(), features), rtol=1e-12)
    assert not scores[3].any(), "a clip without any modality"
    np.testing.assert_array_equal(predict(filled(0), features), zero_shot(filled(0), features))


def test_a_missing_modality_leaves_the_classifier_of_the_other():
    both = filled()
    audio = units(np.random.default_rng(1), 4, 6)
    alone = dataclasses.replace(both, keys={"audio": both.keys["audio"]}, alpha={"audio": both.alpha["audio"]})
    expected = predict(alone, {"audio": audio})
    for clips in ({"audio": audio}, {"audio": audio, "video": np.zeros((4, 6))}):
        np.testing.assert_allclose(predict(both, clips), expected, rtol=1e-12)
    silent = dataclasses.replace(both, alpha={"video": 0, "audio": both.alpha["audio"]})
    np.testing.assert_allclose(predict(silent, {"audio": audio}), expected, rtol=1e-12)


def test_clips_are_for_themselves():
    features = lacking(np.random.default_rng(1), 5)
    for i in range(5):
        alone = predict(filled(), {m: v[i : i + 1] for m, v in features.items()})
        np.testing.assert_allclose(alone, predict(filled(), features)[i : i + 1], rtol=1e-12)


# ---- Entries ------------------------------------------------------------------------------------------------------


def test_entries_are_sorted_by_class_and_id_and_cannot_be_written():
    cache = filled()
    assert cache.ids == ("c0", "c3", "c6", "c1", "c4", "c7", "c2", "c5", "c8")
    assert cache.label.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert (cache.text.dtype, cache.keys["audio"].dtype, cache.label.dtype) == (np.float32, np.float32, np.int32)
    for array in (cache.text, cache.label, *cache.keys.values()):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    text = np.eye(3, dtype=np.float32)
    kept = empty(CLASSES, text, MODALITIES, "")
    text[0] = 7
    np.testing.assert_array_equal(kept.text, np.eye(3))


def test_add_then_remove_is_the_same_cache():
    cache, features = filled(), lacking(np.random.default_rng(2), 4)
    ids = ["x", "c10", "a", "b"]
    more = add(cache, ids, ["joy", "anger", "joy", "neutral"], features)
    assert len(more.ids) == 13
    assert same(remove(more, ids), cache)
    assert same(remove(cache, []), cache)
    assert same(remove(remove(more, ids[:2]), ids[2:]), cache)
    assert remove(cache, cache.ids).ids == ()


def test_order_of_adding_changes_nothing():
    cache, features = filled(0), lacking(np.random.default_rng(2), 6)
    ids, labels = [f"c{i}" for i in range(6)], [CLASSES[i % 2] for i in range(6)]
    together = add(cache, ids, labels, features)
    for seed in range(3):
        one_by_one = cache
        for i in np.random.default_rng(seed).permutation(6):
            one_by_one = add(
                one_by_one, ids[i : i + 1], labels[i : i + 1], {m: v[i : i + 1] for m, v in features.items()}
            )
        assert same(one_by_one, together)


def test_a_correction_of_a_correction_takes_its_place():
    cache, new = filled(), units(np.random.default_rng(3), 1, 6)
    corrected = add(cache, ["c4"], ["neutral"], {"audio": new})
    assert len(corrected.ids) == 9
    at = corrected.ids.index("c4")
    assert corrected.classes[corrected.label[at]] == "neutral"
    np.testing.assert_array_equal(corrected.keys["audio"][at], new[0])
    assert not corrected.keys["video"][at].any()
    assert same(remove(corrected, ["c4"]), remove(cache, ["c4"]))
    assert predict(corrected, {"audio": new})[0, 2] > predict(cache, {"audio": new})[0, 2]


AUDIO = {"audio": np.eye(6)[:1]}
WRONG = {
    "nearest class": (["x"], ["angre"], AUDIO, "label 'angre'; did you mean 'anger'"),
    "no class": (["x"], [7], AUDIO, "expected one of anger, joy, neutral"),
    "twice": (["x", "x"], ["joy", "joy"], {"audio": np.eye(6)[:2]}, "'x' comes twice"),
    "nan": (["x"], ["joy"], {"audio": np.full((1, 6), np.nan)}, "length nan; expected 1"),
    "inf": (["x"], ["joy"], {"audio": np.full((1, 6), np.inf)}, "length inf; expected 1"),
    "length": (["x"], ["joy"], {"audio": 2 * np.eye(6)[:1]}, "features of audio, row 6: length 2;.*divide"),
    "empty id": ([""], ["joy"], AUDIO, "names are of 1 to 1000 characters"),
    "long id": (["x" * 1001], ["joy"], AUDIO, "names are of 1 to 1000 characters"),
    "zero in id": (["x\0"], ["joy"], AUDIO, "none of them 0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_added_is_refused_before_it_is_kept(case, tmp_path):
    ids, labels, features, match = WRONG[case]
    with pytest.raises(AvjaxError, match=match):
        caching.save(add(filled(), ids, labels, features), tmp_path / "cache.npz")
    assert not (tmp_path / "cache.npz").exists()


def test_what_is_not_there_cannot_be_removed():
    with pytest.raises(AvjaxError, match="'zz' is not among the 9 entries"):
        remove(filled(), ["c1", "zz"])


INCONSISTENT = {
    "text weights are": {"text": np.eye(6)[:2]},
    "a class has text weights of zeros": {"text": np.zeros((3, 6))},
    "not sorted": {"label": np.array([2] + [0] * 8)},
    r"labels are int32\(8,\)": {"label": np.zeros(8, int)},
    "integers from 0 to 2": {"label": np.full(9, 3)},
    "expected each once": {"classes": ("joy", "anger", "joy")},
    "alpha is of video": {"alpha": {"video": 1}},
    "expected alpha from 0": {"alpha": {"video": -1, "audio": 1}},
    "beta nan": {"beta": math.nan},
    "beta above 0": {"beta": 0},
    "a cache with modalities: 0": {"keys": {}, "alpha": {}},
    "a cache with width: 65537; expected 1 to 65536": {"text": np.eye(3, 65537)},
    "names are": {"origin": "x" * 1001},
}


@pytest.mark.parametrize("match", INCONSISTENT)
def test_a_cache_is_consistent(match):
    with pytest.raises(AvjaxError, match=match):
        check(dataclasses.replace(filled(), **INCONSISTENT[match]))


def test_a_cache_has_a_limit():
    base, count = empty(("joy",), np.ones((1, 1)), ("audio",), ""), 16_385
    ids, labels, audio = [f"c{i}" for i in range(count)], ["joy"] * count, np.ones((count, 1))
    check(add(base, ids[1:], labels[1:], {"audio": audio[1:]}))
    with pytest.raises(AvjaxError, match="entries: 16385; expected 0 to 16384"):
        check(add(base, ids, labels, {"audio": audio}))


# ---- Leave-one-out ------------------------------------------------------------------------------------------------


def leave_one_out(cache: Cache) -> np.ndarray:
    """The scores of each entry by the others."""
    own = [{m: v[i : i + 1] for m, v in cache.keys.items()} for i in range(len(cache.ids))]
    return np.concatenate([predict(remove(cache, [name]), x) for name, x in zip(cache.ids, own, strict=True)])


@pytest.mark.parametrize("rows", [2, 1024])
def test_votes_apart_are_removing_each(rows, monkeypatch):
    monkeypatch.setattr(caching, "_ROWS", rows)
    cache = filled()
    own = np.stack([*cache.keys.values()]).astype(np.float64)
    votes = caching._votes(cache, own, (cache.beta,), apart=True)[0]
    scores = caching.combined(zero_shot(cache, cache.keys), votes, np.array([*cache.alpha.values()]))
    np.testing.assert_allclose(scores, leave_one_out(cache), rtol=1e-12, atol=1e-15)


# ---- Alpha and beta -----------------------------------------------------------------------------------------------


def quality(scores: np.ndarray, label: np.ndarray) -> tuple[float, float]:
    """Unweighted average recall and cross entropy of softmax(scores / 0.07), by plain loops."""
    recalls = []
    for c in sorted(set(label.tolist())):
        rows = [s for s, y in zip(scores, label, strict=True) if y == c]
        recalls.append(sum(max(range(len(s)), key=s.__getitem__) == c for s in rows) / len(rows))
    costs = [
        math.log(sum(math.exp(v / 0.07) for v in s)) - s[y] / 0.07 for s, y in zip(scores.tolist(), label, strict=True)
    ]
    return sum(recalls) / len(recalls), sum(costs) / len(costs)


def task(seed: int, count: int, noise: float, width: int = 16) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Clips about a centre of each class, labels, and texts that are no guide to those centres."""
    centres, rng = units(np.random.default_rng(9), 3, width), np.random.default_rng(seed)
    label = rng.integers(0, 3, count)
    rows = {m: centres[label] + noise * rng.normal(size=(count, width)) for m in MODALITIES}
    rows = {m: v / np.linalg.norm(v, axis=-1, keepdims=True) for m, v in rows.items()}
    return rows, label, units(np.random.default_rng(8), 3, width)


def learnt(shots: int = 12, noise: float = 0.3) -> Cache:
    rows, label, text = task(0, shots, noise)
    return add(empty(CLASSES, text, MODALITIES, ""), [f"c{i}" for i in range(shots)], [CLASSES[c] for c in label], rows)


@pytest.mark.parametrize("held_out", [True, False])
@pytest.mark.parametrize("noise", [0.05, 0.3, 3.0])
def test_fit_takes_the_best_of_its_grid(held_out, noise, monkeypatch):
    monkeypatch.setattr(caching, "ALPHAS", (0.0, 0.01, 0.3))
    monkeypatch.setattr(caching, "BETAS", (1.375, 11.0))
    cache = learnt(noise=noise)
    features, label, _ = task(1, 40, noise)

    def scored(alphas, beta) -> tuple[float, float]:
        trial = dataclasses.replace(cache, alpha=dict(zip(MODALITIES, alphas, strict=True)), beta=beta)
        return quality(*((predict(trial, features), label) if held_out else (leave_one_out(trial), cache.label)))

    def cost(choice) -> tuple:
        recall, entropy = scored(*choice)
        return round(-recall, 9), round(entropy, 9), choice

    best = min(itertools.product(itertools.product(caching.ALPHAS, repeat=2), caching.BETAS), key=cost)
    fitted = fit(cache, (features, label) if held_out else None)
    assert (tuple(fitted.alpha.values()), fitted.beta) == best
    assert scored(*best)[0] >= scored((0, 0), 1.375)[0], "never worse than the texts alone"
    assert same(dataclasses.replace(fitted, alpha=cache.alpha, beta=cache.beta), cache)


def test_fit_helps_where_the_cache_knows_more_than_the_texts():
    features, label, _ = task(1, 60, 0.3)
    before = quality(zero_shot(learnt(), features), label)[0]
    after = quality(predict(fit(learnt(), (features, label)), features), label)[0]
    assert after > before + 0.3


def test_fit_prefers_the_smaller_of_equals():
    # Nothing votes, so that all of the grid is one.
    cache = empty(CLASSES, np.eye(3), MODALITIES, "")
    fitted = fit(cache, ({"audio": np.eye(3)}, np.arange(3)))
    assert (dict(fitted.alpha), fitted.beta) == ({"video": 0, "audio": 0}, caching.BETAS[0])


def test_held_out_labels_choose_alpha_and_beta_and_nothing_else():
    cache, (features, label, _) = learnt(noise=1.0), task(1, 40, 1.0)
    for poisoned in (label, (label + 1) % 3):
        fitted = fit(cache, (features, poisoned))
        assert same(dataclasses.replace(fitted, alpha=cache.alpha, beta=cache.beta), cache)
    wild = {m: -v for m, v in features.items()}
    assert same(fit(fit(cache, (wild, (label + 1) % 3))), fit(cache)), "a fit begins anew"


def test_fit_refuses_what_it_cannot_be_of():
    with pytest.raises(AvjaxError, match="no clip to fit"):
        fit(empty(CLASSES, np.eye(3), MODALITIES, ""))
    with pytest.raises(AvjaxError, match="no clip to fit"):
        fit(learnt(), ({"audio": np.zeros((0, 16))}, np.zeros(0, int)))


def test_fit_of_16_shots_is_quick():
    rng = np.random.default_rng(0)
    classes = tuple(f"class {i}" for i in range(7))
    base = empty(classes, units(rng, 7, 512), MODALITIES, "")
    shots = add(
        base,
        [f"c{i}" for i in range(112)],
        [classes[i % 7] for i in range(112)],
        {m: units(rng, 112, 512) for m in MODALITIES},
    )
    held_out = {m: units(rng, 1100, 512) for m in MODALITIES}, rng.integers(0, 7, 1100)
    begin = time.process_time()
    fit(shots, held_out)
    assert time.process_time() - begin < 2


# ---- K shots ------------------------------------------------------------------------------------------------------


def test_few_draws_of_each_class_whatever_the_order():
    rng = np.random.default_rng(0)
    label = rng.permutation(np.repeat([0, 1, 3], [30, 2, 5]))
    ids = [f"c{i}" for i in range(len(label))]
    chosen = few(label, ids, 4, 3, seed=1)
    assert label[chosen].tolist() == [0, 0, 0, 1, 1, 3, 3, 3]
    names = [ids[i] for i in chosen]
    assert names == [i for c in range(4) for i in sorted(n for n in names if label[ids.index(n)] == c)]
    order = rng.permutation(len(label))
    shuffled = few(label[order], [ids[i] for i in order], 4, 3, seed=1)
    assert [ids[order[i]] for i in shuffled] == names
    assert [ids[i] for i in few(label, ids, 4, 3, seed=2)] != names
    assert set(chosen) < set(few(label, ids, 4, 4, seed=1)), "fewer shots are among those of more"
    others = [i for i in range(len(label)) if label[i] != 3]
    assert [ids[others[i]] for i in few(label[others], [ids[i] for i in others], 4, 3, seed=1)] == names[:5]


def test_few_draws_every_clip_alike():
    drawn = np.bincount(np.concatenate([few(np.zeros(10, int), list("abcdefghij"), 1, 3, s) for s in range(2000)]))
    assert np.abs(drawn / 2000 - 0.3).max() < 0.05
