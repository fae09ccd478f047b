"""Triton kernels for matrices of 8-bit codes: the transposed copy, and the int8 product with its scales.

torch's int8 product writes int32, which another kernel would read again to scale: four times the bytes of the result.
Imported only where there is a GPU, because Triton exists only there.
"""
# Triton has no annotations, and is not installed on machines without a GPU.
# pyright: basic, reportMissingImports=false, reportIndexIssue=false

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_EDGE = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """Sizes of the product's tiles, and how they are computed."""

    rows: int
    columns: int
    inner: int
    stages: int
    warps: int


# By compute capability from the newest down. Measured on an H200 (9.0); the others follow from their shared memory.
TILES = {
    (9, 0): Tiles(rows=128, columns=128, inner=128, stages=3, warps=8),
    (8, 0): Tiles(rows=128, columns=128, inner=64, stages=4, warps=4),
}


def transposed(codes: Tensor) -> Tensor:
    """(rows, columns) -> a contiguous (columns, rows)."""
    rows, columns = codes.shape
    target = torch.empty(columns, rows, dtype=codes.dtype, device=codes.device)
    grid = (triton.cdiv(rows, _EDGE), triton.cdiv(columns, _EDGE))
    _transpose[grid](codes.view(torch.int8), target.view(torch.int8), rows, columns, EDGE=_EDGE, num_warps=8)
    return target


def multiplied(
    a: Tensor, rows: Tensor, b: Tensor, columns: Tensor, dtype: torch.dtype, *, tiles: Tiles | None = None
) -> Tensor:  # fmt: skip
    """int8 a (M, K) and b (N, K) -> (a b^T) * rows (M, 1) * columns (1, N), (M, N) in `dtype`. tiles: for measuring."""
    (m, k), n = a.shape, b.shape[0]
    t = tiles or _tiles(a.device.index or 0)
    out = torch.empty(m, n, dtype=dtype, device=a.device)
    grid = (triton.cdiv(m, t.rows) * triton.cdiv(n, t.columns),)
    _multiply[grid](
        (a, rows), (b, columns), out, (m, n, k), TILES=(t.rows, t.columns, t.inner), num_stages=t.stages,
        num_warps=t.warps,
    )  # fmt: skip
    return out


@functools.cache
def _tiles(device: int) -> Tiles:
    own = torch.cuda.get_device_capability(device)
    # Consumer cards of capability 12 have the shared memory of 8.x.
    return TILES[9, 0] if own[0] in (9, 10) else TILES[8, 0]


@triton.jit
def _transpose(source, target, rows, columns, EDGE: tl.constexpr):  # noqa: N803
    row = tl.program_id(0) * EDGE + tl.arange(0, EDGE)
    column = tl.program_id(1) * EDGE + tl.arange(0, EDGE)
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    tile = tl.load(source + row[:, None] * columns + column[None, :], mask=inside)
    inside = (column[:, None] < columns) & (row[None, :] < rows)
    tl.store(target + column[:, None] * rows + row[None, :], tl.trans(tile), mask=inside)


@triton.jit
def _multiply(left, right, out, sizes, TILES: tl.constexpr):  # noqa: N803
    """left, right: codes and their scales. sizes: rows, columns, inner. Triton's kernels have no keyword-only
    parameters, so what belongs together is a tuple."""
    a, rows = left
    b, columns = right
    m, n, k = sizes
    ROWS: tl.constexpr = TILES[0]
    COLUMNS: tl.constexpr = TILES[1]
    INNER: tl.constexpr = TILES[2]
    # Programs of one group share tiles of b in the second-level cache.
    GROUP: tl.constexpr = 8
    program = tl.program_id(0)
    across = tl.cdiv(n, COLUMNS)
    group = program // (GROUP * across)
    height = min(tl.cdiv(m, ROWS) - group * GROUP, GROUP)
    row = (group * GROUP + (program % (GROUP * across)) % height) * ROWS + tl.arange(0, ROWS)
    column = ((program % (GROUP * across)) // height) * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, INNER)
    # Rows beyond the edge read valid memory from the start; their results are not stored.
    upper = a + (row % m).to(tl.int64)[:, None] * k + inner[None, :]
    lower = b + (column % n)[None, :] * k + inner[:, None]
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.int32)
    for start in range(0, tl.cdiv(k, INNER)):
        inside = inner < k - start * INNER
        total = tl.dot(
            tl.load(upper, mask=inside[None, :], other=0), tl.load(lower, mask=inside[:, None], other=0), total,
            out_dtype=tl.int32,
        )  # fmt: skip
        upper += INNER
        lower += INNER
    scale = tl.load(rows + row, mask=row < m)[:, None] * tl.load(columns + column, mask=column < n)[None, :]
    result = (total.to(tl.float32) * scale).to(out.dtype.element_ty)
    position = row.to(tl.int64)[:, None] * n + column[None, :]
    tl.store(out + position, result, mask=(row[:, None] < m) & (column[None, :] < n))
