"""Times training steps of peers on work A: training_peers.py OUT.json [tiny] [case ...]

The reference implementation and diffusers' model, both with every block checkpointed and compiled, and diffusers'
model with torchao's float8 products. The step around them is ltx-train's, and so are the sizes, inputs and LoRA
layers. ltx_core and torchao have to be importable; nothing else of this project needs them. `tiny` tries the script on
a CPU.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from sampling_peers import reference_model
from torch import Tensor, nn

from ltx_train import config as configuration
from ltx_train.assembly import baseline, resolve, run_builder, timing, update_builder
from ltx_train.assembly.setup import Setup, setup
from ltx_train.contracts import Modality
from ltx_train.diffusion import objective

BASE = ("model.weights=random", "adapter=cross_modal", "adapter.dropout=0", "optim=adamw", "memory=recompute",
        "bench.warmup=3", "bench.steps=6")  # fmt: skip
Model = Callable[[Setup], tuple[nn.Module, Callable[..., Any]]]


def reference(plain: Setup) -> tuple[nn.Module, Callable[..., Any]]:
    model = reference_model(plain.config.model.preset, plain.device)
    # The reference's names of the layers that ltx-train's targets name.
    lora = LoraConfig(
        r=plain.config.adapter.rank, lora_alpha=int(plain.config.adapter.alpha),
        target_modules=r"transformer_blocks\..*\.(audio_attn\d|audio_to_video_attn|video_to_audio_attn)"
        r"\.(to_q|to_k|to_v|to_out\.0)|transformer_blocks\..*\.audio_ff\.net\.(0\.proj|2)",
    )  # fmt: skip
    inject_adapter_in_model(lora, model)
    _train_the_adapter(model)
    model.set_gradient_checkpointing(True)
    torch._dynamo.config.recompile_limit = 64  # its functions are shared by modules of different widths
    for block in model.transformer_blocks:
        # torch.compile specializes on this integer, so equal values share one graph. Only perturbations read it.
        block.idx = 0

    def predict(video: Modality, audio: Modality) -> tuple[Tensor, Tensor]:
        from ltx_core.model.transformer.modality import Modality as Theirs

        def theirs(ours: Modality) -> Theirs:
            return Theirs(
                latent=ours.latent.to(torch.bfloat16), sigma=ours.sigma, positions=ours.positions,
                timesteps=ours.timesteps.to(plain.device)[..., None], context=ours.context.to(torch.bfloat16),
            )  # fmt: skip

        return model(theirs(video), theirs(audio), None)

    return model.train(), predict


def diffusers(plain: Setup) -> tuple[nn.Module, Callable[..., Any]]:
    model = baseline._model(plain)
    return model, partial(baseline._predict, model, plain.device)


def torchao(plain: Setup) -> tuple[nn.Module, Callable[..., Any]]:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    def large(layer: nn.Module, name: str) -> bool:
        # torchao multiplies over the tokens in backward, also for frozen weights; 16 does not divide 209 audio tokens.
        left_out = "lora_" in name or "audio" in name
        return not left_out and layer.in_features % 16 == 0 and layer.out_features >= 1024

    model, predict = diffusers(plain)
    recipe = Float8LinearConfig.from_recipe_name("rowwise")
    convert_to_float8_training(model.transformer_blocks, config=recipe, module_filter_fn=large)
    return model, predict


CASES: dict[str, Model] = {
    "reference, compiled": reference, "diffusers, compiled": diffusers,
    "diffusers with torchao's float8, compiled": torchao,
}  # fmt: skip


def _train_the_adapter(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
        parameter.requires_grad_("lora_" in name)


def measured(name: str, tiny: bool) -> dict[str, Any]:
    sizes = ["experiment=audio_reference"] if tiny else ["experiment=voice_reference_22b"]
    plain = setup(resolve.without_graphs(configuration.compose_config([*sizes, *BASE])))
    model, predict = CASES[name](plain)
    for block in model.transformer_blocks:
        block.compile()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    updates = update_builder.whole_updates(plain, trained)
    recipe = run_builder.plain_recipe(plain, partial(objective.backward, predict), updates)
    record = timing.timed(plain, timing.random_steps(plain, recipe))
    kept = ("step_s_median", "step_s_min", "first_step_s", "peak_reserved_gib", "losses")
    return {"case": name, "trained": len(trained), **{k: record[k] for k in kept if k in record}}


def main(out: Path, *words: str) -> None:
    records: list[dict[str, Any]] = []
    for name in [word for word in words if word != "tiny"] or CASES:
        try:
            records.append(measured(name, "tiny" in words))
        except (RuntimeError, ImportError, TypeError, AssertionError) as error:  # one peer that fails hides no other
            records.append({"case": name, "failed": f"{type(error).__name__}: {error}"[:2000]})
        print(json.dumps(records[-1]), flush=True)
        out.write_text(json.dumps(records, indent=1) + "\n")
        torch._dynamo.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
