"""Selects the target tokens that a condition keeps clean: frames, lengths, rectangles and masks.

Pure functions of a token grid and of numbers drawn in `conditions`. Knows nothing of noise or of a model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ltx_train.contracts import Condition, ConditionKind
from ltx_train.diffusion.grid import PIXELS_PER_LATENT

Grid = tuple[int, ...]
_SMALLEST_SIDE = 0.25


def tokens(condition: Condition, grid: Grid, numbers: Tensor, mask: Tensor | None) -> Tensor:
    """(B, T) bool, True for the tokens that the condition keeps clean. grid: (F, H, W) or (T,).

    numbers: (B, 4) from U[0, 1) for the length or rectangle. mask: (B, *grid) from the data, for a mask condition.
    """
    match condition.kind:
        case ConditionKind.first_frame:
            return _frame(grid)[None].expand(len(numbers), -1) < 1
        case ConditionKind.prefix:
            return _frame(grid)[None] < lengths(condition, numbers)[:, None]
        case ConditionKind.suffix:
            return _frame(grid)[None] >= grid[0] - lengths(condition, numbers)[:, None]
        case ConditionKind.spatial_crop:
            return _inside(rectangles(condition, grid, numbers), grid)
        case ConditionKind.mask:
            if mask is None:
                raise ValueError(f"the mask condition needs the mask {condition.source!r}")
            if tuple(mask.shape[1:]) != grid:
                raise ValueError(
                    f"the mask {condition.source!r} has the shape {list(mask.shape[1:])}, the latent {list(grid)}"
                )
            return mask.flatten(1) > 0.5
        case ConditionKind.reference:
            raise ValueError("a reference condition selects no target tokens")


def lengths(condition: Condition, numbers: Tensor) -> Tensor:
    """(B,) int64: length of a prefix or suffix in latent steps, fixed [n] or drawn from [lowest, highest]."""
    lowest, highest = condition.latents[0], condition.latents[-1]
    return lowest + (numbers[:, 0] * (highest - lowest + 1)).long()


def rectangles(condition: Condition, grid: Grid, numbers: Tensor) -> Tensor:
    """(B, 4) int64 [top, left, bottom, right) in latents: the condition's region, or a rectangle per sample."""
    if condition.region:
        fixed = torch.tensor(condition.region) // PIXELS_PER_LATENT
        return fixed.expand(len(numbers), 4)
    sides = torch.tensor(grid[1:])
    spans = _SMALLEST_SIDE + (1 - 2 * _SMALLEST_SIDE) * numbers[:, :2]
    sizes = (spans * sides).ceil().long().clamp(min=1)
    sizes = torch.minimum(sizes, (sides - 1).clamp(min=1))
    starts = (numbers[:, 2:] * (sides - sizes + 1)).long()
    return torch.cat([starts, starts + sizes], dim=1)


def _frame(grid: Grid) -> Tensor:
    """(T,) int64: the latent step of every token."""
    per_step = 1 if len(grid) == 1 else grid[1] * grid[2]
    return torch.arange(grid[0]).repeat_interleave(per_step)


def _inside(boxes: Tensor, grid: Grid) -> Tensor:
    """(B, T) bool: tokens within (B, 4) rectangles, in every frame."""
    rows, columns = torch.arange(grid[1])[None, :, None], torch.arange(grid[2])[None, None, :]
    top, left, bottom, right = (edge[:, None, None] for edge in boxes.unbind(1))
    inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
    return inside[:, None].expand(-1, grid[0], -1, -1).flatten(1)
