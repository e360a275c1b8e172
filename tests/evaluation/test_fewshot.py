"""What reads a trained run's features: each reader restated in NumPy, and what each may see."""

import dataclasses

import jax
import numpy as np
import pytest

from avjax.datasets.base import Fold
from avjax.errors import AvjaxError
from avjax.evaluation import fewshot
from avjax.evaluation import fewshot_cache as caches
from avjax.evaluation.fewshot_cache import ALPHAS, BETAS
from avjax.models.emoasst import TEMPERATURE
from avjax.settings import ProtocolSettings
from avjax.training import lanes as lane_plans
from tests import prompted, synthetic

FEATURES = dataclasses.replace(
    synthetic.make(48), constants={"classes": np.eye(3, 6, dtype=np.float32)[:, [2, 0, 1, 3, 4, 5]]}
)
IDS = FEATURES.ids
# Lanes of unequal size; the second has no validation part.
FOLDS = (
    Fold("a", tuple(IDS[:26]), tuple(IDS[36:]), tuple(IDS[26:36])),
    Fold("b", tuple(IDS[:15]), tuple(IDS[41:]), ()),
)
SETTINGS = {"shots": 4, "tune_steps": 20, "tune_rate": 0.01, "reader": "cache"}
HEADS = [f"{m}_{r}" for m in ("video", "audio", "both") for r in ("zero", "cache", "tuned", "probe")]


