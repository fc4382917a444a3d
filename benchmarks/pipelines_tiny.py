"""Diffusers pipelines of random parts, as small as they come; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers as d
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

WIDTH = 32
LETTERS = "abcdefghijklmnopqrstuvwxyz ,.-"


def tokenizer(length: int = 16) -> Any:
    """Letters to numbers; padded with 1, between 0 and 2."""
    words = {word: n for n, word in enumerate(("<s>", "<pad>", "</s>", "<unk>", *LETTERS))}
    made = Tokenizer(WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = Split("", "isolated")
    made.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, model_max_length=length, bos_token="<s>", eos_token="</s>",
        unk_token="<unk>", pad_token="<pad>",
    )  # fmt: skip


def clip(kind: Any = CLIPTextModel, act: str = "quick_gelu") -> Any:
    """A text encoder of CLIP."""
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=40, hidden_size=WIDTH, intermediate_size=37, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=16, projection_dim=WIDTH,
        bos_token_id=0, eos_token_id=2, pad_token_id=1, hidden_act=act,
    )  # fmt: skip
    return kind(config).eval()


def t5(kind: Any = T5EncoderModel, config: Any = T5Config) -> Any:
    """A text encoder of T5."""
    torch.manual_seed(0)
    return kind(
        config(vocab_size=40, d_model=WIDTH, d_kv=8, d_ff=37, num_layers=2, num_heads=4,
               pad_token_id=1, eos_token_id=2, decoder_start_token_id=0)
    ).eval()  # fmt: skip


def vae(channels: int = 4, **options: Any) -> Any:
    """A decoder of pictures twice as large as their latents."""
    torch.manual_seed(0)
    return d.AutoencoderKL(
        block_out_channels=(16, 32), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=channels, norm_num_groups=8,
        sample_size=32, **options,
    ).eval()  # fmt: skip


def stable_diffusion(scheduler: Any = None) -> Any:
    """Stable Diffusion 1."""
    torch.manual_seed(0)
    unet = d.UNet2DConditionModel(
        block_out_channels=(16, 32), layers_per_block=1, sample_size=16, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=WIDTH,
        attention_head_dim=4,
    ).eval()  # fmt: skip
    scheduler = scheduler or d.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip
    return d.StableDiffusionPipeline(
        unet=unet, scheduler=scheduler, vae=vae(), text_encoder=clip(), tokenizer=tokenizer(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def stable_diffusion_xl() -> Any:
    """SDXL: two text encoders, and a pooled text and sizes beside the timestep."""
    torch.manual_seed(0)
    unet = d.UNet2DConditionModel(
        block_out_channels=(16, 32), layers_per_block=1, sample_size=16, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(2, 4),
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2), cross_attention_dim=2 * WIDTH,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
    ).eval()  # fmt: skip
    scheduler = d.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
        timestep_spacing="leading",
    )  # fmt: skip
    return d.StableDiffusionXLPipeline(
        unet=unet, scheduler=scheduler, vae=vae(), text_encoder=clip(act="gelu"),
        text_encoder_2=clip(CLIPTextModelWithProjection, "gelu"), tokenizer=tokenizer(),
        tokenizer_2=tokenizer(), add_watermarker=False,
    )  # fmt: skip


def pixart() -> Any:
    """PixArt-α: a transformer that predicts variances, too."""
    torch.manual_seed(0)
    transformer = d.PixArtTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3,
        caption_channels=WIDTH, in_channels=4, cross_attention_dim=24, out_channels=8,
        norm_type="ada_norm_single", norm_eps=1e-6, use_additional_conditions=False,
    ).eval()  # fmt: skip
    return d.PixArtAlphaPipeline(
        tokenizer=tokenizer(), text_encoder=t5(), vae=vae(), transformer=transformer,
        scheduler=d.DDIMScheduler(),
    )  # fmt: skip


def stable_diffusion_3() -> Any:
    """SD3: three text encoders whose states stand side by side and one after another."""
    torch.manual_seed(0)
    transformer = d.SD3Transformer2DModel(
        sample_size=16, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=2 * WIDTH,
        pooled_projection_dim=2 * WIDTH, out_channels=4,
    ).eval()  # fmt: skip
    return d.StableDiffusion3Pipeline(
        transformer=transformer, scheduler=d.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False,
                use_post_quant_conv=False),
        text_encoder=clip(CLIPTextModelWithProjection), tokenizer=tokenizer(),
        text_encoder_2=clip(CLIPTextModelWithProjection, "gelu"), tokenizer_2=tokenizer(),
        text_encoder_3=t5_wide(), tokenizer_3=tokenizer(),
    )  # fmt: skip


def t5_wide() -> Any:
    """A text encoder as wide as two of CLIP's."""
    torch.manual_seed(0)
    return T5EncoderModel(
        T5Config(vocab_size=40, d_model=2 * WIDTH, d_kv=8, d_ff=37, num_layers=2, num_heads=4,
                 pad_token_id=1, eos_token_id=2, decoder_start_token_id=0)
    ).eval()  # fmt: skip


