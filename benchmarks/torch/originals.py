"""The encoders of transformers, in PyTorch: made at random, given our inputs, asked for their features."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from avjax.encoders import formats
from benchmarks import record
from benchmarks.ways import torch_device


def new(config: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """The encoder of a configuration, of random weights, for evaluation; and the tensors of its checkpoint file."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    torch.set_num_threads(record.cores())
    flow = config.model_type == "perceiver"
    model = transformers.PerceiverForOpticalFlow(config) if flow else transformers.AutoModel.from_config(config)
    model.eval()
    if config.model_type in ("efficientnet", "perceiver"):
        _revive(model)
    # By way of the file: its names are the hub's, those in memory change with transformers.
    with tempfile.TemporaryDirectory(prefix="avjax-") as folder:
        model.save_pretrained(folder)
        tensors = formats.read(Path(folder) / "model.safetensors")
    model = model.get_encoder() if config.is_encoder_decoder else model
    pooler = getattr(model, "pooler", None)
    if pooler is not None and any(True for _ in pooler.parameters()):
        model.pooler = None  # a product that ours does not make
    return model, tensors


def _revive(model: Any) -> None:
    """Weights that let a signal through to the end; transformers' own start makes it vanish."""
    import torch

    for module in model.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            torch.nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(module.weight)


def placed(thing: Any, dtype: str) -> Any:
    """A model or a tensor on PyTorch's device, of `dtype`."""
    import torch

    return thing.to(torch_device(), getattr(torch, dtype))


def inputs(ours: np.ndarray, dtype: str) -> Any:
    """Our inputs as the originals take them, on their device: told apart by rank and kind."""
    import torch

    there = torch.from_numpy(ours)
    if there.ndim == 4:
        there = there.permute(0, 3, 1, 2).contiguous()
    if there.ndim == 5:
        there = _patches(there)
    return placed(there, dtype) if ours.dtype.kind == "f" else there.long().to(torch_device())


def _patches(pairs: Any) -> Any:
    """Pairs of pictures (b, 2, h, w, 3) → (b, 2, 27, h, w), the 3x3 pixels about each, as Perceiver IO takes them."""
    import torch

    padded = torch.nn.functional.pad(pairs, (0, 0, 1, 1, 1, 1))
    windows = padded.unfold(2, 3, 1).unfold(3, 3, 1)  # b 2 h w 3 y x
    return windows.permute(0, 1, 5, 6, 4, 2, 3).flatten(2, 4).contiguous()


def asked(model: Any, there: Any) -> Any:
    """The original's features (b, s, d), when they are there."""
    answer = model(there)
    if "last_hidden_state" not in answer:
        return finished(answer.logits.flatten(1, 2))  # flow, (b, h, w, 2)
    features = answer.last_hidden_state
    return finished(features if features.ndim == 3 else features.flatten(2).mT)  # of a convolutional one (b, d, h, w)


def finished(tensor: Any) -> Any:
    """The tensor, when it is computed."""
    if tensor.is_cuda:
        import torch

        torch.cuda.synchronize()
    return tensor
