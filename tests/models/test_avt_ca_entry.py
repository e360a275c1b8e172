"""The registry entry of AVT-CA, and refused settings."""

import jax
import pytest

from avjax.errors import AvjaxError
from avjax.models import avt_ca, base
from tests.models.test_avt_ca import STREAMS, batch_of, built, compiled, jit, predict, same


def test_the_entry_reads_audio_and_video_in_any_order():
    entry, (variables, apply) = avt_ca.FUSIONS["avt_ca"], compiled("full")
    assert entry.loss is base.fusion_loss
    assert {name for name, *_ in entry.attention_maps} == apply(variables, batch_of()).attention.keys()
    assert all(map(entry.fits, (STREAMS, STREAMS[::-1])))
    assert not any(map(entry.fits, (("audio",), ("audio", "text"))))
    turned = jit(built("full", streams=STREAMS[::-1]).apply)(variables, batch_of())
    same(turned.logits["fusion"], predict("full", batch_of()))


@pytest.mark.parametrize(
    ("settings", "side", "message"),
    [
        ({}, 32, r"shape \(4, 5, 32, 32, 3\); AVT-CA with frames=False reads features .* set frames to True"),
        ({"frames": True}, 0, r"shape \(4, 5, 6\); AVT-CA with frames=True reads frames .* set frames to False"),
        ({"frames": True}, 31, "frames of 31 x 31 pixels .* even sides, such as 112 x 112"),
    ],
)
def test_what_does_not_fit_is_named(settings, side, message):
    with pytest.raises(AvjaxError, match=message):
        jax.eval_shape(built("full", **settings).init, jax.random.key(0), batch_of(side=side))
