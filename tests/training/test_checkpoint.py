"""Checkpoints: what is saved comes back to the bit, and what is damaged is noticed and passed over."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avjax.errors import AvjaxError
from avjax.training import checkpoint
from avjax.training.checkpoint import Checkpoints


def state(seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "params": {
            "layer": {"kernel": jnp.asarray(rng.normal(size=(2, 30, 50)), jnp.float32), "bias": jnp.zeros((2, 3))}
        },
        "opt_state": (jnp.uint32(seed), {"mu": jnp.ones((2, 4), jnp.bfloat16)}),
        "stopped": jnp.array([True, False]),
    }


def saved(folder: pathlib.Path, *epochs: int) -> None:
    with Checkpoints(folder) as checkpoints:
        for epoch in epochs:
            checkpoints.save(epoch, state(epoch))


def equal(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def damage(folder: pathlib.Path) -> None:
    """Turns one bit of the largest file."""
    path = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def lose(folder: pathlib.Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_size > 100:
            path.unlink()


def test_the_newest_comes_back_and_two_are_kept(tmp_path):
    saved(tmp_path / "c", 1, 2, 3)
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["2", "3"]
    with Checkpoints(tmp_path / "c") as checkpoints:
        epoch, restored = checkpoints.restore(state())
    assert epoch == 3
    equal(restored, state(3))
    assert restored["opt_state"][1]["mu"].dtype == jnp.bfloat16


def test_nothing_saved_is_nothing_restored(tmp_path):
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.restore(state()) is None


@pytest.mark.parametrize("spoil", [damage, lose])
def test_a_damaged_newest_one_is_passed_over_with_a_warning(tmp_path, spoil):
    saved(tmp_path / "c", 1, 2)
    spoil(tmp_path / "c" / "2")
    warnings = []
    with Checkpoints(tmp_path / "c", warnings.append) as checkpoints:
        epoch, restored = checkpoints.restore(state())
        assert epoch == 1
        equal(restored, state(1))
        checkpoints.save(2, state(2))  # its number is free again
    assert len(warnings) == 1
    assert "2 cannot be used" in warnings[0]
    assert (tmp_path / "damaged" / "c-2").is_dir()
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.restore(state())[0] == 2


def test_without_a_sound_one_it_is_an_error_and_nothing_is_lost(tmp_path):
    saved(tmp_path / "c", 1, 2)
    for name in "12":
        damage(tmp_path / "c" / name)
    with Checkpoints(tmp_path / "c") as checkpoints, pytest.raises(AvjaxError, match="none of the checkpoints can be"):
        checkpoints.restore(state())
    assert sorted(p.name for p in (tmp_path / "damaged").iterdir()) == ["c-1", "c-2"]


def test_what_is_written_wrong_is_noticed_when_it_is_read_back(tmp_path, monkeypatch):
    digests = checkpoint.digests
    checkpoints = Checkpoints(tmp_path / "c")
    monkeypatch.setattr(checkpoint, "digests", lambda tree: digests(jax.tree.map(lambda v: v + v, tree)))
    checkpoints.save(1, state(1))
    monkeypatch.setattr(checkpoint, "digests", digests)
    with pytest.raises(AvjaxError, match=r"was not written correctly .* resumes from the checkpoint before"):
        checkpoints.save(2, state(2))


def test_a_digest_tells_values_places_and_types_apart():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5)), jnp.float32)
    others = [
        x.at[1, 2].add(1e-6),
        x[::-1],
        x[:, ::-1],
        -x,
        x.astype(jnp.bfloat16),
        jnp.zeros((4, 5)),
        -jnp.zeros((4, 5)),
    ]
    digests = [checkpoint.digests({"x": v})["/x"] for v in [x, *others]]
    assert len(set(digests)) == len(digests)
    assert checkpoint.digests({"x": np.asarray(x)})["/x"] == digests[0]


def test_parts_are_read_alone_and_checked(tmp_path):
    saved(tmp_path / "c", 1)
    restored = checkpoint.read(tmp_path / "c", "params", "stopped")
    equal(restored["params"], state(1)["params"])
    assert set(restored) == {"params", "stopped"}
    damage(tmp_path / "c" / "1")
    with pytest.raises(AvjaxError, match="no checkpoint can be read"):
        checkpoint.read(tmp_path / "c", "params")


def test_a_state_that_is_refused_is_kept(tmp_path):
    refused = pytest.raises(AvjaxError, match=r"the loss is bad\. The state before it is in .*not_finite")
    with refused, checkpoint.kept_if_refused(tmp_path / checkpoint.REFUSED, 4, state(4)):
        raise AvjaxError("the loss is bad")
    with Checkpoints(tmp_path / checkpoint.REFUSED) as kept:
        epoch, restored = kept.restore(state())
    assert epoch == 4
    equal(restored, state(4))
