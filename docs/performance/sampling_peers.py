"""Times guided sampling steps beside the reference implementation and diffusers: sampling_peers.py OUT.json [tiny]

Work B with random weights of the real sizes, as in sampling.py, whose cases it borrows. ltx_core has to be
importable; nothing else of this project needs it. The models of a group take turns, and each group has
ltx-train's bf16 model, so that ratios are of one process. `tiny` tries the script on a CPU.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from sampling import CASES, GUIDED, composed, inputs
from torch import Tensor, nn

from ltx_train.assembly import model_builder
from ltx_train.assembly.setup import forward_only
from ltx_train.diffusion import sigma
from ltx_train.model.presets import preset_config
from ltx_train.sampling import sampler
from ltx_train.sampling.guidance import Guidance
from ltx_train.sampling.sampler import SamplerInputs

GIB = 2**30
ROUNDS = 4
# What the reference checks and ltx-train's presets leave out.
_CHECKED = {
    "dropout": 0.0, "attention_bias": True, "num_vector_embeds": None, "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000, "use_linear_projection": False, "only_cross_attention": False,
    "cross_attention_norm": True, "double_self_attention": False, "upcast_attention": False,
    "standardization_norm": "rms_norm", "norm_elementwise_affine": False, "qk_norm": "rms_norm",
    "positional_embedding_type": "rope", "use_audio_video_cross_attention": True, "share_ff": False,
    "av_cross_ada_norm": True, "use_middle_indices_grid": True,
}  # fmt: skip
Step = Callable[[bool], object]  # one step of a sampling loop; whether with classifier-free guidance


def ours(case: str, start: SamplerInputs, tiny: bool) -> Step:
    transformer = model_builder.open_frozen(forward_only(composed(tiny, *CASES[case]))).eval()
    levels = sigma.inference_schedule(30)[:2]
    return lambda guided: sampler.sample(transformer, start, levels, GUIDED if guided else Guidance())


def reference(start: SamplerInputs, compiled: bool, model: Any) -> Step:
    """The passes of a step with the reference's model and guider; its pipeline runs the arms one after the other."""
    from ltx_core.components.guiders import MultiModalGuider, MultiModalGuiderParams
    from ltx_core.model.transformer.modality import Modality
    from ltx_core.model.transformer.model import X0Model

    assert start.video is not None
    assert start.audio is not None
    sides = {"video": start.video, "audio": start.audio}
    away = {"video": start.negative_video, "audio": start.negative_audio}

    def modality(name: str, context: Tensor) -> Modality:
        side = sides[name]
        level = torch.ones(1, device=side.latent.device)
        return Modality(
            latent=side.latent.to(torch.bfloat16), sigma=level, timesteps=torch.ones_like(side.timesteps)[..., None],
            positions=side.positions, context=context.to(torch.bfloat16),
        )  # fmt: skip

    def step(guided: bool) -> object:
        switch(model.transformer_blocks, compiled)
        denoise = X0Model(model)
        positive = denoise(*(modality(name, side.context) for name, side in sides.items()), None)
        if not guided:
            return positive
        negative = denoise(*(modality(name, context) for name, context in away.items()), None)
        guider = MultiModalGuider(MultiModalGuiderParams(cfg_scale=4.0))
        return [guider.calculate(one, other, 0.0, 0.0) for one, other in zip(positive, negative, strict=True)]

    return step


def reference_model(preset: str, device: torch.device) -> nn.Module:
    from ltx_core.model.transformer.model_configurator import LTXModelConfigurator

    found = preset_config(preset)
    with torch.device("meta"):
        made = LTXModelConfigurator.from_config({**found, "transformer": {**_CHECKED, **found["transformer"]}})
    return initialized(made, device)


def diffusers_model(preset: str, device: torch.device) -> nn.Module:
    from diffusers import LTX2VideoTransformer3DModel

    t = preset_config(preset)["transformer"]
    same = (
        "in_channels", "out_channels", "num_layers", "num_attention_heads", "attention_head_dim", "cross_attention_dim",
        "audio_in_channels", "audio_out_channels", "audio_num_attention_heads", "audio_attention_head_dim",
        "audio_cross_attention_dim", "caption_channels",
    )  # fmt: skip
    with torch.device("meta"):
        made = LTX2VideoTransformer3DModel(
            **{name: t[name] for name in same}, gated_attn=True, cross_attn_mod=True, audio_gated_attn=True,
            audio_cross_attn_mod=True, rope_type="split", use_prompt_embeddings=False,
            cross_attn_timestep_scale_multiplier=t["av_ca_timestep_scale_multiplier"],
        )  # fmt: skip
    return initialized(made, device)


