"""Low-rank branches beside low-bit layers: two thin projections that stay in float.

    y  =  Q(W - U D) x  +  U (D x)          D (r, in), U (out, r), r far under both

Of a convolution, D is one with r output channels and U is 1 × 1 (SVDQuant, METHODS 1.12). The ops
are linear and convolution without bias, on a matrix that may be stored in fewer bits than x; they
are ops of their own so that no pass quantizes them, and so that back ends know a branch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from effuse.cost import FORMULAS, conv_flops, matmul_flops


def project_reference(x: Tensor, matrix: Tensor) -> Tensor:
    """x (…, in), matrix (out, in) -> (…, out)."""
    return F.linear(x, matrix.to(x.dtype))


def project_conv_reference(
    x: Tensor, matrix: Tensor, stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    """x (n, in, h, w) or (in, h, w), matrix (out, in, kh, kw) -> (n, out, h', w') or without n."""
    return F.conv2d(x, matrix.to(x.dtype), None, stride, padding, dilation)


@torch.library.custom_op("effuse::project", mutates_args=())
def project(x: Tensor, matrix: Tensor) -> Tensor:
    """`project_reference` as a graph op."""
    return project_reference(x, matrix)


@project.register_fake
def _(x: Tensor, matrix: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], matrix.shape[0]))


@torch.library.custom_op("effuse::project_conv", mutates_args=())
def project_conv(
    x: Tensor, matrix: Tensor, stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    """`project_conv_reference` as a graph op."""
    return project_conv_reference(x, matrix, stride, padding, dilation).contiguous()


@project_conv.register_fake
def _(
    x: Tensor, matrix: Tensor, stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    return project_conv_reference(x, matrix, stride, padding, dilation).contiguous()


FORMULAS[project._opoverload.overloadpacket] = matmul_flops
FORMULAS[project_conv._opoverload.overloadpacket] = conv_flops

BRANCH = (torch.ops.effuse.project.default, torch.ops.effuse.project_conv.default)
