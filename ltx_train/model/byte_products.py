"""Products of matrices of 8-bit codes, with a scale per row of either side.

Owns the operators, the codes of activations and the measure of their error. Each operator is one node of a compiled
graph, so that a checkpoint recomputes it like any other, and the codes are computed by the compiler, once for all
layers with the same input.

The hardware multiplies 8-bit matrices only along contiguous rows. The output needs the weight as it is stored, (out,
in); the input gradient needs it as (in, out), and makes that copy for the time of one product: a second stored layout
would double the weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
_LARGEST = {FLOAT8: 448.0, torch.int8: 127.0}
# Tokens of which the error of a product is measured.
_MEASURED = 512
# The hardware's tile: both sizes of a weight are multiples of it.
TILE = 16


def row_codes(x: Tensor, dtype: torch.dtype, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """8-bit codes (rows, n) in `dtype`, float8 or int8, and float32 scales (rows, 1) of a matrix. The largest magnitude
    of each row is mapped to the largest code. A row of zeros has codes of zero.

    columns: positive float32 factors (1, n) that x is multiplied with first.
    """
    # The compiler stores a value that is read twice. It stores x in its own dtype and not in float32, twice as large,
    # because nothing here converts x: the operators below promote it.
    magnitudes, values = (x.abs(), x) if columns is None else (x.abs() * columns, x * columns)
    scale = (magnitudes.amax(dim=1, keepdim=True).float() / _LARGEST[dtype]).clamp_min(1e-12)
    codes = values / scale
    return (codes.round() if dtype == torch.int8 else codes).to(dtype), scale


def rotated(x: Tensor, group: int) -> Tensor:
    """x (..., n) times a Hadamard matrix of +-1 in groups of `group` numbers, a power of two up to 256; twice gives
    group * x.

    Spreads an outlier over its group (ConvRot, arXiv:2512.03673). The entries are exact in bfloat16. A product whose
    sides are both rotated is `group` times too large; dividing by it is exact, too. The matrix is made where it is
    used, so that no layer holds one: entry (i, j) is -1 where i and j have an odd number of common bits.
    """
    index = torch.arange(group, device=x.device)
    common = index[:, None] & index[None, :]
    for shift in (4, 2, 1):
        common = common ^ (common >> shift)
    signs = (1 - 2 * (common & 1)).to(x.dtype)
    return (x.unflatten(-1, (-1, group)) @ signs).flatten(-2)


def product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x (..., in) and codes weight (out, in) with float32 scale (out, 1) -> x W^T (..., out) in the dtype of x."""
    rows = x.flatten(0, -2)
    codes, scales = row_codes(rows.detach(), weight.dtype)
    output: Tensor = _product(rows, codes, scales, weight, scale)
    return output.view(*x.shape[:-1], -1)


@torch.library.custom_op("ltx_train::byte_product", mutates_args=())
def _product(x: Tensor, codes: Tensor, rows: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x is not read: the operator's gradient flows to it instead of to its codes."""
    return _multiplied(codes, rows, weight, scale.t(), x.dtype)


@torch.library.custom_op("ltx_train::byte_input_gradient", mutates_args=())
def _input_gradient(codes: Tensor, rows: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient's codes (M, out) with scales (M, 1) and the weight's codes (out, in) -> (M, in)."""
    ones = torch.ones(1, weight.shape[1], device=weight.device)
    return _multiplied(codes, rows, transposed(weight), ones, dtype)


@_product.register_fake
def _(x: Tensor, codes: Tensor, rows: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    del codes, rows, scale
    return x.new_empty(x.shape[0], weight.shape[0])


@_input_gradient.register_fake
def _(codes: Tensor, rows: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    del rows
    return codes.new_empty(codes.shape[0], weight.shape[1], dtype=dtype)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    weight, scale = ctx.saved_tensors
    # This product sums over the axis of the weight's scales, so the gradient is scaled before its codes are made.
    codes, rows = row_codes(gradient, weight.dtype, columns=scale.t())
    return _input_gradient(codes, rows, weight, gradient.dtype), None, None, None, None


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    del output
    ctx.save_for_backward(inputs[3], inputs[4])


_product.register_autograd(_backward, setup_context=_save)


def dense_product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """As `product`, but x is multiplied as it is, with the weight dequantized to its dtype for that time."""
    output: Tensor = _dense_product(x.flatten(0, -2), weight, scale)
    return output.view(*x.shape[:-1], -1)


# Operators, so that a block that keeps everything keeps no dequantized weight.
@torch.library.custom_op("ltx_train::dense_product", mutates_args=())
def _dense_product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return x @ dense(weight, scale, x.dtype).t()


@torch.library.custom_op("ltx_train::dense_input_gradient", mutates_args=())
def _dense_input_gradient(gradient: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return gradient @ dense(weight, scale, gradient.dtype)


@_dense_product.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    del scale
    return x.new_empty(x.shape[0], weight.shape[0])


@_dense_input_gradient.register_fake
def _(gradient: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    del scale
    return gradient.new_empty(gradient.shape[0], weight.shape[1])


def _dense_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    return _dense_input_gradient(gradient, *ctx.saved_tensors), None, None


def _save_weight(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    del output
    ctx.save_for_backward(*inputs[1:])


_dense_product.register_autograd(_dense_backward, setup_context=_save_weight)


def dense(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes (out, in) with scale (out, 1), dequantized."""
    return weight.to(dtype) * scale.to(dtype)


@torch.no_grad()
def error(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """How far `product` is from `dense_product`: the root of the mean squared distance as a share of the outputs'
    standard deviation over the tokens, a float32 scalar. Of at most 512 tokens, evenly spaced.

    A part of the outputs that all tokens have in common counts nothing: it would hide a lost difference of tokens.
    """
    rows = x.flatten(0, -2)
    rows = rows[:: -(-len(rows) // _MEASURED)]
    exact = dense_product(rows, weight, scale).float()
    spread = (exact - exact.mean(dim=0)).square().mean()
    # Equal tokens have no spread: their error is measured against a thousandth of the outputs themselves.
    least = (1e-6 * exact.square().mean()).clamp_min(1e-30)
    return ((product(rows, weight, scale).float() - exact).square().mean() / spread.clamp_min(least)).sqrt()


def transposed(codes: Tensor) -> Tensor:
    """(rows, columns) -> a contiguous (columns, rows). torch's own copy of 8-bit elements reaches a tenth of a GPU's
    memory bandwidth."""
    if not codes.is_cuda:
        return codes.t().contiguous()
    from ltx_train.model import byte_kernels

    return byte_kernels.transposed(codes)


def _multiplied(a: Tensor, rows: Tensor, b: Tensor, columns: Tensor, dtype: torch.dtype) -> Tensor:
    """a (M, K) and b (N, K) of codes -> (a b^T) * rows (M, 1) * columns (1, N), (M, N) in `dtype`."""
    a = a.contiguous()  # gradients of attention may come column by column, and their codes keep the layout
    if a.dtype == FLOAT8:
        # The kernel with a scale per row can only write bfloat16.
        return torch._scaled_mm(
            a, b.t(), scale_a=rows, scale_b=columns.contiguous(), out_dtype=torch.bfloat16, use_fast_accum=a.is_cuda
        ).to(dtype)
    if not a.is_cuda:
        return (torch._int_mm(a, b.t()) * rows * columns).to(dtype)
    from ltx_train.model import byte_kernels

    return byte_kernels.multiplied(a, rows, b, columns, dtype)