def flux() -> Any:
    """FLUX.1: latents in packed squares, guidance as an input."""
    torch.manual_seed(0)
    transformer = d.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    ).eval()  # fmt: skip
    return d.FluxPipeline(
        transformer=transformer, vae=vae(shift_factor=0.06, scaling_factor=0.36),
        scheduler=d.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        text_encoder=clip(), tokenizer=tokenizer(), text_encoder_2=t5(), tokenizer_2=tokenizer(),
    )  # fmt: skip


def wan(**more: Any) -> Any:
    """Wan 2.1: video, guidance as two calls a step."""
    torch.manual_seed(0)
    decoder = d.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False, True, True],
    ).eval()  # fmt: skip
    return d.WanPipeline(
        transformer=wan_transformer(), vae=decoder,
        scheduler=d.UniPCMultistepScheduler(prediction_type="flow_prediction",
                                            use_flow_sigmas=True, flow_shift=3.0),
        text_encoder=t5(UMT5EncoderModel, UMT5Config), tokenizer=tokenizer(), **more,
    )  # fmt: skip


def wan_transformer() -> Any:
    """A denoiser of Wan's."""
    return d.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16,
        out_channels=16, text_dim=WIDTH, freq_dim=64, ffn_dim=32, num_layers=2,
        cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    ).eval()  # fmt: skip


def wan_in_turns() -> Any:
    """Wan 2.2: one network for the noisy steps, another for the others."""
    torch.manual_seed(1)
    return wan(transformer_2=wan_transformer(), boundary_ratio=0.8)


def latent_consistency() -> Any:
    """Stable Diffusion with a scheduler that adds noise in its steps."""
    made = stable_diffusion()
    made.scheduler = d.LCMScheduler.from_config(made.scheduler.config)
    return made


def controlled() -> Any:
    """Stable Diffusion steered by a ControlNet."""
    made = stable_diffusion()
    torch.manual_seed(1)
    net = d.ControlNetModel(
        block_out_channels=(16, 32), layers_per_block=1, in_channels=4, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=WIDTH,
        attention_head_dim=4, conditioning_embedding_out_channels=(16, 32),
    ).eval()  # fmt: skip
    for layer in (*net.controlnet_down_blocks, net.controlnet_mid_block):  # zeros as they are made
        torch.nn.init.normal_(layer.weight, std=0.2)
    return d.StableDiffusionControlNetPipeline(
        **made.components, controlnet=net, requires_safety_checker=False
    )


def from_a_picture() -> Any:
    """Stable Diffusion that starts from a picture, which its autoencoder encodes."""
    parts = stable_diffusion().components
    return d.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)


