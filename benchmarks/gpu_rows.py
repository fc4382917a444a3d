"""What gpu.py measures, as data: sections, layers, formats, fused operations, tiles, asked figures.

Layers are written (N, K): a weight of N outputs and K inputs; M rows of activations come in.
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

SECTIONS = {  # in the order of the run: what they are, and their share of the time
    "ceilings": ("what this GPU reaches: bf16, fp8 and int8 products, a copy", 1),
    "correct": ("every kernel against exact references, before anything is timed", 3),
    "kernels": ("linear layers of SDXL, PixArt, SD3 and FLUX against cuBLAS and torchao", 7),
    "branches": ("what a low-rank branch adds, fused and unfused", 2),
    "fused": ("norms, activations and quantization in one kernel; convolutions", 3),
    "tune": ("other tiles of the products (only with --tune)", 6),
    "blocks": ("FLUX blocks, an eighth of FLUX and an SDXL UNet, end to end", 12),
}


class Layer(NamedTuple):
    """A linear layer of a network."""

    network: str
    columns: int
    depth: int

    @property
    def name(self) -> str:
        """Network and (N, K)."""
        return f"{self.network} {self.columns}x{self.depth}"


LAYERS = (
    Layer("FLUX", 3072, 3072),
    Layer("FLUX", 9216, 3072),
    Layer("FLUX", 12288, 3072),
    Layer("FLUX", 3072, 12288),
    Layer("FLUX", 21504, 3072),
    Layer("FLUX", 3072, 15360),
    Layer("SD3", 1536, 1536),
    Layer("SD3", 6144, 1536),
    Layer("SD3", 1536, 6144),
    Layer("PixArt", 1152, 1152),
    Layer("PixArt", 4608, 1152),
    Layer("PixArt", 1152, 4608),
    Layer("SDXL", 640, 640),
    Layer("SDXL", 5120, 640),
    Layer("SDXL", 640, 2560),
    Layer("SDXL", 1280, 1280),
    Layer("SDXL", 10240, 1280),
    Layer("SDXL", 1280, 5120),
)
ROWS = (4096, 1024, 4608)  # M, the one of the asked figures first
JUDGED = 4096
BRANCHED = (LAYERS[0], LAYERS[2], LAYERS[3], LAYERS[15])
RANKS = (16, 32, 64, 128)
CEILINGS = ((8192, 8192, 8192), (4096, 3072, 3072), (4096, 12288, 3072), (4096, 3072, 12288))
COPY_BYTES = 2 << 30


class Format(NamedTuple):
    """Numbers of a linear layer that a kernel of ours multiplies.

    Args:
        name: in the tables.
        weight, given: quantizers of the weight and of what comes in; empty: bfloat16.
        ceiling: whose measured rate the kernel is compared with.
        bits: of a weight, scales included, but for those of whole channels.
    """

    name: str
    weight: str
    given: str
    ceiling: str
    bits: float


FORMATS = (
    Format("int8", "int8/channel", "int8/token/dynamic", "int8", 8),
    Format("fp8", "e4m3/channel", "e4m3/token/dynamic", "fp8", 8),
    Format("w4a8", "int4/group64", "int8/group64/dynamic", "int8", 4 + 32 / 64),
    Format("w4a16", "int4/group64", "", "bf16", 4 + 32 / 64),
    Format("nvfp4", "e2m1/group16/scale-e4m3", "e4m3/token/dynamic", "bf16", 4 + 8 / 16),
)
BY_FORMAT = {format.name: format for format in FORMATS}
TOGETHER = ("int8", "fp8", "w4a8")  # timed with quantize_rows before it as well
BRANCH_FORMATS = ("int8", "fp8", "w4a8")


class Rowwise(NamedTuple):
    """One operation over rows: a norm, an activation, or quantization alone.

    Args:
        kind: "layer" or "rms" (row_norm), a kind of `gated`, or "" (quantize_rows).
        rows, columns: of the result.
        quantizer: empty where the result stays in bfloat16.
        modulated: whether a scale and a shift of each image follow the norm.
    """

    name: str
    kind: str
    rows: int
    columns: int
    quantizer: str
    modulated: bool = False


TOKEN, FP8, GROUP = "int8/token/dynamic", "e4m3/token/dynamic", "int8/group64/dynamic"
ROWWISE = (
    Rowwise("quantize to int8, FLUX", "", 4608, 3072, TOKEN),
    Rowwise("quantize to fp8, FLUX", "", 4608, 3072, FP8),
    Rowwise("quantize to int8 in groups, FLUX", "", 4608, 3072, GROUP),
    Rowwise("layer norm, modulate, int8, FLUX", "layer", 4608, 3072, TOKEN, True),
    Rowwise("layer norm, modulate, fp8, FLUX", "layer", 4608, 3072, FP8, True),
    Rowwise("layer norm, int8, SDXL", "layer", 8192, 640, TOKEN),
    Rowwise("RMS norm of heads, FLUX", "rms", 4608 * 24, 128, ""),
    Rowwise("GELU, int8, FLUX", "gelu_tanh", 4096, 12288, TOKEN),
    Rowwise("GEGLU, int8, SDXL", "geglu", 8192, 2560, TOKEN),
    Rowwise("GEGLU, int8, SDXL 1280", "geglu", 2048, 5120, TOKEN),
)


class Turn(NamedTuple):
    """A rotary embedding of (1, tokens, heads, head), pairs interleaved."""

    name: str
    tokens: int
    heads: int
    head: int


TURNS = (Turn("rotary, FLUX", 4608, 24, 128),)


class Image(NamedTuple):
    """A group norm with SiLU of images (batch, channels, side, side); int8 codes or not."""

    name: str
    batch: int
    channels: int
    side: int
    codes: bool


IMAGES = (
    Image("group norm, SiLU, SDXL", 2, 320, 128, False),
    Image("group norm, SiLU, int8, SDXL", 2, 320, 128, True),
    Image("group norm, SiLU, int8, SDXL 1280", 2, 1280, 32, True),
)


class Conv(NamedTuple):
    """A convolution, its padding half of its window."""

    network: str
    batch: int
    inner: int
    outer: int
    side: int
    window: int
    stride: int = 1

    @property
    def name(self) -> str:
        """Network, channels, window and side."""
        step = f" by {self.stride}" if self.stride > 1 else ""
        return (f"{self.network} {self.inner}->{self.outer} {self.window}x{self.window}{step} "
                f"of {self.side}x{self.side}")  # fmt: skip


CONVS = (
    Conv("SDXL", 2, 320, 320, 128, 3),
    Conv("SDXL", 2, 640, 640, 64, 3),
    Conv("SDXL", 2, 1280, 1280, 32, 3),
    Conv("SDXL", 2, 2560, 1280, 32, 1),
    Conv("SDXL", 2, 320, 320, 128, 3, 2),
    Conv("SD1.5", 2, 320, 320, 64, 3),
    Conv("SD1.5", 2, 640, 640, 32, 3),
    Conv("SD1.5", 2, 1280, 1280, 16, 3),
)

TRIED = tuple(  # tiles of --tune: rows, columns, depth, warps, stages
    (rows, columns, depth, warps, stages)
    for (rows, columns), depth, stages in product(
        ((256, 128), (128, 256), (128, 128), (64, 256), (64, 128), (128, 64)), (64, 128), (3, 4)
    )
    for warps in ((8,) if rows * columns > 1 << 14 else (4, 8))
)
TUNED = tuple(layer for layer in LAYERS if layer.network == "FLUX")


class Bar(NamedTuple):
    """A figure that was asked for."""

    name: str
    asked: str
    least: float


BARS = {
    "fp8": Bar("fp8 linear, share of the fp8 ceiling (FLUX, M=4096)", "at least 70 %", 0.70),
    "int8": Bar("int8 linear over cuBLAS bf16 (FLUX, M=4096)", "at least 1.5×", 1.5),
    "branch": Bar("rank-32 branch, fused: what it adds", "at most 5 %", -0.05),
    "w4a8": Bar("w4a8 linear, time over int8 (FLUX, M=4096)", "at most 1.15×", -1.15),
    "bytes": Bar("w4a8 weights, bytes over int8", "about half", -0.6),
    "block": Bar("FLUX block over torch.compile bf16", "at least 1.5×", 1.5),
}
