"""The benchmark of scaling: collectives are read from the text of HLO, counted by ring formulas, and bound a step."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from avjax.errors import AvjaxError
from avjax.layers import attention
from benchmarks import collectives, record, scaling
from benchmarks.collectives import Collective
from tests.benched import assert_one_line, bench, committed

EIGHT = tuple(range(8))


def module(*lines: str, more: str = "", partitions: int = 8) -> str:
    """Returns the text of an HLO module with these instructions."""
    body = "\n".join(f"  {line}" for line in lines)
    return (
        f"HloModule jit_step, is_scheduled=true, num_partitions={partitions}\n\n"
        f"%add (a: f32[], b: f32[]) -> f32[] {{\n  ROOT %sum = f32[] add(%a, %b)\n}}\n\n{more}\n"
        f"ENTRY %main (p: f32[8]) -> f32[8] {{\n  %p = f32[8]{{0}} parameter(0)\n{body}\n}}\n"
    )


def reduced(groups: str, name: str = "all-reduce.1") -> str:
    """Returns an all-reduce instruction."""
    return f"%{name} = f32[10]{{0}} all-reduce(%p), channel_id=1, replica_groups={groups}, to_apply=%add"


# ---- What is read ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "kind", "size", "sent"),
    [
        (reduced("{{0,1,2,3},{4,5,6,7}}"), "all-reduce", 40, 60),
        ("%x = bf16[8,4]{1,0} all-gather(%p), replica_groups=[2,4]<=[8], dimensions={0}", "all-gather", 64, 48),
        ("ROOT %x = f32[2]{0:T(256)} reduce-scatter(%p), replica_groups=[1,8]<=[8]", "reduce-scatter", 64, 56),
        ("%x = (f32[4]{0}, /*index=1*/f32[4]{0}) all-to-all(%p, %q), replica_groups={{0,1}}", "all-to-all", 32, 16),
        ("%x = s8[16]{0} collective-permute(%p), source_target_pairs={{0,1},{1,0}}", "collective-permute", 16, 16),
        ("%x = (pred[3], f32[], f64[2]) all-reduce(%p, %q, %r), replica_groups={}", "all-reduce", 23, 40.25),
        # The result of an asynchronous start includes its operands.
        ("%x = f32[10]{0} all-reduce-start(%p), replica_groups={}", "all-reduce", 40, 70),
        ("%x = (f32[2]{0}, f32[16]{0}) all-gather-start(%p), replica_groups={}", "all-gather", 64, 56),
        ("%x = ((f32[16]{0}), f32[2]{0}) reduce-scatter-start(%p), replica_groups={}", "reduce-scatter", 64, 56),
        (
            "%x = (s8[16], s8[16], u32[], u32[]) collective-permute-start(%p), source_target_pairs={{0,4}}",
            "collective-permute",
            16,
            16,
        ),
    ],
)
def test_every_kind_is_read(line, kind, size, sent):
    (collective,) = collectives.read(module(line))
    assert (collective.kind, collective.times) == (kind, 1)
    assert collective.size == pytest.approx(size)
    assert collective.sent() == pytest.approx(sent)


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ("{{0,2},{1,3}}", ((0, 2), (1, 3))),
        ("[2,2]<=[4]", ((0, 1), (2, 3))),
        ("[2,2]<=[2,2]T(1,0)", ((0, 2), (1, 3))),
        ("mesh['a'=2,'b'=2] {'a'}", ((0, 2), (1, 3))),
        ("mesh['a'=2,'b'=2] {'b'}", ((0, 1), (2, 3))),
        ("mesh['a'=2,'b'=2] {'b','a'}", ((0, 2, 1, 3),)),
        ("mesh['a'=2,'b'=2,'c'=1] {'a','b'}", ((0, 1, 2, 3),)),
        ("{}", ((0, 1, 2, 3),)),
    ],
)
def test_every_notation_of_groups_is_read(groups, expected):
    (collective,) = collectives.read(module(reduced(groups), partitions=4))
    assert collective.groups == expected


@pytest.mark.parametrize("groups", ["mesh['a'=4,'b'=2] {'a':(2)2}", "mesh['a'=8, device_ids=([8]<=[2,4]T(1,0))] {'a'}"])
def test_other_groups_are_refused(groups):
    with pytest.raises(AvjaxError, match="are in an unknown notation"):
        collectives.read(module(reduced(groups)))


def test_start_and_done_count_once():
    wrapped = f"%wrapped (q: f32[8]) -> f32[10] {{\n  ROOT {reduced('{}')}\n}}\n"
    lines = [
        "%a = f32[10]{0} all-reduce-start(%p), replica_groups={}, to_apply=%add",
        "%b = f32[10]{0} all-reduce-done(%a)",
        "%c = ((f32[8]{0}), f32[10]{0}, u32[]) async-start(%p), calls=%wrapped",
        "%d = ((f32[8]{0}), f32[10]{0}, u32[]) async-update(%c), calls=%wrapped",
        "ROOT %e = f32[10]{0} async-done(%d), calls=%wrapped",
    ]
    assert len(collectives.read(module(*lines, more=wrapped))) == 2


def test_what_is_no_collective_is_not_read():
    named = '%x = f32[8]{0} add(%all-reduce.1, %p), metadata={op_name="all-reduce( all-gather("}'
    assert collectives.read(module(named, "%y = f32[8]{0} fusion(%x), kind=kLoop, calls=%add")) == []


LOOP = '%{0} = f32[8] while(%p), condition=%add, body=%{1}, backend_config={{"known_trip_count":{{"n":"{2}"}}}}'


def test_loops_count_by_their_iterations():
    inner = f"%inner (q: f32[8]) -> f32[8] {{\n  {reduced('{}')}\n}}\n"
    outer = f"%outer (q: f32[8]) -> f32[8] {{\n  {LOOP.format('again', 'inner', 3)}\n}}\n"
    counted = collectives.read(module(LOOP.format("loop", "outer", 4), reduced("{}", "last"), more=inner + outer))
    assert [c.times for c in counted] == [12, 1]
    assert counted[0].sent() == 12 * counted[1].sent()


def test_what_cannot_be_counted_is_refused():
    body = f"%body (q: f32[8]) -> f32[8] {{\n  {reduced('{}')}\n}}\n"
    endless = "%loop = f32[8] while(%p), condition=%add, body="
    with pytest.raises(AvjaxError, match="a loop with collectives whose trip count"):
        collectives.read(module(f"{endless}%body", more=body))
    assert collectives.read(module(f"{endless}%add", more=body)) == []
    with pytest.raises(AvjaxError, match="has the collective ragged-all-to-all; known are all-reduce, "):
        collectives.read(module("%x = f32[8]{0} ragged-all-to-all(%p, %q), replica_groups={}"))


# ---- What is counted ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "groups", "sent", "beyond"),
    [
        ("all-gather", (EIGHT,), 56, 0),
        ("all-gather", (tuple(range(16)),), 60, 4),
        ("reduce-scatter", (tuple(range(16)),), 60, 4),
        ("all-reduce", (tuple(range(16)),), 120, 8),
        ("all-to-all", (tuple(range(16)),), 60, 32),
        ("all-gather", ((0, 8), (1, 9)), 32, 32),  # each group spans two nodes
        ("all-reduce", ((0, 1), (8, 9)), 64, 0),
        ("collective-permute", ((0, 1), (1, 0)), 64, 0),
        ("collective-permute", ((7, 8),), 64, 64),
        ("collective-permute", ((3, 3),), 0, 0),
        ("all-reduce", ((0,), (1,)), 0, 0),
    ],
)
def test_bytes_that_are_sent(kind, groups, sent, beyond):
    collective = Collective(kind, 64, groups)
    assert (collective.sent(), collective.beyond(8)) == pytest.approx((sent, beyond))


@pytest.mark.parametrize("kind", collectives.KINDS[:3])
def test_the_ring_of_rings_sends_as_much_as_one_ring(kind):
    """Within nodes first, then between devices of the same index: 64 devices on nodes of eight."""
    ring = Collective(kind, 64, (tuple(range(64)),))
    within, between = Collective(kind, 64, (EIGHT,)), Collective(kind, 64 / 8, (tuple(range(0, 64, 8)),))
    assert ring.sent() == pytest.approx(within.sent() + between.sent())
    assert ring.beyond(8) == pytest.approx(between.sent())


@pytest.mark.parametrize(
    ("alone", "work", "links", "expected"),
    [
        (1, 1, 0, (1, 1)),
        (1, 1, 0.5, (2 / 3, 1)),
        (1, 1, 4, (0.2, 0.25)),
        (1, 8, 0, (1 / 8, 1 / 8)),  # every device repeats all of the work
        (1, 0.9, 0, (1, 1)),
    ],
)
def test_bounds(alone, work, links, expected):
    assert scaling.bounds(alone, work, links) == pytest.approx(expected)


def test_the_slower_of_two_networks_counts():
    gathered = [Collective("all-gather", 64e9, (tuple(range(16)),))]
    h100, v5e = scaling.MACHINES["h100"], scaling.MACHINES["v5e"]
    assert h100.seconds(gathered, 16) == pytest.approx(max(56 / 450, 4 / 50))
    assert h100.seconds([Collective("all-gather", 64e9, ((0, 8),))], 16) == pytest.approx(32 / 50)
    assert v5e.seconds(gathered, 16) == pytest.approx(60 / 100)
    assert v5e.seconds(gathered, 256) == pytest.approx(60 / 200)


def made_up_row() -> dict[str, object]:
    """Returns the row of made-up collectives."""
    ops = [Collective("all-reduce", 8e6, (EIGHT,)), Collective("all-gather", 4e6, (EIGHT,), 2)]
    facts = {"preset": "dp", "devices": 8, "parameters": 2_000_000, "gflop": 1978.8}
    report = facts | {"collectives": [vars(c) for c in ops]}
    return scaling._row("etg_aver", 32, json.loads(json.dumps(report)), 1978.8)


def test_row():
    row = made_up_row()
    assert row["calls"] == 3
    assert (row["all_reduce_mb"], row["all_gather_mb"], row["all_to_all_mb"]) == pytest.approx((14, 7, 0))
    assert (row["sent_mb"], row["beyond_mb"]) == pytest.approx((21, 0))
    assert row["h100_work_seconds"] == pytest.approx(0.01)
    assert row["h100_link_seconds"] == pytest.approx(21e6 / 450e9)
    assert row["h100_efficiency"] == pytest.approx(0.01 / (0.01 + 21e6 / 450e9))
    assert row["h100_efficiency_overlapped"] == 1


def test_steps_are_those_of_accelerators(monkeypatch):
    monkeypatch.setattr(jax.lax, "platform_dependent", scaling.as_on_accelerators)
    queries = jnp.ones((1, 64, 2, 4))
    jaxpr = str(jax.make_jaxpr(attention.attended)(queries, queries, queries, jnp.ones((1, 64), bool)))
    assert "dot_general" in jaxpr
    assert not any(loop in jaxpr for loop in ("scan", "while", "cond"))  # on a CPU heads are computed one after another


# ---- Real steps -----------------------------------------------------------------------------------------------------

SMALL = """
import json
from benchmarks import scaling

