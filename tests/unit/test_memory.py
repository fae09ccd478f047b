from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ltx_train.memory.blocks.keep import Keep
from ltx_train.memory.blocks.runner import BlockRunner
from ltx_train.model import load_transformer
from tests.conftest import TINY
from tests.golden.support import losses, modality, read

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def test_recomputation_changes_no_gradient() -> None:
    case = read("transformer_i_gradients")
    gradients: list[torch.Tensor] = []
    for keep in Keep:
        model = load_transformer(TINY).requires_grad_(True)
        model.run_block = BlockRunner([keep] * 3, compiled=False)
        video, audio = model(modality(case, "video"), modality(case, "audio"))
        assert video is not None
        assert audio is not None
        first, second = losses(case, video, audio)
        (first + second).mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert len(gradients) == 3
    assert all(torch.equal(gradients[0], other) for other in gradients[1:])


_MEASURE = """
import re, sys, threading, torch
from ltx_train.model import load_transformer
from ltx_train.memory.weights.quantize import block_quantizer
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
if sys.argv[2] != "none":
    load_transformer(sys.argv[3], quantize=block_quantizer(sys.argv[2]))  # imports and caches are not the model
before, peak, run = anonymous(), 0, True
def watch():
    global peak
    while run:
        peak = max(peak, anonymous())
thread = threading.Thread(target=watch); thread.start()
model = load_transformer(sys.argv[1], dtype=torch.bfloat16, quantize=block_quantizer(sys.argv[2]))
after, run = anonymous(), False
thread.join()
print(peak - before, after - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_host_memory_peaks_one_block_above_the_final_size(quantize: str, tmp_path: Path) -> None:
    """A checkpoint with blocks of 32 MiB (bfloat16): peak host memory while it streams in."""
    import json

    from ltx_train.model import loaders
    from ltx_train.model.checkpoint import RandomWeights

    class Wide(RandomWeights):
        @property
        def config(self):  # type: ignore[no-untyped-def]
            made = dict(super().config)
            sizes = {"attention_head_dim": 256, "cross_attention_dim": 1024, "num_layers": 8}
            made["transformer"] = {**made["transformer"], **sizes}
            return made

    source = Wide("tiny", 0)
    shapes = {k: v.shape for k, v in loaders.build_transformer(source).state_dict().items()}
    tensors = {loaders.transformer_original_name(k): torch.randn(s).bfloat16() for k, s in shapes.items()}
    save_file(tensors, tmp_path / "wide.safetensors", {"config": json.dumps(source.config)})
    total = sum(v.numel() * 2 for v in tensors.values())
    blocks = sum(v.numel() * 2 for k, v in tensors.items() if "transformer_blocks.0." in k)
    arguments = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        _MEASURE,
        str(tmp_path / "wide.safetensors"),
        quantize,
        str(TINY),
    ]
    out = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout.split()
    peak, final = int(out[0]), int(out[1])
    assert blocks > 30 * 2**20
    # Quantizing one layer takes a few float32 copies of it besides the block that is being filled.
    layer = 4 * max(v.numel() for v in tensors.values())
    assert peak - final < (blocks + 4 * layer if quantize == "int8" else 1.5 * blocks)
    assert final < (0.8 if quantize == "int8" else 1.2) * total
