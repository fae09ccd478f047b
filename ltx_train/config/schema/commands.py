"""Settings that single commands read beside a run's own. Declarations only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ltx_train.config.schema.fields import setting


@dataclass(kw_only=True)
class CutConfig:
    """`cut`."""

    source: str | None = setting(None, "a long recording, or a folder of them")
    out: str = setting("clips", "the folder for the clips and their table")
    subtitles: str | None = setting(None, "a SubRip file; null: the .srt file with the recording's name")
    speaker: str | None = setting(None, "speaker of all clips; null: the recording's name")
    scenes: bool = setting(True, "scene cuts end clips")
    speech: bool = setting(True, "pauses between sentences end clips")
    look: bool = setting(True, "clips are looked at: the columns face and findings")
    leave_out: list[str] = setting(
        list[str](), "clips with these findings are not kept", choices=("black", "still", "text", "no face")
    )
    shortest_s: float = setting(2.0, "seconds of the shortest clip", least=0.2)
    longest_s: float | None = setting(None, "seconds of the longest clip; null: the longest of data.buckets", least=0.2)


@dataclass(kw_only=True)
class CaptionConfig:
    """`caption`."""

    url: str | None = setting(None, "an OpenAI-compatible endpoint up to /v1, as http://127.0.0.1:8000/v1")
    model: str | None = setting(None, "name of a vision or omni model at the endpoint")
    speech: str | None = setting(
        None, "a speech model of transformers, as whisper-small: it fills the column transcript"
    )
    key_variable: str = setting("OPENAI_API_KEY", "the environment variable with the key; empty: no key is sent")
    prompt: str = setting(
        "Describe this clip in one paragraph: people, appearance, actions, speech, voice, other sounds, place, camera. "
        "Write no introduction and no guesses.",
        "instruction for the model",
    )
    frames: int = setting(8, "frames of each clip in the request", least=1)
    size: int = setting(512, "maximum pixels of a frame's longer side", least=32)
    sound: bool = setting(False, "the request contains the sound, for omni models")
    max_tokens: int = setting(400, "maximum tokens of an answer", least=1)
    timeout_s: float = setting(120.0, "seconds to wait for an answer", least=1)


@dataclass
class CheckConfig:
    """`check`."""

    previews: int = setting(12, "clips whose pictures and sound are on the page; clips with findings first", least=0)


@dataclass(kw_only=True)
class SampleConfig:
    """`sample`, and the clips that `fit` generates."""

    prompt: str = setting("", "the text")
    prompts: Any = setting(None, "several clips instead: a list of prompts as of eval.prompts, or a YAML file with one")
    negative_prompt: str = setting("", "the text that guidance moves away from")
    bucket: str | None = setting(None, "size of the clip, as 512x512x121; null: the first of data.buckets")
    fps: float | None = setting(None, "frames per second; null: data.fps", least=1)
    steps: int = setting(30, "denoising steps", least=1)
    seed: int = setting(42, "seed of the noise")
    seeds: list[int] = setting(list[int](), "seeds of several clips of each prompt instead")
    adapter: str | None = setting(None, "a LoRA file")
    strength: float = setting(1.0, "strength of the LoRA", least=0, most=2)
    strength_of: dict[str, float] = setting(
        dict[str, float](), "further factors by stream, as {audio: 1, bridge: 0.5, video: 1}"
    )
    image: str | None = setting(None, "an image for the first frame")
    image_crf: int = setting(33, "images are compressed like training videos (H.264 CRF); 0: not", least=0, most=51)
    frames: Any = setting(None, "images for frames at other times, as {1.2: middle.png}")
    video: str | None = setting(None, "a video: that a sound is made for, or whose parts the mode keeps")
    mask: str | None = setting(None, "a mask video, white where sample.video stays, for modes with a mask")
    region: list[int] = setting(list[int](), "[top, left, bottom, right] in pixels of sample.video that stay")
    audio: str | None = setting(None, "a sound: that the video is made for, or whose parts the mode keeps")
    audio_start: float = setting(0.0, "seconds of sample.audio at which it begins", least=0)
    audio_seconds: float | None = setting(None, "seconds of sample.audio that are used; null: the clip's", least=0.04)
    audio_short: str = setting(
        "refuse", "a sound shorter than the clip: refuse it, loop it, or fill up with silence",
        choices=("refuse", "loop", "silence"),
    )  # fmt: skip
    audio_mask: str | None = setting(None, "seconds of sample.audio that stay, as 0-1.2,2-3, for modes with a mask")
    reference_audio: str | None = setting(None, "a recording of the reference voice")
    reference_video: str | None = setting(None, "the control or reference video")
    references: dict[str, str] = setting(dict[str, str](), "files of further references, by their source in the mode")
    without_references: bool = setting(False, "clips without the references that the mode was trained with")
    video_cfg: float = setting(1.0, "classifier-free guidance of the video; 1: none")
    audio_cfg: float = setting(1.0, "classifier-free guidance of the audio; 1: none")
    modality_scale: float = setting(1.0, "guidance away from modalities without each other; 1: none")
    stg_scale: float = setting(0.0, "spatio-temporal guidance; 0: none")
    stg_blocks: list[int] = setting(list[int](), "blocks that spatio-temporal guidance perturbs")
    rescale: float = setting(0.0, "share of the guided prediction's variance that is rescaled")
    audio_modality_scale: float | None = setting(None, "modality_scale of the audio; null: the same")
    audio_stg_scale: float | None = setting(None, "stg_scale of the audio; null: the same")
    audio_rescale: float | None = setting(None, "rescale of the audio; null: the same")
    skip_steps: int = setting(0, "steps after each computed one that repeat its prediction", least=0)
    schedule: str = setting(
        "dev", "noise levels; distilled: the distilled model's eight, whatever sample.steps is",
        choices=("dev", "distilled"),
    )  # fmt: skip
    solver: str = setting("euler", "heun: second order, two predictions a step", choices=("euler", "heun"))
    upsampler: str | None = setting(None, "a latent upsampler x2: two stages, the first at half width and height")
    distilled_lora: str | None = setting(None, "the distilled LoRA, merged into the base for the second stage")
    distilled_strength: float = setting(1.0, "strength of the distilled LoRA", least=0, most=2)
    out: str = setting("sample.mp4", "the file to write")


@dataclass(kw_only=True)
class ExportConfig:
    """`export`."""

    run: str | None = setting(None, "the run folder; null: the one that run.* names")
    step: int | None = setting(None, "the checkpoint's step; null: the newest")
    out: str | None = setting(None, "the file to write; null: in the run folder")
    strength_of: dict[str, float] = setting(dict[str, float](), "strength by stream, as {audio: 1, bridge: 0}")
    format: str = setting("comfyui", "names in a LoRA file", choices=("comfyui", "diffusers", "peft"))
    hub_folder: str | None = setting(None, "also a folder to publish: LoRA, model card, settings without paths, clips")
    hub_repo: str | None = setting(None, "uploads that folder to this repository of the hub, as anna/voice-lora")
    hub_private: bool = setting(True, "a new repository of the hub is private")


@dataclass(kw_only=True)
class LoraConfig:
    """`lora`."""

    do: str = setting(
        "scale", "what is made of the files",
        choices=("scale", "split", "merge", "resize", "extract", "plain"),
    )  # fmt: skip
    files: list[str] = setting(list[str](), "LoRA files, or folders of peft")
    strengths: list[float] = setting(list[float](), "strength of each file; empty: 1")
    strength_of: dict[str, float] = setting(dict[str, float](), "strength by stream, as {audio: 1, bridge: 0}")
    rank: int = setting(32, "rank of what `resize`, `extract` and `plain` make", least=1)
    tuned: str | None = setting(None, "a full fine-tune's checkpoint, which `extract` compares with model.path")
    format: str = setting("comfyui", "names in the file", choices=("comfyui", "diffusers", "peft"))
    out: str = setting("lora.safetensors", "the file to write; `split` adds the stream to its name, peft has a folder")


@dataclass
class InspectConfig:
    """`inspect`."""

    file: str | None = setting(None, "the LoRA file to check against the base")
    run: str | None = setting(None, "the run folder whose output the file must reproduce")
    compare: str | None = setting(None, "another LoRA file, whose changes are compared by stream")
    page: str | None = setting(None, "an HTML file to write, with the norms of the changes by block and stream")


@dataclass(kw_only=True)
class BenchConfig:
    """`bench`."""

    what: str = setting("step", "step: a training step; data: reading of samples", choices=("step", "data"))
    steps: int = setting(5, "timed steps", least=1)
    warmup: int = setting(3, "steps before the timed ones", least=1)
    case: str = setting("", "name of the record")
    out: str | None = setting(None, "a JSON file that the record is added to")
    baseline: bool = setting(False, "also time diffusers' plain path")


@dataclass(kw_only=True)
class SweepConfig:
    """A search over settings by held-out loss."""

    name: str = setting("sweep", "name of the search within the experiment")
    trials: int = setting(12, "trials of the search", least=1)
    sampler: str = setting("tpe", "tpe proposes values, grid tries every combination", choices=("tpe", "grid"))
    parallel: int = setting(1, "trials at a time", least=1)
    place: str = setting("local", "where trials run", choices=("local", "slurm"))
    space: list[str] = setting(
        list[str](), "setting=log(a, b), uniform(a, b), int(a, b) or choice(a, b, ...), one line each"
    )
    prune: bool = setting(True, "give up trials that are worse than the median of the others at the same step")
    warmup: int = setting(0, "step from which trials are given up", least=0)


@dataclass
class DoctorConfig:
    """`doctor`."""

    json: bool = setting(False, "print the findings as JSON")


@dataclass(kw_only=True)
class PlanConfig:
    """`plan`."""

    card: str | None = setting(None, "a GPU by name, for planning on a machine without it")
    clips: int | None = setting(
        None, "number of clips of a data set; `plan` then shows its disk space and hours", least=1
    )
    price_per_hour: float | None = setting(None, "price of a device for an hour; `plan` adds up the costs", least=0)
    host_gib: float | None = setting(None, "host memory of the machine with plan.card; null: any amount", least=1)
    host_gbs: float | None = setting(
        None, "GB/s from host memory to plan.card: PCIe 3 x16 12, 4 25, 5 55; null: as its data sheet", least=0.1
    )
    link_gbs: list[float] = setting([50.0, 400.0], "GB/s into a machine over its network cards; for several machines")


@dataclass(kw_only=True)
class SwapConfig:
    """`evaluate swap`."""

    speakers: int = setting(6, "held-out speakers whose voices are references", least=2)
    prompts: int = setting(1, "held-out captions that clips are generated with", least=1)
    seeds: int = setting(2, "seeds; the floor is what another seed changes", least=2)
    strengths: list[float] = setting([0.0, 0.25, 0.5, 0.75], "further strengths of the adapter", least=0, most=2)
    variants: bool = setting(True, "the voices in data.voice_variants are references, too")
    speaker_model: str | None = setting(None, "also embeddings of voices, by this x-vector model of transformers")
    face_model: str | None = setting(None, "also embeddings of faces, by this ArcFace network (ONNX file)")


@dataclass
class WatchConfig:
    """`watch`."""

    port: int = setting(8420, "port of the page on this machine; 0: any that is free", least=0, most=65535)