streams = {"text": ((5, 16), "float32"), "audio": ((6, 16), "float32"), "video": ((4, 16), "float32")}
case = scaling.Case("configs/etg_mafw.py", streams, {"model__width": 16})
for preset in ("dp", "fsdp", "lanes"):
    print(json.dumps(scaling.compiled(case, preset, clips=2)))
"""


@pytest.mark.thorough
def test_small_steps():
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=8 {scaling._FLAGS}",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run([sys.executable, "-c", SMALL], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = {row["preset"]: row for row in map(json.loads, done.stdout.splitlines())}
    size = {
        preset: {kind: sum(c["size"] for c in row["collectives"] if c["kind"] == kind) for kind in collectives.KINDS}
        for preset, row in rows.items()
    }
    for row in rows.values():
        assert row["devices"] == 8
        assert row["gflop"] > 0
        assert all(c["groups"] == [list(EIGHT)] for c in row["collectives"])
    gradients = 4 * rows["dp"]["parameters"]
    assert gradients <= size["dp"]["all-reduce"] < 1.1 * gradients
    assert sum(size["dp"].values()) == size["dp"]["all-reduce"]
    # Parameters that are sharded between steps are gathered within them.
    assert size["fsdp"]["all-gather"] > gradients / 2
    # Lanes only reduce their sums: the losses by term, and the gradient's norm.
    assert set(filter(None, size["lanes"].values())) == {5 * 8 * 4}
    assert rows["lanes"]["parameters"] == rows["dp"]["parameters"]


# ---- The command and its record -------------------------------------------------------------------------------------


def test_a_process_that_fails_is_an_error():
    with pytest.raises(AvjaxError, match=r"etg_aver on 1 devices \(ring\) was not compiled: .*mesh\.preset is 'ring'"):
        scaling._compiled("etg_aver", 1, 2, ["ring"])


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--devices=8,x", "--devices=8,x; expected whole numbers above 0, such as 8,64,256"),
        ("--models=alloy", "alloy is not among etg_aver, de_iii, etg_aver_raw"),
    ],
)
def test_a_mistake_is_one_line(flag, message):
    assert_one_line(bench("scaling", flag), message)


def test_committed_results_can_be_added_to():
    rows = committed("scaling", scaling.KEY)
    assert {row["model"] for row in rows} <= set(scaling.CASES)
    assert list(rows[0]) == ["benchmark", *made_up_row(), *record.circumstances()]
