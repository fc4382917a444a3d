"""Text to emoji as a whole pipeline: compiled, saved, and run without torch.

    .venv/bin/python examples/pipeline.py ["cat face"]

Writes out/pipeline/emoji.effuse, and a picture by it with torch and diffusers out of reach.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from emoji import WORDS, EmojiPipeline
from PIL import Image
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from torch import nn
from transformers import PreTrainedTokenizerFast

import effuse
from effuse.metrics import psnr_db

OUT = Path("out") / "pipeline"
WITHOUT_TORCH = """
import sys
for name in ("torch", "diffusers", "transformers"):
    sys.modules[name] = None
import effuse, numpy
path, prompt, target = sys.argv[1:]
numpy.save(target, effuse.load(path).run(prompt, seed=1))
"""


class TextToEmoji(DiffusionPipeline):
    """The text-to-emoji network in diffusers' manner: tokenizer, text encoder, UNet, scheduler."""

    def __init__(
        self, tokenizer: Any, text_encoder: nn.Module, unet: nn.Module, scheduler: DDIMScheduler
    ) -> None:
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer, text_encoder=text_encoder, unet=unet, scheduler=scheduler
        )

    @classmethod
    def open(cls) -> TextToEmoji:
        """The trained network; the table of words is its text encoder."""
        emoji = EmojiPipeline.open()
        table = nn.Embedding.from_pretrained(emoji._table).eval()
        return cls(words(emoji._index), table, emoji.unet, emoji.scheduler)

    def embed(self, prompt: str) -> torch.Tensor:
        """A prompt as (1, 8, 64) embeddings."""
        read = self.tokenizer(prompt, padding="max_length", max_length=WORDS, truncation=True,
                              return_tensors="pt")  # fmt: skip
        return self.text_encoder(read.input_ids)

    @torch.no_grad()
    def __call__(
        self, prompt: str, negative_prompt: str = "", num_inference_steps: int = 50,
        guidance_scale: float = 1.5, generator: torch.Generator | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """One picture, (1, 32, 32, 3) in [0, 1]."""
        states = torch.cat([self.embed(negative_prompt), self.embed(prompt)])
        self.scheduler.set_timesteps(num_inference_steps)
        x = torch.randn(1, 3, 32, 32, generator=generator)
        for time in self.progress_bar(self.scheduler.timesteps):
            both = torch.cat([x, x])
            noise = self.unet(both, time, encoder_hidden_states=states, return_dict=False)[0]
            free, told = noise.chunk(2)
            x = self.scheduler.step(free + guidance_scale * (told - free), time, x).prev_sample
        return (((x + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1).numpy(),)


def words(index: dict[str, int]) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words; one that the network does not know counts as padding."""
    made = Tokenizer(WordLevel(index, unk_token="<pad>"))
    made.normalizer = normalizers.Replace("-", " ")
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", index["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<bos>", pad_token="<pad>",
        model_max_length=WORDS,
    )  # fmt: skip


def main(prompt: str = "cat face", steps: int = 50) -> float:
    """Compile, save, run in another process; the agreement of the pictures in dB."""
    OUT.mkdir(parents=True, exist_ok=True)
    pipe = TextToEmoji.open()
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(prompt, "", steps, generator=torch.Generator().manual_seed(1))[0]
    compiled = effuse.compile_pipeline(pipe, "exact", steps=steps, prompts=("red heart",))
    print("\n".join(compiled.report))
    path = compiled.save(OUT / "emoji.effuse")
    target = OUT / "picture.npy"
    command = [sys.executable, "-P", "-c", WITHOUT_TORCH, str(path), prompt, str(target)]
    subprocess.run(command, check=True)
    found = np.load(target)
    picture = Image.fromarray((found[0] * 255).round().astype(np.uint8))
    picture.resize((256, 256), Image.Resampling.NEAREST).save(OUT / "picture.png")
    agreement = psnr_db(expected, found, peak=1.0)
    print(f"{path}: {compiled.size / 1e6:.1f} MB; the picture without torch is the pipeline's to "
          f"{agreement:.1f} dB: {OUT / 'picture.png'}")  # fmt: skip
    return agreement


if __name__ == "__main__":
    main(*sys.argv[1:2])
