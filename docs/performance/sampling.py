"""Times guided steps of sampling on this machine's GPU, round by round: sampling.py OUT.json [tiny]

Work B (1280x704, 153 frames at 25 fps, with sound) with random weights of the real sizes. All cases are opened as
`sample` opens them and take turns, so that a drifting clock changes no ratio. `tiny` tries the script on a CPU.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

import torch

from ltx_train import config as configuration
from ltx_train import rng
from ltx_train.assembly import model_builder, timing
from ltx_train.assembly.setup import forward_only
from ltx_train.config import Config
from ltx_train.diffusion import conditions, references, sigma, transfer
from ltx_train.model.transformer import Transformer
from ltx_train.sampling import sampler
from ltx_train.sampling.guidance import Guidance, Guider
from ltx_train.sampling.sampler import SamplerInputs

GIB = 2**30
BASE = ("model.weights=random", "mode=t2av", "adapter=attention", "data.fps=25")
CASES = {
    "bf16": ("memory=auto",), "fp8": ("memory=fp8",), "int8": ("memory=int8",),
    "int8_budget15": ("memory=int8", "memory.stream_blocks=19"),
}  # fmt: skip
GUIDED = Guidance(video=Guider(cfg=4.0), audio=Guider(cfg=4.0))
ROUNDS = 6


def composed(tiny: bool, *words: str) -> Config:
    sizes = ("model=tiny", "data.buckets=[64x64x33]") if tiny else ("model=ltx2_3_22b", "data.buckets=[1280x704x153]")
    return configuration.continued(configuration.compose_config([*sizes, *BASE, *words]), None, 1)


def inputs(config: Config, device: torch.device) -> SamplerInputs:
    batch = transfer.batch_to(timing.random_batch(config, 0), device)
    draws = conditions.draw(batch, config.mode, sigma.SigmaDistribution(), 42, sigma=1.0)
    made = conditions.assemble(batch, references.always_open(config.mode), draws)
    negative = {
        name: rng.normal(tuple(context.shape), 0, "negative", name).to(context.device, context.dtype)
        for name, context in (("video", batch.video_context), ("audio", batch.audio_context))
    }
    return SamplerInputs(
        video=made.video, audio=made.audio, negative_video=negative["video"], negative_audio=negative["audio"]
    )


def seconds(transformer: Transformer, start: SamplerInputs, guidance: Guidance) -> float:
    """One step of the loop."""
    begun = time.perf_counter()
    sampler.sample(transformer, start, sigma.inference_schedule(30)[:2], guidance)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def main(out: Path, tiny: bool) -> None:
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    cases = {name: words for name, words in CASES.items() if not tiny or "stream" not in str(words)}
    models = {n: model_builder.open_frozen(forward_only(composed(tiny, *words))).eval() for n, words in cases.items()}
    start = inputs(composed(tiny), device)
    times: dict[str, list[float]] = {}
    for number in range(ROUNDS + 1):  # the first compiles
        for name, transformer in models.items():
            for arms, guidance in (("positive_s", Guidance()), ("cfg_s", GUIDED)):
                took = seconds(transformer, start, guidance)
                times.setdefault(f"{name}/{arms}", []).extend([took] if number else [])
    records = [{"case": name, "rounds": ROUNDS, **{a: round(statistics.median(times[f"{name}/{a}"]), 4)
                for a in ("positive_s", "cfg_s")}} for name in models]  # fmt: skip
    out.write_text(json.dumps(records, indent=1) + "\n")
    print(out.read_text(), end="")


if __name__ == "__main__":
    main(Path(sys.argv[1]), "tiny" in sys.argv[2:])
