"""ETG-AVER (`full`) and its training loop in plain, eager PyTorch: the baseline for avjax's compiled lanes.

Written as a PyTorch user would: tensors on the device, shuffled indices, `AdamW`, `LambdaLR`, one run after another.
The equations are the paper's, numbered as in `avjax.models.etg_aver`; without dropout, as in `configs/etg_mafw.py`.
Shapes: b clip, n step of a stream, l token, g segment, d width, c class.
"""

import copy
import dataclasses
import math
from collections.abc import Mapping

import flax.traverse_util
import jax
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avjax.training.batches import Resident
from avjax.training.lanes import LanePlan

STREAMS = ("text", "audio", "video")
_EVAL_BATCH = 64
_STD_FLOOR = 1e-2

Batch = Mapping[str, Tensor]


class EtgAver(nn.Module):
    """Maps `<stream> (b, n, w)`, zero where `<stream>_mask (b, n)` is False, to {head: logits (b, c)}.

    Args:
      inputs: width w of each stream.
      classes: number of classes c.
      config: the `model` part of a configuration, of which only what `full` leaves open is read: width, segment_count,
        temperature, summary.
    """

    def __init__(self, inputs: Mapping[str, int], classes: int, config):
        super().__init__()
        width = config.width
        self.temperature, self.segment_count = config.temperature, config.segment_count
        self.first = config.summary == "first"
        self.project = nn.ModuleDict(
            {s: nn.Linear(inputs[s], width) if inputs[s] != width else nn.Identity() for s in STREAMS}
        )
        self.guide = nn.ModuleDict({s: nn.Linear(width, width) for s in ("audio", "video")})
        self.fuse = nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")})
        self.head = nn.ModuleDict({name: nn.Linear(width, classes) for name in ("fusion", *STREAMS)})

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Returns the logits of all heads."""
        masks = {s: batch[f"{s}_mask"] for s in STREAMS}
        steps = {s: self.project[s](batch[s]) * masks[s][..., None] for s in STREAMS}
        vectors = {"text": steps["text"][:, 0] if self.first else masked_mean(steps["text"], masks["text"])}
        has_text = masks["text"].any(-1)
        for s in ("audio", "video"):
            steps[s] = self.guided(s, vectors["text"], has_text, steps[s], masks[s])
            vectors[s] = masked_mean(steps[s], masks[s])
        vectors["fusion"] = self.fused(steps, masks)
        return {name: head(vectors[name]) for name, head in self.head.items()}

    def guided(self, stream: str, summary: Tensor, has_text: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        """Computes Eqs. 3–4: weighs the steps of x (b, n, d) by their cosine to the mapped text summary (b, d)."""
        similarity = F.cosine_similarity(self.guide[stream](summary)[:, None], x, dim=-1) * has_text[:, None]
        weights = masked_softmax(similarity / self.temperature, mask)
        return x * (weights * mask.sum(-1, keepdim=True))[..., None]

    def fused(self, steps: Batch, masks: Batch) -> Tensor:
        """Computes Eq. 5, (b, d): queries of text, keys of audio, values of video (of audio where it is missing)."""
        audio, heard = segments(steps["audio"], masks["audio"], self.segment_count)
        video, seen = segments(steps["video"], masks["video"], self.segment_count)
        sighted = seen.any(-1, keepdim=True)
        source = torch.where(sighted[..., None], video, audio)
        valid = torch.where(sighted, seen, heard)  # (b, g)
        query = self.fuse["query"](steps["text"])
        key = self.fuse["key"](audio) * heard[..., None]
        scores = query @ key.mT / math.sqrt(query.shape[-1])  # (b, l, g)
        context = masked_softmax(scores, valid[:, None]) @ self.fuse["value"](source)  # (b, l, d)
        return masked_mean(context, masks["text"])


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Averages (b, n, d) over the True steps to (b, d); zeros where there is none."""
    return (x * mask[..., None]).sum(1) / mask.sum(1).clamp(min=1)[:, None]


def masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Applies a softmax over the True entries of the last axis; zeros where there is none."""
    return scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1) * mask


def segments(x: Tensor, mask: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Averages `count` equal, possibly overlapping spans of each clip: (b, g, d) and whether a span has a step."""
    step = torch.arange(x.shape[1], device=x.device)
    span = torch.arange(count, device=x.device)[:, None]
    length = ((step + 1) * mask).amax(-1)[:, None, None]  # (b, 1, 1)
    begin, end = span * length // count, -(-(span + 1) * length // count)  # (b, g, 1)
    member = (step >= begin) & (step < end) & mask[:, None]  # (b, g, n)
    size = member.sum(-1)
    return member.to(x.dtype) @ x / size.clamp(min=1)[..., None], size > 0


def loss(logits: Mapping[str, Tensor], batch: Batch, weights: Mapping[str, float]) -> Tensor:
    """Computes Eqs. 6–7: (b,), the weighted cross entropies of all heads, 0 for modalities that a clip lacks."""
    total = torch.zeros_like(batch["label"], dtype=torch.float32)
    for head, values in logits.items():
        term = weights[head] * F.cross_entropy(values, batch["label"], reduction="none")
        total = total + (term if head == "fusion" else term * batch[f"{head}_mask"].any(-1))
    return total


def head_weights(config) -> dict[str, float]:
    """Returns head → factor of Eq. 7; `config` is the `model` part of a configuration."""
    return dict(zip(("fusion", *STREAMS), config.loss_weights, strict=True))


# ---- Training -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Run:
    """A fold with a seed: indices of its clips, as `int64` tensors on the device."""

    train: Tensor
    val: Tensor
    test: Tensor
    seed: int


@dataclasses.dataclass
class Trained:
    """The result of a run: test logits (n, c) by the best parameters, updates made, one row per epoch."""

    logits: np.ndarray
    steps: int
    rows: list[dict[str, float]]


def streams(data: Resident, device: str) -> dict[str, Tensor]:
    """Converts the resident clips of avjax to tensors, labels to int64."""
    out = {name: torch.from_numpy(np.array(values)) for name, values in data.streams.items()}
    return {name: values.to(device) for name, values in (out | {"label": out["label"].long()}).items()}


def runs(plan: LanePlan, device: str) -> list[Run]:
    """Converts the lanes of avjax to runs, without their padding."""
    lanes = jax.device_get(plan.lanes)
    out = []
    for i, (_, seed) in enumerate(plan.names):
        parts = [(getattr(lanes, p)[i], getattr(lanes, f"{p}_weight")[i]) for p in ("train", "val", "test")]
        out.append(Run(*(torch.from_numpy(index[weight > 0]).long().to(device) for index, weight in parts), seed))
    return out


def new_model(streams: Batch, classes: int, seed: int, config) -> EtgAver:
    """Builds a model with PyTorch's own initial values, on the device of the streams."""
    torch.manual_seed(seed)
    inputs = {s: streams[s].shape[-1] for s in STREAMS}
    return EtgAver(inputs, classes, config).to(streams["text"].device)