def diffusers_step(start: SamplerInputs, model: Any, compiled: bool) -> Step:
    """The passes of a step: its pipeline evaluates both arms as one batch."""
    video, audio = start.video, start.audio
    assert video is not None
    assert audio is not None

    def step(guided: bool) -> object:
        def both(one: Tensor, other: Tensor) -> Tensor:
            return torch.cat([other, one]) if guided else one

        switch(model.transformer_blocks, compiled)
        video_latent, audio_latent = (side.latent.to(torch.bfloat16) for side in (video, audio))
        level = torch.full((2 if guided else 1,), 1000.0, device=video_latent.device)
        return model(
            hidden_states=both(video_latent, video_latent), audio_hidden_states=both(audio_latent, audio_latent),
            encoder_hidden_states=both(video.context, start.negative_video).to(torch.bfloat16),
            audio_encoder_hidden_states=both(audio.context, start.negative_audio).to(torch.bfloat16),
            timestep=level, audio_timestep=level, sigma=level, audio_sigma=level,
            video_coords=both(video.positions, video.positions), audio_coords=both(audio.positions, audio.positions),
            use_cross_timestep=True, return_dict=False,
        )  # fmt: skip

    return step


def initialized(model: nn.Module, device: torch.device) -> nn.Module:
    """With small random weights in bf16 on the device."""
    model = model.to(torch.bfloat16).to_empty(device=device)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            torch.nn.init.normal_(tensor, std=0.02)
    return model.eval().requires_grad_(False)


def switch(blocks: Any, compiled: bool) -> None:
    """Compiles every block, or calls it eagerly. `nn.Module.compile` keeps its call in `_compiled_call_impl`."""
    for block in blocks:
        if compiled and not hasattr(block, "compiled_call"):
            block.compile()
            block.compiled_call = block._compiled_call_impl
        if hasattr(block, "compiled_call"):
            block._compiled_call_impl = block.compiled_call if compiled else None


def timed(steps: Mapping[str, Step]) -> list[dict[str, object]]:
    times: dict[tuple[str, bool], list[float]] = {}
    peaks: dict[tuple[str, bool], float] = {}
    for number in range(ROUNDS + 1):  # the first compiles
        for name, step in steps.items():
            for guided in (False, True):
                if torch.cuda.is_available():
                    torch.cuda.reset_peak_memory_stats()
                    held = torch.cuda.memory_allocated()
                begun = time.perf_counter()
                with torch.no_grad():
                    step(guided)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                    peaks[name, guided] = (torch.cuda.max_memory_allocated() - held) / GIB
                if number:
                    times.setdefault((name, guided), []).append(time.perf_counter() - begun)
    return [
        {"case": name, "rounds": ROUNDS, "positive_s": round(statistics.median(times[name, False]), 4),
         "cfg_s": round(statistics.median(times[name, True]), 4),
         "beside_the_weights_gib": [round(peaks.get((name, guided), 0.0), 2) for guided in (False, True)]}
        for name in steps
    ]  # fmt: skip


def released() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main(out: Path, tiny: bool) -> None:
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    preset = "tiny" if tiny else "ltx2_3_22b"
    start = inputs(composed(tiny), device)
    theirs = reference_model(preset, device)
    records = timed({
        "bf16": ours("bf16", start, tiny), "fp8": ours("fp8", start, tiny),
        "reference, eager": reference(start, compiled=False, model=theirs),
        "reference, compiled": reference(start, compiled=True, model=theirs),
    })  # fmt: skip
    out.write_text(json.dumps(records, indent=1) + "\n")
    del theirs
    torch._dynamo.reset()
    released()
    model = diffusers_model(preset, device)
    records += timed({
        "bf16, beside diffusers": ours("bf16", start, tiny),
        "diffusers, eager": diffusers_step(start, model, compiled=False),
        "diffusers, compiled": diffusers_step(start, model, compiled=True),
    })  # fmt: skip
    out.write_text(json.dumps(records, indent=1) + "\n")
    print(out.read_text(), end="")


if __name__ == "__main__":
    main(Path(sys.argv[1]), "tiny" in sys.argv[2:])
