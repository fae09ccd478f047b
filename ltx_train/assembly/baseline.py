"""The baseline of `bench.baseline=true`: diffusers' model, run eagerly, with every block checkpointed.

Per-token timesteps, peft's own LoRA layers, optimum-quanto's own int8 layers; random weights of the configured
sizes. It serves for comparison only.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch
from diffusers import LTX2VideoTransformer3DModel
from diffusers.utils import logging as diffusers_logging
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor

from ltx_train.assembly import from_config, model_source, resolve, run_builder, timing, update_builder
from ltx_train.assembly.setup import Setup, setup
from ltx_train.config import Config
from ltx_train.contracts import Modality
from ltx_train.diffusion import objective
from ltx_train.model.transformer import Section


def measure(config: Config) -> dict[str, Any]:
    """Measures step time and memory. Returns them under the names of a bench record."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    diffusers_logging.set_verbosity_error()
    plain = setup(resolve.without_graphs(config))
    model = _model(plain)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    updates = update_builder.whole_updates(plain, trained)
    backward = partial(objective.backward, partial(_predict, model, plain.device))
    return timing.timed(plain, timing.random_steps(plain, run_builder.plain_recipe(plain, backward, updates)))


def _model(plain: Setup) -> Any:
    config = plain.config
    with torch.device("meta"):
        model: Any = LTX2VideoTransformer3DModel(**_arguments(model_source.layout(config).config["transformer"]))
    model = model.to(from_config.dtype(config)).to_empty(device=plain.device)
    generator = torch.Generator(plain.device).manual_seed(config.model.seed)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.fill_(1.0) if "norm" in name else parameter.normal_(0, 0.02, generator=generator)
    model.requires_grad_(False)
    _quantize(model, plain.memory.quantize)
    targets = "|".join(t.replace(".", r"\.") for t in config.adapter.targets)
    lora = LoraConfig(
        r=config.adapter.rank, lora_alpha=int(config.adapter.alpha), lora_dropout=config.adapter.dropout,
        target_modules=rf"transformer_blocks\..*\.({targets})",
    )  # fmt: skip
    inject_adapter_in_model(lora, model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    model.enable_gradient_checkpointing()
    return model.train()


def _quantize(model: Any, kind: str) -> None:
    if kind == "none":
        return
    from optimum import quanto

    quanto.quantize(model.transformer_blocks, weights=getattr(quanto, f"q{kind}"), exclude="*to_gate_logits*")
    quanto.freeze(model.transformer_blocks)


def _arguments(config: Section) -> dict[str, Any]:
    return {
        "in_channels": config["in_channels"], "out_channels": config["out_channels"],
        "num_attention_heads": config["num_attention_heads"], "attention_head_dim": config["attention_head_dim"],
        "cross_attention_dim": config["cross_attention_dim"], "gated_attn": True, "cross_attn_mod": True,
        "audio_in_channels": config["audio_in_channels"], "audio_out_channels": config["audio_out_channels"],
        "audio_num_attention_heads": config["audio_num_attention_heads"],
        "audio_attention_head_dim": config["audio_attention_head_dim"],
        "audio_cross_attention_dim": config["audio_cross_attention_dim"], "audio_gated_attn": True,
        "audio_cross_attn_mod": True, "num_layers": config["num_layers"], "rope_type": "split",
        "use_prompt_embeddings": False,
    }  # fmt: skip


def _predict(
    model: Any, device: torch.device, video: Modality | None, audio: Modality | None
) -> tuple[Tensor | None, Tensor | None]:
    assert video is not None, "bench.baseline needs both modalities"
    assert audio is not None, "bench.baseline needs both modalities"
    return _forward(model, video, audio, device)


def _forward(model: Any, video: Modality, audio: Modality, device: torch.device) -> tuple[Tensor, Tensor]:
    dtype = model.dtype if model.dtype.is_floating_point else torch.bfloat16
    return model(
        hidden_states=video.latent.to(dtype), audio_hidden_states=audio.latent.to(dtype),
        encoder_hidden_states=video.context.to(dtype), audio_encoder_hidden_states=audio.context.to(dtype),
        timestep=1000 * video.timesteps.to(device), audio_timestep=1000 * audio.timesteps.to(device),
        sigma=1000 * video.sigma, audio_sigma=1000 * audio.sigma,
        video_coords=video.positions, audio_coords=audio.positions, return_dict=False,
    )  # fmt: skip