def cogvideox() -> Any:
    """CogVideoX: video, its text among the tokens."""
    torch.manual_seed(0)
    decoder = d.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4, block_out_channels=(8,) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4, latent_channels=4, layers_per_block=1,
        norm_num_groups=2,
    ).eval()  # fmt: skip
    transformer = d.CogVideoXTransformer3DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=4,
        time_embed_dim=2, text_embed_dim=WIDTH, num_layers=1, sample_width=16, sample_height=16,
        sample_frames=9, max_text_seq_length=16,
    ).eval()  # fmt: skip
    return d.CogVideoXPipeline(
        tokenizer=tokenizer(), text_encoder=t5(), vae=decoder, transformer=transformer,
        scheduler=d.CogVideoXDDIMScheduler(),
    )  # fmt: skip


def ltx() -> Any:
    """LTX-Video: latents in packed cubes, scaled by what its autoencoder has learned."""
    torch.manual_seed(0)
    levels = {"block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4,
              "layers_per_block": (1,) * 5, "decoder_layers_per_block": (1,) * 5,
              "spatio_temporal_scaling": (True, True, False, False),
              "decoder_spatio_temporal_scaling": (True, True, False, False),
              "decoder_inject_noise": (False,) * 5, "upsample_residual": (False,) * 4,
              "upsample_factor": (1,) * 4}  # fmt: skip
    decoder = d.AutoencoderKLLTXVideo(latent_channels=8, patch_size=1, **levels).eval()
    decoder.latents_mean.uniform_(-0.5, 0.5)
    decoder.latents_std.uniform_(0.5, 2)
    transformer = d.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=4, attention_head_dim=8,
        cross_attention_dim=32, num_layers=1, caption_channels=WIDTH,
    ).eval()  # fmt: skip
    return d.LTXPipeline(
        transformer=transformer, vae=decoder, scheduler=d.FlowMatchEulerDiscreteScheduler(),
        text_encoder=t5(), tokenizer=tokenizer(),
    )  # fmt: skip


def auraflow() -> Any:
    """AuraFlow."""
    torch.manual_seed(0)
    transformer = d.AuraFlowTransformer2DModel(
        sample_size=16, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1,
        attention_head_dim=8, num_attention_heads=4, caption_projection_dim=WIDTH,
        joint_attention_dim=WIDTH, out_channels=4, pos_embed_max_size=256,
    ).eval()  # fmt: skip
    return d.AuraFlowPipeline(
        tokenizer=tokenizer(), text_encoder=t5(UMT5EncoderModel, UMT5Config), vae=vae(),
        transformer=transformer, scheduler=d.FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip


PICTURE = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
SQUARE: dict[str, Any] = {"height": 32, "width": 32}
FRAMES = {"height": 16, "width": 16, "num_frames": 5, "max_sequence_length": 16}
# The pipeline, and what its call is given beside a prompt.
PIPELINES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "Stable Diffusion": (stable_diffusion, SQUARE),
    "SDXL": (stable_diffusion_xl, SQUARE),
    "PixArt-α": (pixart, {**SQUARE, "height": 16, "width": 16, "use_resolution_binning": False,
                          "max_sequence_length": 16}),
    "SD3": (stable_diffusion_3, {**SQUARE, "max_sequence_length": 16}),
    "FLUX": (flux, {**SQUARE, "max_sequence_length": 16}),
    "Wan": (wan, FRAMES),
    "Wan 2.2": (wan_in_turns, FRAMES),
    "LCM": (latent_consistency, SQUARE),
    "AuraFlow": (auraflow, {**SQUARE, "max_sequence_length": 16}),
    "CogVideoX": (cogvideox, {**FRAMES, "num_frames": 8}),
    "LTX-Video": (ltx, {**SQUARE, "num_frames": 9, "max_sequence_length": 16}),
    "ControlNet": (controlled, {**SQUARE, "image": PICTURE}),
    "Image to image": (from_a_picture, {"image": PICTURE, "strength": 0.8}),
}  # fmt: skip
