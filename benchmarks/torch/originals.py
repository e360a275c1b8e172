"""The encoders of transformers in PyTorch, with random weights, run on our inputs."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from avjax.encoders import formats
from benchmarks import record
from benchmarks.ways import torch_device


def new(config: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """Builds an encoder of random weights for evaluation; returns it and the tensors of its checkpoint file."""
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
    # Through the file: its names are the hub's, while those in memory change with transformers.
    with tempfile.TemporaryDirectory(prefix="avjax-") as folder:
        model.save_pretrained(folder)
        tensors = formats.read(Path(folder) / "model.safetensors")
    model = model.get_encoder() if config.is_encoder_decoder else model
    pooler = getattr(model, "pooler", None)
    if pooler is not None and any(True for _ in pooler.parameters()):
        model.pooler = None  # ours has none
    return model, tensors


def _revive(model: Any) -> None:
    """Draws weights that keep the signal's scale; with transformers' initial ones it vanishes."""
    import torch

    for module in model.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            torch.nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(module.weight)


def placed(thing: Any, dtype: str) -> Any:
    """Moves a model or a tensor to PyTorch's device, with `dtype`."""
    import torch

    return thing.to(torch_device(), getattr(torch, dtype))


def inputs(ours: np.ndarray, dtype: str) -> Any:
    """Converts our inputs to those of the originals, on their device, according to rank and dtype."""
    import torch

    tensor = torch.from_numpy(ours)
    if tensor.ndim == 4:
        tensor = tensor.permute(0, 3, 1, 2).contiguous()
    if tensor.ndim == 5:
        tensor = _patches(tensor)
    return placed(tensor, dtype) if ours.dtype.kind == "f" else tensor.long().to(torch_device())


def _patches(pairs: Any) -> Any:
    """Gathers the 3x3 pixels around each of pairs (b, 2, h, w, 3), as Perceiver IO takes them: (b, 2, 27, h, w)."""
    import torch

    padded = torch.nn.functional.pad(pairs, (0, 0, 1, 1, 1, 1))
    windows = padded.unfold(2, 3, 1).unfold(3, 3, 1)  # b 2 h w 3 y x
    return windows.permute(0, 1, 5, 6, 4, 2, 3).flatten(2, 4).contiguous()


def features(model: Any, tensor: Any) -> Any:
    """Returns the original's features (b, s, d), once computed."""
    output = model(tensor)
    if "last_hidden_state" not in output:
        return finished(output.logits.flatten(1, 2))  # flow, (b, h, w, 2)
    hidden = output.last_hidden_state
    return finished(hidden if hidden.ndim == 3 else hidden.flatten(2).mT)  # convolutional: (b, d, h, w)


def finished(tensor: Any) -> Any:
    """Returns the tensor, once it is computed."""
    if tensor.is_cuda:
        import torch

        torch.cuda.synchronize()
    return tensor
