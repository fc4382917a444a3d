"""What a trained classifier sees in pictures, and how far apart two sets of pictures are by it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torchmetrics.image.kid import KernelInceptionDistance

WEIGHTS = Path(__file__).resolve().parent.parent / (
    "examples/models/efficientnet-lite0/features.safetensors"
)
STAGES = (  # out, kernel, stride, expansion, repeats
    (16, 3, 1, 1, 1), (24, 3, 2, 6, 2), (40, 5, 2, 6, 2), (80, 3, 2, 6, 3), (112, 5, 1, 6, 3),
    (192, 5, 2, 6, 4), (320, 3, 1, 6, 1),
)  # fmt: skip
PIXELS, BATCH, SUBSETS = 128, 64, 100


class Features(nn.Module):
    """EfficientNet-Lite0 up to its pooled features: (n, 3, h, w) of 0 to 255 -> (n, 1280)."""

    def __init__(self, path: Path = WEIGHTS) -> None:
        super().__init__()
        self.weights: Mapping[str, Tensor] = {n: w.float() for n, w in load_file(path).items()}

    @torch.no_grad()
    def forward(self, pictures: Tensor) -> Tensor:
        """The features of pictures of any size, which are scaled to 128 × 128."""
        x = F.interpolate(pictures.float(), (PIXELS, PIXELS), mode="bilinear", antialias=True)
        x = self.layer("_conv_stem", "_bn0", (x - 127) / 128, 2)
        number, channels = 0, 32
        for out, _, stride, expansion, repeats in STAGES:
            for repeat in range(repeats):
                y = self.block(f"_blocks.{number}", x, 1 if repeat else stride, expansion)
                x = x + y if repeat or (stride == 1 and channels == out) else y
                number, channels = number + 1, out
        return self.layer("_conv_head", "_bn1", x).mean((2, 3))

    def block(self, name: str, x: Tensor, stride: int, expansion: int) -> Tensor:
        """An inverted bottleneck without its shortcut."""
        if expansion > 1:
            x = self.layer(f"{name}._expand_conv", f"{name}._bn0", x)
        x = self.layer(f"{name}._depthwise_conv", f"{name}._bn1", x, stride)
        return self.layer(f"{name}._project_conv", f"{name}._bn2", x, clipped=False)

    def layer(
        self, conv: str, norm: str, x: Tensor, stride: int = 1, clipped: bool = True
    ) -> Tensor:
        """Convolution, padded at the end first as TensorFlow does, batch norm, ReLU6."""
        weight = self.weights[f"{conv}.weight"]
        size, kernel = x.shape[-1], weight.shape[-1]
        pad = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        x = F.pad(x, (pad // 2, pad - pad // 2) * 2)
        x = F.conv2d(x, weight, stride=stride, groups=x.shape[1] // weight.shape[1])
        mean, var, gain, shift = (
            self.weights[f"{norm}.{each}"]
            for each in ("running_mean", "running_var", "weight", "bias")
        )
        x = F.batch_norm(x, mean, var, gain, shift, eps=1e-3)
        return F.relu6(x) if clipped else x


def distances(pictures: Any, reference: Any, others: Any) -> dict[str, float]:
    """How far pictures (uint8, n × h × w × 3) are from a reference's.

    Args:
        reference: of the same noise and prompts, one for one: for `feature_distance`, the mean of
            1 - cos(f, f').
        others: of other noise: for `kid`, 1000 × the kernel inception distance (Bińkowski et al.,
            2018), whose estimate is of independent sets.
    """
    features = Features()
    ours, theirs, far = (_seen(features, each) for each in (pictures, reference, others))
    metric = KernelInceptionDistance(_Known(), subsets=SUBSETS, subset_size=len(ours) // 2)
    metric.update(far, real=True)
    metric.update(ours, real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mean, _ = metric.compute()
    paired = 1 - F.cosine_similarity(ours.double(), theirs.double()).mean()
    return {"feature_distance": float(paired), "kid": 1000 * float(mean)}


class _Known(nn.Module):
    """Features that are there already."""

    num_features = 1280

    def forward(self, features: Tensor) -> Tensor:
        return features


def _seen(features: Features, pictures: Any) -> Tensor:
    planes = torch.as_tensor(pictures).permute(0, 3, 1, 2)
    return torch.cat([features(part) for part in planes.split(BATCH)])