def unit(x: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(x, axis=-1, keepdims=True)
    return np.divide(x, length, out=np.zeros_like(x), where=length > 0)


def made(seed: int = 0, signal: float = 0.8) -> dict[str, np.ndarray]:
    """Features (lanes, clips, d) of length 1 with a planted class; clip 3 has no audio, clip 5 no video."""
    rng, out = np.random.default_rng(seed), {}
    for m, lacking in (("video", 5), ("audio", 3)):
        x = rng.normal(size=(2, 48, 6))
        x[:, :, 3:] += signal * np.eye(3)[FEATURES.label][None]
        out[m] = unit(x).astype(np.float32)
        out[m][:, lacking] = 0
    return out


def plan_of(features=FEATURES, folds=FOLDS) -> lane_plans.LanePlan:
    how = ProtocolSettings(validation=0.0, standardise="none")
    return lane_plans.plan(features, folds, (7,), how)


def read(representations=None, features=FEATURES, folds=FOLDS, **more) -> fewshot.ClassifierOutputs:
    return fewshot.fit(representations or made(), features, plan_of(features, folds), SETTINGS | more)


@pytest.fixture(scope="module")
def full() -> fewshot.ClassifierOutputs:
    return read()


def logits(given: fewshot.ClassifierOutputs, but: str = "nothing") -> dict[str, np.ndarray]:
    return {head: rows for head, rows in given.logits.items() if but not in head}


def differ(a: fewshot.ClassifierOutputs, b: fewshot.ClassifierOutputs) -> set[str]:
    return {head for head in a.logits if np.abs(a.logits[head] - b.logits[head]).max() > 1e-9}


# ---- The readers ---------------------------------------------------------------------------------------------------


def shown(cache: caches.Cache, rows: dict[str, np.ndarray], alpha, beta: float, apart: bool = False) -> np.ndarray:
    """Eqs. 2 to 4, clip by clip; `apart`: the clips are the entries, in their order."""
    out = np.zeros((len(next(iter(rows.values()))), len(cache.classes)))
    for i in range(len(out)):
        present = [m for m in rows if rows[m][i].any()]
        for m in present:
            x = np.float64(rows[m][i])
            out[i] += cache.text @ x / len(present)
            for j, key in enumerate(cache.keys[m]):
                if key.any() and not (apart and i == j):
                    out[i, cache.label[j]] += alpha[m] * np.exp(-beta * (1 - x @ key))
    return out


def uar(scores: np.ndarray, label: np.ndarray) -> float:
    return float(np.mean([np.mean(scores[label == c].argmax(-1) == c) for c in np.unique(label)]))


def clips(representations, lane: int, where, streams=("video", "audio")) -> dict[str, np.ndarray]:
    return {m: representations[m][lane][where] for m in streams}


@pytest.mark.parametrize(("lane", "test"), [(0, slice(36, 48)), (1, slice(41, 48))])
def test_zero_shot_and_cache_follow_the_equations(full, lane, test):
    cache, rows = full.caches[lane], clips(made(), lane, test)
    count = test.stop - test.start
    silent = dict.fromkeys(cache.alpha, 0.0)
    zero, scores = shown(cache, rows, silent, 1.0), shown(cache, rows, cache.alpha, cache.beta)
    np.testing.assert_allclose(full.logits["both_zero"][lane][:count], zero / TEMPERATURE, atol=1e-5)
    np.testing.assert_allclose(full.logits["both_cache"][lane][:count], scores / TEMPERATURE, atol=1e-5)
    assert not full.logits["both_cache"][lane][count:].any(), "padding"
    alone = shown(cache, {"video": rows["video"]}, silent, 1.0)
    np.testing.assert_allclose(full.logits["video_zero"][lane][:count], alone / TEMPERATURE, atol=1e-5)


def test_all_heads_of_all_lanes_predict(full):
    assert sorted(full.logits) == sorted(HEADS)
    assert {rows.shape for rows in full.logits.values()} == {(2, 12, 3)}
    assert all(np.isfinite(rows).all() for rows in full.logits.values())
    assert full.record["shots"] == [12, 11]
    assert full.record["beta"] == [cache.beta for cache in full.caches]
    assert full.record["alpha"] == [dict(cache.alpha) for cache in full.caches]


@pytest.mark.parametrize("lane", [0, 1])
def test_alpha_and_beta_are_the_best_on_validation_else_leaving_one_out(full, lane):
    cache = full.caches[lane]
    rows, label = (clips(made(), 0, slice(26, 36)), FEATURES.label[26:36]) if lane == 0 else (cache.keys, cache.label)
    scores = {}
    for beta in BETAS:
        for video in ALPHAS:
            for audio in ALPHAS:
                alpha = {"video": video, "audio": audio}
                scores[video, audio, beta] = uar(shown(cache, rows, alpha, beta, apart=lane == 1), label)
    chosen = scores[cache.alpha["video"], cache.alpha["audio"], cache.beta]
    assert chosen == pytest.approx(max(scores.values()))
    assert chosen > min(scores.values())


def test_alpha_and_beta_are_chosen_again_for_tuned_keys(full):
    given = read(reader="tuned", tune_steps=60, tune_rate=0.1).caches[0]
    held = clips(made(), 0, slice(26, 36)), FEATURES.label[26:36]
    chosen = caches.fit(given, held)
    assert (dict(given.alpha), given.beta) == (dict(chosen.alpha), chosen.beta)
    assert (dict(given.alpha), given.beta) != (dict(full.caches[0].alpha), full.caches[0].beta)


def test_entries_are_a_few_training_clips_of_each_class(full):
    for lane, (cache, count) in enumerate(zip(full.caches, (26, 15), strict=True)):
        index = np.array([IDS.index(i) for i in cache.ids])
        assert index.max() < count
        np.testing.assert_array_equal(np.bincount(cache.label), np.bincount(FEATURES.label[:count]).clip(max=4))
        np.testing.assert_array_equal(cache.label, FEATURES.label[index])
        for m, x in made().items():
            np.testing.assert_array_equal(cache.keys[m], x[lane][index])
        assert (cache.origin, cache.classes) == (fewshot.origin(made()), FEATURES.classes)
    chosen = caches.few(FEATURES.label[:26], IDS[:26], 3, 4, 7)
    assert sorted(full.caches[0].ids) == sorted(IDS[i] for i in chosen)


@pytest.mark.parametrize("reader", ["zero", "cache", "tuned"])
def test_the_answering_cache_gives_what_the_head_says(reader):
    given = read(reader=reader)
    for lane, cache in enumerate(given.caches):
        rows = clips(made(), lane, slice(36, 48) if lane == 0 else slice(41, 48))
        scores = caches.predict(cache, rows) / TEMPERATURE
        np.testing.assert_allclose(given.logits[f"both_{reader}"][lane][: len(scores)], scores, atol=1e-5)


def test_the_probe_is_a_logistic_regression_of_the_strength_that_validation_chose(full):
    from sklearn.linear_model import LogisticRegression

    x, y = np.concatenate([made()[m][0] for m in ("video", "audio")], -1), FEATURES.label
    fits = [LogisticRegression(C=c, max_iter=5000).fit(x[:26], y[:26]) for c in fewshot.STRENGTHS]
    best = max(fits, key=lambda fit: uar(fit.predict_proba(x[26:36]), y[26:36]))
    np.testing.assert_allclose(full.logits["both_probe"][0], best.predict_log_proba(x[36:]), atol=1e-6)
    x = np.concatenate([made()[m][1] for m in ("video", "audio")], -1)
    plain = LogisticRegression(max_iter=5000).fit(x[:15], y[:15])
    np.testing.assert_allclose(full.logits["both_probe"][1][:7], plain.predict_log_proba(x[41:]), atol=1e-6)


@pytest.mark.parametrize("stream", ["video", "audio"])
def test_one_modality_alone_reads_as_beside_another(full, stream):
    given = read({stream: made()[stream]})
    assert sorted(given.logits) == sorted(f"{stream}_{r}" for r in ("zero", "cache", "tuned", "probe"))
    for head, rows in given.logits.items():
        np.testing.assert_array_equal(rows, full.logits[head])
    assert given.caches[0].modalities == (stream,)


def test_a_class_that_a_fold_lacks_is_not_answered_by_what_is_trained():
    label = FEATURES.label.copy()
    label[:15][label[:15] == 2] = 0
    given = read(features=dataclasses.replace(FEATURES, label=label))
    assert (given.logits["both_probe"][1][:7, 2] == -100).all()
    assert 2 not in given.caches[1].label
    assert all(np.isfinite(rows).all() for rows in given.logits.values())
    one = dataclasses.replace(FEATURES, label=np.where(np.arange(48) < 15, 1, FEATURES.label).astype(np.int32))
    given = read(features=one, folds=FOLDS[1:], found={m: x[1:] for m, x in made().items()})
    np.testing.assert_array_equal(given.logits["both_probe"][0], [[-100, 0, -100]] * 7)


# ---- Tuned keys ----------------------------------------------------------------------------------------------------


def training_loss(cache: caches.Cache, rows, label: np.ndarray) -> float:
    """Cross entropy of clips, none of which is asked about itself."""
    total = 0.0
    for i in range(len(label)):
        others = {m: np.where((key == rows[m][i]).all(-1)[:, None], 0, key) for m, key in cache.keys.items()}
        one = {m: x[i : i + 1] for m, x in rows.items()}
        scores = shown(dataclasses.replace(cache, keys=others), one, cache.alpha, cache.beta)[0] / TEMPERATURE
        total += np.log(np.exp(scores - scores.max()).sum()) + scores.max() - scores[label[i]]
    return total / len(label)


def initial(streams=("video", "audio")):
    rows, label = clips(made(), 0, slice(0, 26), streams), FEATURES.label[:26]
    empty = caches.empty(FEATURES.classes, FEATURES.constants["classes"], streams, "run")
    chosen = caches.few(label, IDS[:26], 3, 4, 7)
    names = [FEATURES.classes[label[i]] for i in chosen]
    cache = caches.add(empty, [IDS[i] for i in chosen], names, {m: x[chosen] for m, x in rows.items()})
    return dataclasses.replace(cache, alpha=dict.fromkeys(streams, 0.1)), rows, label


def test_tuning_lowers_the_training_loss_and_keeps_the_rest():
    cache, rows, label = initial()
    tuned = fewshot.tune(cache, rows, label, 60, 0.01)
    asked = [i for i, name in enumerate(IDS[:26]) if name not in cache.ids]  # tuned keys are no clip's features
    some = {m: x[asked] for m, x in rows.items()}
    assert training_loss(tuned, some, label[asked]) < training_loss(cache, some, label[asked]) - 0.02
    for field in ("ids", "classes", "alpha", "beta", "origin"):
        assert getattr(tuned, field) == getattr(cache, field)
    for m, key in tuned.keys.items():
        np.testing.assert_allclose(np.linalg.norm(key, axis=-1), cache.keys[m].any(-1), atol=1e-5)
        assert np.abs(key - cache.keys[m]).max() > 0.01


def test_the_first_step_goes_against_the_slope_of_the_loss_without_ones_own_entry():
    """Adam's first step has the sign of the gradient, computed by differences of the restated loss."""
    cache, rows, label = initial(("video",))
    cache = dataclasses.replace(cache, alpha={"video": 1.0})
    tuned = fewshot.tune(cache, rows, label, 1, 1e-3)
    moved = tuned.keys["video"] - cache.keys["video"]
    slopes = np.zeros(moved.shape)
    for entry, axis in np.ndindex(moved.shape):
        step = 1e-4 * np.eye(6)[axis]
        ahead, behind = (asked_apart(cache, rows, label, entry, s * step) for s in (1, -1))
        slopes[entry, axis] = (ahead - behind) / 2e-4
    clear = np.abs(slopes) > 1e-3
    assert clear.mean() > 0.5
    np.testing.assert_array_equal(np.sign(moved)[clear], -np.sign(slopes)[clear])


def asked_apart(cache: caches.Cache, rows, label: np.ndarray, entry: int, step: np.ndarray) -> float:
    """The training loss with one key moved by `step`; the keys before decide which clips are entries."""
    keys, total = np.float64(cache.keys["video"]), 0.0
    moved = keys.copy()
    moved[entry] = unit(moved[entry] + step)
    for i, x in enumerate(np.float64(rows["video"])):
        scores = cache.text @ x
        for j, key in enumerate(moved):
            if key.any() and x.any() and not (keys[j] == x).all():
                scores[cache.label[j]] += cache.alpha["video"] * np.exp(-cache.beta * (1 - x @ key))
        scores = scores / TEMPERATURE
        total += np.log(np.exp(scores).sum()) - scores[label[i]]
    return total / len(label)


def test_an_entry_that_lacks_a_modality_stays_without():
    cache, rows, label = initial()
    cache = caches.add(cache, [IDS[3], IDS[5]], ["class0", "class1"], {m: x[[3, 5]] for m, x in rows.items()})
    tuned = fewshot.tune(cache, rows, label, 5, 0.1)
    assert not tuned.keys["audio"][tuned.ids.index(IDS[3])].any()
    assert not tuned.keys["video"][tuned.ids.index(IDS[5])].any()


# ---- What each may see ---------------------------------------------------------------------------------------------


def poisoned(where: slice, features: bool):
    """Features and labels with others for some clips."""
    changed, label = made(), FEATURES.label.copy()
    label[where] = (label[where] + 1) % 3
    if features:
        for m, x in made(9).items():
            changed[m][:, where] = x[:, where]
    return changed, dataclasses.replace(FEATURES, label=label)


def same(a: caches.Cache, b: caches.Cache) -> None:
    assert (a.ids, dict(a.alpha), a.beta) == (b.ids, dict(b.alpha), b.beta)
    jax.tree.map(np.testing.assert_array_equal, dict(a.keys), dict(b.keys))


def test_test_clips_play_no_part_but_to_be_predicted(full):
    given = read(*poisoned(slice(41, 48), features=False))
    assert differ(full, given) == set()
    # The first lane tests clips 36 to 40 too: their predictions stay.
    given = read(*poisoned(slice(41, 48), features=True))
    for lane, cache in enumerate(given.caches):
        same(cache, full.caches[lane])
    for head, rows in given.logits.items():
        np.testing.assert_array_equal(rows[0, :5], full.logits[head][0, :5])
        assert np.abs(rows[0, 5:] - full.logits[head][0, 5:]).max() > 1e-3


def test_validation_labels_move_only_what_is_fitted(full):
    given = read(*poisoned(slice(26, 36), features=False))
    assert not {head for head in differ(full, given) if head.endswith("_zero")}
    assert "both_cache" in differ(full, given)
    assert given.caches[0].ids == full.caches[0].ids
    jax.tree.map(np.testing.assert_array_equal, dict(given.caches[0].keys), dict(full.caches[0].keys))
    assert (dict(given.caches[0].alpha), given.caches[0].beta) != (dict(full.caches[0].alpha), full.caches[0].beta)
    for head, rows in given.logits.items():
        np.testing.assert_array_equal(rows[1], full.logits[head][1])  # which has other clips


def test_a_lane_reads_the_same_alone(full):
    for lane, count in ((0, 12), (1, 7)):
        given = read({m: x[lane : lane + 1] for m, x in made().items()}, folds=FOLDS[lane : lane + 1])
        for head, rows in given.logits.items():
            np.testing.assert_allclose(rows[0], full.logits[head][lane, :count], atol=1e-9)


def test_who_answers_is_said():
    settings = dict(SETTINGS)
    searched, left_out = "on validation clips", "by leaving one entry out"
    both = f"{searched} or, where nothing is held out, {left_out}"
    assert fewshot.described(plan_of(), settings) == f"head: 4-shot cache, alpha and beta {both}"
    for folds, how in ((FOLDS[:1], searched), (FOLDS[1:], left_out)):
        settings["reader"] = "tuned"
        described = fewshot.described(plan_of(folds=folds), settings)
        assert described == f"head: 4-shot cache with tuned keys, alpha and beta {how}"
        settings["reader"] = "zero"
        assert fewshot.described(plan_of(folds=folds), settings) == "head: zero-shot"


# ---- Files, and lanes together -------------------------------------------------------------------------------------


def test_what_is_written_is_read_again(full, tmp_path):
    fewshot.write(tmp_path, full, made(), FEATURES, plan_of())
    kept = fewshot.read_representations(tmp_path)
    for m, x in made().items():
        np.testing.assert_array_equal(kept[m], x)
    assert kept["clip_id"].tolist() == IDS
    assert kept["speaker"].tolist() == FEATURES.speakers
    np.testing.assert_array_equal(kept["label"], FEATURES.label)
    assert [np.flatnonzero(row).tolist() for row in kept["tested"]] == [[*range(36, 48)], [*range(41, 48)]]
    for cache, again in zip(full.caches, fewshot.read_caches(tmp_path, plan_of().names), strict=True):
        same(cache, again)
    (one,) = fewshot.read_caches(tmp_path, [("b", 7)])
    same(one, full.caches[1])
    with pytest.raises(AvjaxError, match=r"c-7\.npz"):
        fewshot.read_caches(tmp_path, [("c", 7)])


@pytest.mark.parametrize("content", [None, b"", b"noise" * 9, b"cut"])
def test_damaged_features_are_refused(full, tmp_path, content):
    fewshot.write(tmp_path, full, made(), FEATURES, plan_of())
    path = tmp_path / fewshot.REPRESENTATIONS
    path.write_bytes(path.read_bytes()[:-200] if content == b"cut" else content or b"")
    if content is None:
        path.unlink()
    with pytest.raises(AvjaxError, match=r"representations\.npz: cannot be read .*train again"):
        fewshot.read_representations(tmp_path)


def test_features_of_two_runs_have_two_origins():
    assert fewshot.origin(made()) == fewshot.origin(made())
    assert fewshot.origin(made()) != fewshot.origin(made(1))


def test_cosines_of_joined_features_are_the_means_over_lanes():
    lanes = made()
    for m, x in fewshot.joined(lanes).items():
        assert x.shape == (48, 12)
        assert x.dtype == np.float32
        np.testing.assert_allclose(x @ x.T, np.mean(lanes[m] @ lanes[m].transpose(0, 2, 1), 0), atol=1e-6)
        assert not x[{"video": 5, "audio": 3}[m]].any()


# ---- Trained -------------------------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_the_mismatch_of_queries_is_measured_on_training_clips():
    """Of a run that was not trained: with and without the label, by an independent count."""
    run = prompted.Run(prompted.make(signal=1.0))
    given = (run.model, run.state, run.plan, run.data, run.features, run.represented())
    query = fewshot.remarks(*given)["query"]
    lanes = jax.device_get(run.plan.lanes)
    for name, with_label in (("with_label", True), ("without_label", False)):
        x, scores = run.represented(with_label=with_label)["video"], []
        for lane in range(2):
            train = lanes.train[lane][lanes.train_weight[lane] > 0]
            logits = x[lane, train] @ run.features.constants["classes"].T
            scores.append(uar(logits, run.features.label[train]))
        assert query[name] == pytest.approx(np.mean(scores))
    silent = run.model.replace(module=run.model.module.clone(label_in_query=False))
    assert fewshot.remarks(silent, *given[1:]) == {}
