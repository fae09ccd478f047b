"""Times 8-bit products, their codes and the transposed copy at the sizes of works A and B: byte_products.py OUT.json

Every shape has bf16 beside it in the same minute. `sweep` tries sizes of the int8 kernel's tiles, too.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from ltx_train.model import byte_kernels, byte_products
from ltx_train.model.byte_kernels import Tiles

# tokens, inputs, outputs
SHAPES = ((4096, 4096, 4096), (4096, 4096, 16384), (4096, 16384, 4096), (17600, 4096, 4096), (17600, 4096, 16384))
ROUNDS = 20


def milliseconds(call: Callable[[], object]) -> float:
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begun.record()
    for _ in range(ROUNDS):
        call()
    ended.record()
    torch.cuda.synchronize()
    return round(begun.elapsed_time(ended) / ROUNDS, 4)


def codes(shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return byte_products.row_codes(torch.randn(shape, device="cuda"), dtype)


def of_shape(tokens: int, inputs: int, outputs: int) -> dict[str, object]:
    x, weight = (torch.randn(n, inputs, device="cuda", dtype=torch.bfloat16) for n in (tokens, outputs))
    times = {"bf16": milliseconds(lambda: x @ weight.t())}
    for name, dtype in (("fp8", byte_products.FLOAT8), ("int8", torch.int8)):
        a, rows = codes((tokens, inputs), dtype)
        b, scale = codes((outputs, inputs), dtype)
        columns = scale.t().contiguous()
        times[name] = milliseconds(lambda: byte_products._multiplied(a, rows, b, columns, torch.bfloat16))  # noqa: B023
        times[f"{name}_transposed_copy"] = milliseconds(lambda: byte_products.transposed(b))  # noqa: B023
        times[f"{name}_transposed_copy_by_torch"] = milliseconds(lambda: b.t().contiguous())  # noqa: B023
        made = torch.compile(byte_products.row_codes)
        times[f"{name}_codes"] = milliseconds(lambda: made(x, dtype))  # noqa: B023
        if name == "int8":
            times["torch._int_mm"] = milliseconds(lambda: torch._int_mm(a, b.t()))  # noqa: B023
            exact = (a.double() @ b.double().t()) * rows * columns if tokens * outputs < 2**25 else None
            if exact is not None:
                ours = byte_products._multiplied(a, rows, b, columns, torch.bfloat16).double()
                times["int8_error"] = float(((ours - exact).norm() / exact.norm()).item())
    return {"tokens": tokens, "inputs": inputs, "outputs": outputs, **times}


def swept(tokens: int, inputs: int, outputs: int) -> list[dict[str, object]]:
    a, rows = codes((tokens, inputs), torch.int8)
    b, scale = codes((outputs, inputs), torch.int8)
    found: list[dict[str, object]] = []
    sizes = ((128, 256), (128, 128), (256, 128), (64, 256))
    for (height, width), inner, (stages, warps) in product(sizes, (64, 128), ((3, 8), (4, 8), (4, 4))):
        tiles = Tiles(rows=height, columns=width, inner=inner, stages=stages, warps=warps)
        try:
            took = milliseconds(lambda: byte_kernels.multiplied(a, rows, b, scale.t(), torch.bfloat16, tiles=tiles))  # noqa: B023
        except Exception as error:  # tiles that do not fit into the shared memory
            took = None
            print(tiles, type(error).__name__, file=sys.stderr)
        found.append({"shape": (tokens, inputs, outputs), "tiles": str(tiles), "ms": took})
    return sorted(found, key=lambda r: (r["ms"] is None, r["ms"]))


def main(out: Path, sweep: bool) -> None:
    records: dict[str, object] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    records["shapes"] = [of_shape(*shape) for shape in SHAPES]
    out.write_text(json.dumps(records, indent=1) + "\n")
    if sweep:
        records["tiles"] = [*swept(*SHAPES[1])[:8], *swept(*SHAPES[3])[:8]]
    out.write_text(json.dumps(records, indent=1) + "\n")
    print(out.read_text(), end="")


if __name__ == "__main__":
    main(Path(sys.argv[1]), "sweep" in sys.argv[2:])
