"""Train the class-conditional emoji transformer: a small DiT that draws a picture a caption.

    python examples/train_emoji_dit.py --data emoji32.npz --out emoji-dit --minutes 45

One class a caption, plus the null class of classifier-free guidance. Noise prediction in pixel
space with min-SNR weights (Hang et al. 2023), Muon for the matrices and AdamW for the rest,
averaged weights. An hour on two CPU cores, minutes on a GPU.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections import deque
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from diffusers import DDPMScheduler, DiTTransformer2DModel
from rich.progress import Progress
from torch import nn

UNET = Path(__file__).resolve().parent / "models" / "emoji-unet"  # the captions and the schedule
GAMMA = 5.0  # the signal-to-noise ratio above which a step's weight falls


@dataclass(frozen=True)
class Recipe:
    """How to train; the learning rate falls to zero at the first end of `steps` and `minutes`."""

    steps: int = 20_000
    minutes: float = 45.0
    batch: int = 32
    rate: float = 5e-3
    warmup: float = 0.03  # of the run
    drop: float = 0.1  # chance of the null class
    average: float = 0.999


def pictures(data: Path, names: Path) -> torch.Tensor:
    """The picture of each caption in [-1, 1], (classes, 3, 32, 32)."""
    with np.load(data) as archive:
        images, found = archive["images"], [str(name) for name in archive["names"]]
    rows = [found.index(name) for name in json.loads(names.read_text())]
    return torch.from_numpy(images[rows]).permute(0, 3, 1, 2).float() / 127.5 - 1


def network(classes: int, layers: int = 12) -> DiTTransformer2DModel:
    """An untrained transformer, 64 patches of 4×4 pixels; its blocks start as the identity."""
    model = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=3,
        out_channels=3,
        num_layers=layers,
        sample_size=32,
        patch_size=4,
        num_embeds_ada_norm=classes,
    )
    for block in model.transformer_blocks:
        _zero(block.norm1.linear)
        nn.init.normal_(block.norm1.emb.class_embedder.embedding_table.weight, std=0.02)
    _zero(model.proj_out_2)
    return model


def _zero(layer: nn.Linear) -> None:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


def optimizers(model: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for hidden matrices; AdamW for biases, embeddings, the first and the last layer."""
    others = ("embedding_table", "pos_embed", "proj_out_2")
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        hidden = parameter.ndim == 2 and not any(word in name for word in others)
        (matrices if hidden else rest).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=rate, weight_decay=0.0, betas=(0.9, 0.99)),
    ]


def rate_at(progress: float, warmup: float) -> float:
    """A linear warm-up, then half a cosine to zero; `progress` and the result lie in [0, 1]."""
    if progress < warmup:
        return progress / warmup
    return 0.5 + 0.5 * math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup)))


def loss_of(
    model: nn.Module, images: torch.Tensor, alphas: torch.Tensor, recipe: Recipe
) -> torch.Tensor:
    """Weighted squared error of the predicted noise, on a random batch.

    Labels are dropped here, once for the network: in training mode each of diffusers' blocks has
    an embedding that drops them on its own, so that no batch would be all null class.
    """
    device, classes = images.device, len(images)
    labels = torch.randint(classes, (recipe.batch,), device=device)
    steps = torch.randint(len(alphas), (recipe.batch,), device=device)
    clean = images[labels]
    noise = torch.randn_like(clean)
    signal = alphas[steps, None, None, None]
    noisy = signal.sqrt() * clean + (1 - signal).sqrt() * noise
    labels = labels.where(torch.rand(recipe.batch, device=device) >= recipe.drop, classes)
    with torch.autocast(device.type, torch.bfloat16):
        told = model(noisy, timestep=steps, class_labels=labels, return_dict=False)[0]
    ratio = signal / (1 - signal)
    loss: torch.Tensor = ((told.float() - noise).square() * (GAMMA / ratio).clamp(max=1)).mean()
    return loss


def take_step(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """One update at that learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def blend(average: nn.Module, model: nn.Module, share: float) -> None:
    """Move the average towards the network, by that share of the way."""
    for mean, value in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(value, share)


def train(
    model: DiTTransformer2DModel, images: torch.Tensor, alphas: torch.Tensor, recipe: Recipe
) -> Iterator[tuple[float, float, DiTTransformer2DModel]]:
    """Train in place; after each step yield (progress in [0, 1], loss, averaged network)."""
    model.eval()  # no dropout of diffusers' own, see `loss_of`
    average = deepcopy(model).requires_grad_(False)
    groups = optimizers(model, recipe.rate)
    start, progress = time.monotonic(), 0.0
    for step in range(1, recipe.steps + 1):
        loss = loss_of(model, images, alphas, recipe)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in groups:
            take_step(optimizer, recipe.rate * rate_at(progress, recipe.warmup))
        blend(average, model, 1 - min(recipe.average, step / (step + 10)))  # the first fade fast
        progress = max(step / recipe.steps, (time.monotonic() - start) / (60 * recipe.minutes))
        yield min(progress, 1.0), loss.item(), average
        if progress >= 1:
            return


def save(model: DiTTransformer2DModel, out: Path) -> None:
    """Write the network in half precision, with its training schedule beside it."""
    deepcopy(model).half().save_pretrained(out)
    shutil.copytree(UNET / "scheduler", out / "scheduler", dirs_exist_ok=True)


def main(
    data: Annotated[Path, typer.Option(help="emoji32.npz: `images` (n, 32, 32, 3) and `names`.")],
    out: Annotated[Path, typer.Option(help="The diffusers folder to write.")] = Path("emoji-dit"),
    names: Annotated[Path, typer.Option(help="Captions, one a class.")] = UNET / "names.json",
    steps: Annotated[int, typer.Option(help="Steps at most.")] = Recipe.steps,
    minutes: Annotated[float, typer.Option(help="Minutes at most.")] = Recipe.minutes,
    batch: Annotated[int, typer.Option(help="Pictures a step.")] = Recipe.batch,
    rate: Annotated[float, typer.Option(help="Highest learning rate.")] = Recipe.rate,
    layers: Annotated[int, typer.Option(help="Transformer blocks.")] = 12,
    every: Annotated[int, typer.Option(help="Steps between checkpoints and log lines.")] = 250,
    seed: Annotated[int, typer.Option(help="Of the weights, batches and noise.")] = 0,
) -> None:
    """Train on the GPU if there is one, else on the CPU; write averaged weights to OUT."""
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe = Recipe(steps=steps, minutes=minutes, batch=batch, rate=rate)
    images = pictures(data, names).to(device)
    schedule = DDPMScheduler.from_pretrained(UNET / "scheduler")
    model = network(len(images), layers).to(device)
    recent: deque[float] = deque(maxlen=every)
    with Progress() as bar:
        task = bar.add_task("training", total=1.0)
        alphas = schedule.alphas_cumprod.to(device)
        for step, (progress, loss, average) in enumerate(train(model, images, alphas, recipe), 1):
            recent.append(loss)
            bar.update(task, completed=progress, description=f"step {step}, loss {loss:.4f}")
            if step % every == 0 or progress >= 1:
                mean = sum(recent) / len(recent)
                bar.console.print(f"step {step}, {progress:.0%} of the run, loss {mean:.5f}")
                save(average, out)


if __name__ == "__main__":
    typer.run(main)
