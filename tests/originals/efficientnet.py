"""EfficientNet in PyTorch."""

import functools

import numpy as np

from tests.originals import Original

# Of google/efficientnet-b0 and -b2.
B0 = {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280, "depthwise_padding": [16]}
B2 = {"width_coefficient": 1.1, "depth_coefficient": 1.2, "hidden_dim": 1408, "depthwise_padding": [5, 8, 16]}


def draw(rng):
    import transformers

    stages = rng.randint(1, 3)
    widths = [32] + [rng.choice([40, 80, 112, 200]) for _ in range(stages)]
    coefficients = {"width_coefficient": rng.choice([0.05, 0.07, 0.1]), "depth_divisor": rng.choice([2, 4])}
    return transformers.EfficientNetConfig(
        image_size=rng.choice([33, 48]),
        depth_coefficient=rng.choice([0.6, 1.0, 1.4]),
        kernel_sizes=[rng.choice([3, 5, 7]) for _ in range(stages)],
        in_channels=widths[:-1],
        out_channels=widths[1:],
        strides=[rng.choice([1, 2]) for _ in range(stages)],
        num_block_repeats=[rng.randint(1, 2) for _ in range(stages)],
        expand_ratios=[rng.choice([1, 2, 6]) for _ in range(stages)],
        depthwise_padding=[i for i in range(6) if rng.random() < 0.5],
        squeeze_expansion_ratio=rng.choice([0.05, 0.25, 0.5]),
        hidden_act=rng.choice(["swish", "relu", "gelu"]),
        hidden_dim=rounded(1280, **coefficients),
        batch_norm_eps=rng.choice([0.5, 0.05]),  # large enough to be seen; real ones are 1e-3
        **coefficients,
    )


def rounded(width, width_coefficient, depth_divisor):
    """The scaled width as a multiple of the divisor: the nearest one, or the next where that loses over a tenth.

    The rule of the published EfficientNets (Tan and Le 2019), as the original has it in a file that needs PyTorch.
    """
    scaled = width * width_coefficient
    near = max(depth_divisor, int(scaled + depth_divisor / 2) // depth_divisor * depth_divisor)
    return int(near + depth_divisor * (near < 0.9 * scaled))


def build(config):
    """With weights and running statistics that keep a signal alive to the top; initial ones make it vanish."""
    import torch
    import transformers

    model = transformers.EfficientNetModel(config)
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.kaiming_normal_(p)
        else:
            torch.nn.init.normal_(p, 0.7, 0.3)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        side = config.image_size
        model.train()(torch.randn(4, 3, side, side))  # running statistics become those of these pictures
    return model.eval()


def inputs(rng, config):
    mask = np.array([True, False, True])
    # Odd and even sides, other than those that the padding was listed for.
    size = rng.integers(40, 80, 2) if config.image_size < 224 else (config.image_size, config.image_size)
    pictures = rng.normal(size=(len(mask), *size, 3)).astype(np.float32)
    pictures[~mask] = np.nan
    return pictures, mask


def reference(model, pictures, mask, layer=None):
    import torch

    with torch.no_grad():
        top = model(torch.tensor(pictures).permute(0, 3, 1, 2)).last_hidden_state  # b d h w
    features = top.flatten(2).transpose(1, 2).numpy()
    return features, np.repeat(mask[:, None], features.shape[1], 1)


def _full(**sizes):
    import transformers

    return transformers.EfficientNetConfig(**sizes)


KINDS = {
    "efficientnet": Original(
        draw=draw,
        build=build,
        inputs=inputs,
        reference=reference,
        full={
            "EfficientNet B0": (functools.partial(_full, image_size=224, **B0), 3_986_540),
            "EfficientNet B2": (functools.partial(_full, image_size=260, **B2), 7_667_210),
        },
    ),
}