def fit(model: EtgAver, streams: Batch, run: Run, config) -> Trained:
    """Trains `model` on one run, keeps the best epoch by validation UAR, then loss, and predicts the test clips.

    Args:
      model: trained by the call.
      streams: all clips on the device: `<stream>`, `<stream>_mask` and `label` (int64).
      run: the clips to train, validate and test on.
      config: a full training configuration such as `configs/etg_mafw.py`: warm-up and cosine decay, selection by
        validation. Early stopping is not supported.
    """
    streams = standardised(streams, run.train)
    weights = head_weights(config.model)
    optimizer, schedule = optimizer_of(model, len(run.train), config.train)
    best, best_score, rows, steps = None, (-1.0, -math.inf), [], 0
    for epoch in range(1, config.train.epochs + 1):
        model.train()
        total = torch.zeros((), device=run.train.device)
        order = torch.randperm(len(run.train)).to(run.train.device)
        for index in run.train[order].split(config.train.batch_size):
            batch = take(streams, index)
            value = loss(model(batch), batch, weights).mean()
            update(model, optimizer, value, config.train.clip_norm)
            schedule.step()
            total += value.detach() * len(index)
            steps += 1
        uar, val_loss = evaluate(model, streams, run.val, weights)
        rows.append({"epoch": epoch, "train_loss": total.item() / len(run.train), "val_loss": val_loss, "val_uar": uar})
        if (uar, -val_loss) > best_score:
            best, best_score = copy.deepcopy(model.state_dict()), (uar, -val_loss)
    model.load_state_dict(best)
    return Trained(predict(model, streams, run.test)["fusion"].cpu().numpy(), steps, rows)


def update(model: nn.Module, optimizer: torch.optim.Optimizer, value: Tensor, clip_norm: float) -> None:
    """Updates the parameters by the clipped gradient of `value`."""
    optimizer.zero_grad()
    value.backward()
    nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.step()


def optimizer_of(
    model: nn.Module, clips: int, config
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Returns AdamW and its schedule: linear warm-up and cosine decay by progress, as `avjax.training.optim`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    total = config.epochs * math.ceil(clips / config.batch_size)

    def factor(step: int) -> float:
        progress = min((step + 0.5) / total, 1.0)
        rise = min(progress / config.warmup, 1.0)
        done = max((progress - config.warmup) / (1 - config.warmup), 0.0)
        return rise * 0.5 * (1 + math.cos(math.pi * done))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def take(streams: Batch, index: Tensor) -> dict[str, Tensor]:
    """Selects clips."""
    return {name: values[index] for name, values in streams.items()}


def standardised(streams: Batch, counted: Tensor) -> dict[str, Tensor]:
    """Standardises audio and video to mean 0 and standard deviation 1 over the valid steps of the clips `counted`."""
    out = dict(streams)
    for s in ("audio", "video"):
        x, mask = streams[s], streams[f"{s}_mask"]
        valid = x[counted][mask[counted]]  # (steps, w)
        std = valid.std(0, correction=0).clamp(min=_STD_FLOOR)
        out[s] = (x - valid.mean(0)) / std * mask[..., None]
    return out


@torch.no_grad()
def predict(model: EtgAver, streams: Batch, index: Tensor) -> dict[str, Tensor]:
    """Returns {head: logits (n, c)} for the clips `index (n,)`, in batches."""
    model.eval()
    parts = [model(take(streams, part)) for part in index.split(_EVAL_BATCH)]
    return {head: torch.cat([p[head] for p in parts]) for head in parts[0]}


def evaluate(model: EtgAver, streams: Batch, index: Tensor, weights: Mapping[str, float]) -> tuple[float, float]:
    """Returns UAR of the fusion head and mean loss over the clips `index`."""
    logits = predict(model, streams, index)
    batch = take({name: values for name, values in streams.items() if name not in STREAMS}, index)
    hit = (logits["fusion"].argmax(-1) == batch["label"]).float()
    classes = F.one_hot(batch["label"], logits["fusion"].shape[-1]).float()  # (n, c)
    support = classes.sum(0)
    recall = hit @ classes / support.clamp(min=1)
    return (recall.sum() / (support > 0).sum()).item(), loss(logits, batch, weights).mean().item()


# ---- The same parameters on both sides ----------------------------------------------------------------------------


def from_flax(params: Mapping) -> dict[str, Tensor]:
    """Converts parameters (or gradients) of one lane of `avjax.models.etg_aver` to a `state_dict` of `EtgAver`."""
    out = {}
    for name, value in flax.traverse_util.flatten_dict(params, sep=".").items():
        ours = name.replace("_", ".").replace(".map", "").replace("kernel", "weight")
        out[ours] = torch.from_numpy(np.array(value).T.copy())
    return out
