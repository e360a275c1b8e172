"""MFN (Zadeh et al., AAAI 2018) as released: its names, and its tensors as parameters of ours."""

from collections.abc import Mapping

from avjax.models.fusions.mfn import Mfn
from benchmarks.torch import fusions as torch_fusions
from tests.references import layouts
from tests.references.lmf import batch

__all__ = ["IGNORED", "answers", "batch", "convert", "module", "reference"]
STREAMS = {"l": "text", "a": "audio", "v": "video"}
IGNORED: dict[str, str] = {}
reference = torch_fusions.mfn


def gate(state: layouts.State, name: str, memory: int) -> dict:
    """The first layer reads what was attended to, then the memory."""
    first, out = layouts.dense(state, f"{name}_fc1"), layouts.dense(state, f"{name}_fc2")
    return {
        "input": {"kernel": first["kernel"][:-memory], "bias": first["bias"]},
        "memory": first["kernel"][-memory:],
        "out": out["kernel"],
        "out_bias": out["bias"],
    }


def convert(state: layouts.State, hyper: Mapping) -> dict:
    params = {f"{stream}_states": layouts.lstm(state, f"lstm_{s}") for s, stream in STREAMS.items()}
    for ours, theirs in (("attention", "att1"), ("proposal", "att2")):
        params[ours] = {"hidden": layouts.dense(state, f"{theirs}_fc1"), "out": layouts.dense(state, f"{theirs}_fc2")}
    return params | {
        "retain": gate(state, "gamma1", hyper["memsize"]),
        "update": gate(state, "gamma2", hyper["memsize"]),
        "output": layouts.dense(state, "out_fc1"),
        "head": layouts.dense(state, "out_fc2"),
    }


def module(hyper: Mapping) -> Mfn:
    parts = ("NN1Config", "NN2Config", "gamma1Config", "gamma2Config", "outConfig")
    hidden = (hyper[part]["shapes"] for part in parts)
    names = ("attention", "proposal", "retain", "update", "output")
    return Mfn(
        hyper["num_classes"],
        widths=dict(zip(("text", "audio", "video"), hyper["hidden_dims"], strict=True)),
        memory=hyper["memsize"],
        as_released=True,
        **dict(zip(names, hidden, strict=True)),
    )


def answers(output) -> dict:
    return {"logits": output.logits["fusion"], "L": output.features["states"]}
