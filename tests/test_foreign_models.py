"""Networks of other libraries, and in their manner, through the rewrites and ONNX Runtime."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from effuse.backends.onnx import build, load_session
from effuse.capture import capture
from effuse.metrics import sqnr_db
from effuse.pass_manager import run_passes
from effuse.passes import Canonicalize, Hoist
from effuse.program import run_program

logging.getLogger("torch.__trace").disabled = True

Case = tuple[nn.Module, dict[str, Any], dict[str, str]]
WINDOW, WIDTH, HEADS = 4, 16, 2


class Windows(nn.Module):
    """Attention in shifted windows with a table of biases, layer scale, and a gated linear unit."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.head = nn.Conv2d(4, WIDTH, 2, 2), nn.ConvTranspose2d(WIDTH, 4, 2, 2)
        self.norm, self.time = nn.LayerNorm(WIDTH), nn.Linear(1, WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.gates, self.out = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.gamma = nn.Parameter(torch.full((WIDTH,), 0.5))
        self.table = nn.Parameter(torch.randn((2 * WINDOW - 1) ** 2, HEADS))
        places = torch.cartesian_prod(*[torch.arange(WINDOW)] * 2)
        apart = places[:, None] - places[None] + WINDOW - 1
        index = apart[..., 0] * (2 * WINDOW - 1) + apart[..., 1]
        self.register_buffer("index", index, persistent=False)
        region = torch.bucketize(torch.arange(8), torch.tensor([8 - WINDOW, 6]), right=True)
        same = self.cut((3 * region[:, None] + region)[None, ..., None])[..., 0]
        mask = torch.where(same[:, None] == same[:, :, None], 0.0, -100.0)
        self.register_buffer("mask", mask, persistent=False)

    def cut(self, x: torch.Tensor) -> torch.Tensor:
        b, h, w, c = x.shape
        x = x.view(b, h // WINDOW, WINDOW, w // WINDOW, WINDOW, c)
        return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, WINDOW**2, c)

    def attended(self, x: torch.Tensor) -> torch.Tensor:
        count, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(count, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        biases = self.table[self.index.view(-1)].view(tokens, tokens, -1).permute(2, 0, 1)
        scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1) + biases[None]
        scores = scores.view(-1, len(self.mask), HEADS, tokens, tokens) + self.mask[None, :, None]
        weights = F.softmax(scores.view(-1, HEADS, tokens, tokens), dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(count, tokens, WIDTH))

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = self.patch(sample).permute(0, 2, 3, 1) + self.time(timestep[:, None])[:, None, None]
        b, h, w, c = x.shape
        y = self.attended(self.cut(torch.roll(self.norm(x), (-2, -2), (1, 2))))
        y = y.view(b, h // WINDOW, w // WINDOW, WINDOW, WINDOW, c).permute(0, 1, 3, 2, 4, 5)
        x = x + self.gamma * torch.roll(y.reshape(b, h, w, c), (2, 2), (1, 2))
        gate, value = self.gates(self.norm(x)).chunk(2, dim=-1)
        x = x + self.gamma * self.out(F.silu(gate) * value)
        return self.head(x.permute(0, 3, 1, 2))


def windows() -> Case:
    return Windows(), {"sample": torch.randn(2, 4, 16, 16), "timestep": torch.full((2,), 5.0)}, {}


def transformers(name: str) -> Any:
    reason = f"a network of the package transformers, which has no {name} here"
    return pytest.importorskip(f"transformers.models.{name}", reason=reason)


def speech_head() -> Case:
    """The head of VibeVoice, which denoises one frame of sound."""
    kind = transformers("vibevoice.modeling_vibevoice").VibeVoiceDiffusionHead
    config = SimpleNamespace(
        latent_size=8, hidden_size=16, num_hidden_layers=2, frequency_embedding_size=8,
        diffusion_max_period=10000, hidden_act="silu", intermediate_size=24, mlp_bias=False,
        rms_norm_eps=1e-5,
    )  # fmt: skip
    given = {"noisy_images": torch.randn(2, 8), "timesteps": torch.full((2,), 500.0),
             "condition": torch.randn(2, 16)}  # fmt: skip
    roles = {"noisy_images": "latent", "timesteps": "timestep", "condition": "prompt"}
    return kind(config), given, roles


def speech_transformer() -> Case:
    """The diffusion transformer of Qwen2.5-Omni, with guidance in forward and masks by block."""
    module = transformers("qwen2_5_omni.modeling_qwen2_5_omni")
    config = module.Qwen2_5OmniDiTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=8, emb_dim=8,
        block_size=4, look_ahead_layers=[1], look_backward_layers=[0], num_embeds=20, mel_dim=8,
        enc_emb_dim=8, enc_dim=8, enc_channels=[8, 8, 8, 8, 24], enc_attention_channels=4,
        enc_se_channels=4, max_position_embeddings=64,
    )  # fmt: skip
    given = {
        "hidden_states": torch.randn(1, 12, 8), "condition_vector": torch.randn(1, 20, 8),
        "speaker_embedding": torch.randn(1, 12, 8), "time_step": torch.tensor(0.5),
        "quantized_code": torch.randint(0, 20, (1, 6)),
    }  # fmt: skip
    roles = {**dict.fromkeys(given, "prompt"), "hidden_states": "latent", "time_step": "timestep"}
    return module.Qwen2_5OmniToken2WavDiTModel(config), given, roles


@pytest.mark.parametrize("make", [windows, speech_head, speech_transformer])
def test_exact_to_the_bit_and_in_onnx(make: Callable[[], Case], tmp_path) -> None:
    torch.manual_seed(0)
    model, given, roles = make()
    captured = capture(model.eval().requires_grad_(False), given, roles=roles)
    program = run_passes(captured, (Canonicalize(), Hoist()))
    assert captured.expected is not None
    assert torch.equal(run_program(program, program.examples)[0], captured.expected[0])
    assert len(program.parts) > 1  # what the timestep tells has left the step
    if make is speech_transformer:
        return  # its lowering takes seconds
    build(program, tmp_path)
    found = load_session(program.spec(), tmp_path)(**given)
    assert sqnr_db(captured.expected[0].numpy(), found.numpy()) > 120
