"""`sample` in one stage and in two, whole commands under a memory budget: two_stages.py OUT.json FOLDER [tiny]

1280x704, 153 frames, with sound, random weights of the real sizes. The upsampler and the distilled LoRA are random,
too, with the tensors of the real files. The text encoder has Gemma 3 12B's layers and width, but is thin. `tiny` tries
the script on a CPU.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ltx_train.assembly import model_source
from ltx_train.config import compose_config
from ltx_train.model.loaders import build_transformer
from ltx_train.model.presets import PRESETS

RANK = 384
# A process of its own for each command: its peak is of this command alone.
_RUN = """
import sys, torch
from ltx_train.__main__ import main
out = sys.argv.pop(1)
try:
    main()
finally:
    gib = torch.cuda.max_memory_reserved() / 2**30 if torch.cuda.is_available() else 0.0
    open(out, "w").write(str(gib))
"""


def text_encoder(folder: Path, layers: int, width: int) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import Gemma3TextConfig, Gemma3TextModel, PreTrainedTokenizerFast

    words = ["<pad>", "<bos>", "<unk>", "a", "person", "speaks"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", unk_token="<unk>"
    ).save_pretrained(folder)
    made = Gemma3TextConfig(
        vocab_size=64, hidden_size=width, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=1,
        num_key_value_heads=1, head_dim=64, max_position_embeddings=2048,
    )  # fmt: skip
    Gemma3TextModel(made).to(torch.bfloat16).save_pretrained(folder)


def upsampler(path: Path, channels: int, tiny: bool) -> None:
    from diffusers.pipelines.ltx2.latent_upsampler import LTX2LatentUpsamplerModel

    sizes = {"mid_channels": 32, "num_blocks_per_stage": 2} if tiny else {}
    made = LTX2LatentUpsamplerModel(in_channels=channels, **sizes).to(torch.bfloat16)
    save_file({name: tensor.contiguous() for name, tensor in made.state_dict().items()}, path)


def distilled_lora(path: Path, model: Sequence[str], rank: int) -> None:
    """A LoRA for every linear layer of the blocks."""
    tensors: dict[str, Tensor] = {}
    for name, layer in build_transformer(model_source.weights(compose_config([*model]))).named_modules():
        if isinstance(layer, torch.nn.Linear) and "transformer_blocks." in name:
            tensors[f"diffusion_model.{name}.lora_A.weight"] = torch.randn(rank, layer.in_features).bfloat16() * 0.01
            tensors[f"diffusion_model.{name}.lora_B.weight"] = torch.randn(layer.out_features, rank).bfloat16() * 0.01
    save_file(tensors, path)


def measured(folder: Path, name: str, words: Sequence[str]) -> dict[str, object]:
    peak = folder / f"{name}.gib"
    begun = time.perf_counter()
    command = [sys.executable, "-c", _RUN, str(peak), "sample", *words, f"sample.out={folder}/{name}.mp4"]
    done = subprocess.run(command, check=False)
    record = {"what": "sample", "case": name, "rc": done.returncode, "wall_s": round(time.perf_counter() - begun, 1)}
    shown = " ".join(words[2:]).replace(str(folder), "FOLDER")
    return {**record, "reserved_gib": round(float(peak.read_text()), 2), "words": shown}


def main(out: Path, folder: Path, tiny: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    preset, bucket = ("tiny", "128x128x17") if tiny else ("ltx2_3_22b", "1280x704x153")
    sizes = PRESETS[preset]
    files = {name: folder / f"{name}.safetensors" for name in ("upsampler", "distilled")}
    model = (f"model={preset}", "model.weights=random")
    upsampler(files["upsampler"], sizes.video_channels, tiny)
    distilled_lora(files["distilled"], model, 8 if tiny else RANK)
    text_encoder(folder / "gemma", sizes.text_states - 1, sizes.caption_channels)
    common = [
        *model, f"model.text_encoder={folder}/gemma", "mode=t2av", "sample.prompt=a person speaks",
        f"sample.bucket={bucket}", *(() if tiny else ("memory=int8", "memory.budget_gib=23")),
    ]  # fmt: skip
    twice = [f"sample.upsampler={files['upsampler']}", f"sample.distilled_lora={files['distilled']}"]
    cases = {"one_stage": common, "two_stages": [*common, *twice]}
    records = [measured(folder, name, words) for name, words in cases.items()]
    out.write_text(json.dumps(records, indent=1) + "\n")
    print(out.read_text(), end="")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), "tiny" in sys.argv[3:])
