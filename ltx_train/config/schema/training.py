"""Settings of a run: the model, what is trained on what, and how it is measured. Declarations only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ltx_train.config.schema.fields import MISSING, setting
from ltx_train.updates.kinds import OPTIMIZERS


@dataclass(kw_only=True)
class ModelConfig:
    """The base model."""

    preset: str = setting("tiny", "sizes of the model when its weights are random", choices=("tiny", "ltx2_3_22b"))
    path: str | None = setting(None, "the original single-file checkpoint (.safetensors)")
    weights: str = setting("file", "file: from model.path; random: seeded, for trials", choices=("file", "random"))
    seed: int = setting(0, "seed of random weights")
    dtype: str = setting("bfloat16", "dtype of the frozen weights and of activations", choices=("bfloat16", "float32"))
    text_encoder: str | None = setting(None, "folder of the Gemma text encoder; null: a tiny stand-in")
    text_tokens: int = setting(1024, "tokens of a text context", least=1)
    merge: str | None = setting(None, "a LoRA file that is merged into the base before anything else")
    merge_strength: float = setting(1.0, "strength of model.merge")


@dataclass(kw_only=True)
class AdapterConfig:
    """What is trained: an adapter on the frozen base, or every weight."""

    kind: str = setting("lora", "lora: an adapter; full: every weight", choices=("lora", "full"))
    rank: int = setting(32, "rank of the low-rank matrices", least=1)
    alpha: float = setting(32.0, "scale of the adapter: alpha / rank", least=0)
    dropout: float = setting(0.0, "dropout on the adapter's inputs", least=0, below=1)
    targets: list[str] = setting(list[str](), "sets and name endings of linear layers; empty: the set of the mode")
    rank_pattern: dict[str, int] = setting(dict[str, int](), "other ranks by name ending")
    alpha_pattern: dict[str, float] = setting(dict[str, float](), "other alphas by name ending")
    rslora: bool = setting(False, "scale alpha / sqrt(rank) instead of alpha / rank")
    dora: bool = setting(False, "also train a magnitude per output channel")
    init: str = setting("kaiming", "how the down-projection begins", choices=("kaiming", "gaussian", "orthogonal"))
    start_from: str | None = setting(None, "a LoRA file that training begins with")
    ema: float = setting(0.0, "decay of the moving average that is measured and published; 0: none", least=0, below=1)


@dataclass(kw_only=True)
class DataConfig:
    """Clips, and the prepared folder that training reads."""

    root: str = setting(MISSING, "the prepared folder; other commands than `prepare` also read s3://, gs://, https://")
    cache: str | None = setting(None, "where shards of a store are kept; null: ~/.cache/ltx-train/data")
    cache_gib: float = setting(100.0, "size of the kept shards of one store", least=0)
    max_bad_fraction: float = setting(
        0.0, "share of samples in a store's damaged shards that a run does without", least=0, below=1
    )
    source: str | None = setting(None, "what `prepare` reads: a folder of clips, or a table of them")
    buckets: list[str] = setting(list[str](), "sizes of training clips, as [512x512x121]: width x height x frames")
    fps: float | int | str = setting(
        25.0, "frames per second of training clips; source: each clip keeps its own", least=1, choices=("source",)
    )
    windows: str = setting(
        "first", "which part of a longer clip is used; all: one after the other", choices=("first", "loudest", "all")
    )
    crop: str = setting(
        "centre", "what is kept of other shapes; face: around the column face", choices=("centre", "top", "face", "pad")
    )
    loudness: float | None = setting(
        None, "LUFS that sounds are brought to, as -14; null: as they are", most=0, least=-70
    )
    trim_silence: bool = setting(False, "clips start at their first sound")
    caption: str | None = setting(None, "one caption for all clips instead of their own")
    trigger: str | None = setting(None, "a word that is put before every caption")
    caption_dropout: float = setting(0.0, "share of draws without the caption", least=0, most=1)
    keep_trigger: bool = setting(True, "a dropped caption leaves the trigger word")
    reference_scale: int = setting(1, "how many times smaller control videos are prepared", least=1)
    reference_stride: int = setting(1, "of control videos every how many frames one is kept, behind the first", least=1)
    reference_s: float = setting(3.5, "seconds of the voice window cut from each clip", least=0.2)
    voice_variants: list[str] = setting(
        list[str](), "changed recordings of every voice window", choices=("gain", "lowpass", "noise", "music")
    )
    voice_variant_share: float = setting(
        0.0, "share of draws whose voice reference is one of data.voice_variants", least=0, most=1
    )
    heldout_speakers: float = setting(0.1, "share of identities that are held out of training", least=0, below=1)
    heldout_clips: float = setting(
        0.0, "clips held out instead, of the same people: a number, or a share below 1", least=0
    )
    latent_dtype: str = setting("bfloat16", "dtype of the stored latents", choices=("bfloat16", "float32"))
    samples_per_shard: int = setting(256, "clips in one shard", least=1)
    silence_db: float = setting(-60.0, "clips below this loudness count as silent")
    on_bad_clip: str = setting("error", "what `prepare` does with a bad clip", choices=("error", "skip"))
    accept: list[str] = setting(
        list[str](), "faults of samples that training goes on with",
        choices=("constant", "copies", "same_recording", "silent"),
    )  # fmt: skip
    also: list[str] = setting(list[str](), "further prepared folders or URLs that are trained on too")
    also_weights: list[float] = setting(
        list[float](), "how often an epoch uses a sample of each of them; empty: once", least=0
    )
    order: str = setting(
        "shuffled", "stream: shard after shard, for sets larger than data.cache_gib", choices=("shuffled", "stream")
    )
    shuffle: int = setting(1024, "samples that a slot of the batch shuffles in data.order=stream", least=1)
    limit: int | None = setting(None, "train on this many clips of the training split alone; null: all", least=1)
    workers: int = setting(2, "processes that read samples; 0: the training process itself", least=0)


@dataclass(kw_only=True)
class SigmaConfig:
    """The distribution of noise levels in training."""

    kind: str = setting(
        "shifted_logit_normal", "the distribution",
        choices=("shifted_logit_normal", "logit_normal", "uniform", "high"),
    )  # fmt: skip
    std: float = setting(1.0, "standard deviation of both logit-normals", least=0)
    eps: float = setting(1e-3, "smallest noise level of the shifted logit-normal", least=0, below=1)
    uniform_prob: float = setting(0.1, "share of the shifted logit-normal drawn from U[eps, 1]", least=0, most=1)
    tokens: int | None = setting(None, "token count that sets the shift; null: the sample's own", least=1)
    shift_limits: list[float] = setting(list[float](), "[lowest, highest] shift; empty: unlimited, as the reference")
    mean: float = setting(0.0, "mean of the unshifted logit-normal")
    low: float = setting(0.0, "lower end of `uniform`", least=0, most=1)
    high: float = setting(1.0, "upper end of `uniform`", least=0, most=1)
    high_from: float = setting(0.7, "`high` draws from U[high_from, 1] with high_prob", least=0, most=1)
    high_prob: float = setting(0.6, "`high` draws from U[high_from, 1] with this probability", least=0, most=1)


@dataclass(kw_only=True)
class LossConfig:
    """How losses are weighted."""

    video_weight: float = setting(1.0, "weight of the video loss", least=0)
    audio_weight: float = setting(1.0, "weight of the audio loss", least=0)
    balance: str = setting(
        "none", "auto: each modality's loss is divided by its moving average", choices=("none", "auto")
    )
    balance_decay: float = setting(0.99, "decay of these moving averages", least=0, below=1)
    weighting: str = setting("none", "weighting of noise levels", choices=("none", "cosmap"))
    token_weights: dict[str, float] = setting(
        dict[str, float](), "loss weight of a mask's tokens, by mask name (2: twice, 0: left out)"
    )


@dataclass(kw_only=True)
class OptimConfig:
    """The optimizer. The learning rate is a function of the step alone."""

    name: str = setting("adamw", "the optimizer", choices=OPTIMIZERS)
    lr: float = setting(1e-4, "learning rate after warm-up", least=0)
    final_lr: float = setting(0.0, "learning rate of the last step", least=0)
    schedule: str = setting("linear", "course from lr to final_lr", choices=("constant", "linear", "cosine"))
    warmup: int = setting(0, "steps of linear warm-up", least=0)
    steps: int = setting(1000, "optimizer steps of the run", least=1)
    batch_size: int = setting(1, "samples of a micro-batch on one device", least=1)
    global_batch: int | None = setting(
        None, "samples of an optimizer step over all devices (gradient accumulation); null: one micro-batch each",
        least=1,
    )  # fmt: skip
    weight_decay: float = setting(0.01, "weight decay", least=0)
    betas: list[float] = setting([0.9, 0.999], "decays of the moments")
    clip: float = setting(1.0, "the gradient is clipped to this norm; 0: never", least=0)
    skip_spikes: float | None = setting(
        None, "skip steps whose gradient norm is this many times the mean of the last hundred; null: none", least=2
    )


@dataclass(kw_only=True)
class EvalConfig:
    """Held-out measurement: fixed clips, fixed noise levels, fixed noise."""

    interval: int = setting(250, "optimizer steps between two measurements; 0: never", least=0)
    quantiles: int = setting(9, "noise levels at equally likely slices of the training distribution", least=0)
    sigmas: list[float] = setting([0.1, 0.3, 0.5, 0.7, 0.9], "further noise levels, each in (0, 1]")
    seed: int = setting(1234, "seed of the measurement's noise")
    batch_size: int = setting(1, "clips measured at once", least=1)
    max_samples: int = setting(0, "most clips that are measured; 0: all", least=0)
    wrong_references: int = setting(2, "other identities' references per clip, for the reference gap", least=1)
    dropped: bool = setting(True, "also measure without the reference")
    neutral: bool = setting(True, "also measure with silence, or grey pictures, as the reference")
    voice_variant: str | None = setting(None, "measure with this variant of all voice references; null: as recorded")
    wrong_caption: bool = setting(True, "also measure under another clip's caption")
    strengths: list[float] = setting(
        [0.5, 1.5], "strengths of the adapter that `evaluate` measures beside 0 and 1", least=0, most=2
    )
    repeats: int = setting(1, "how often `evaluate` measures again with other noise; 0: never", least=0)
    attention: bool = setting(True, "also measure the attention on reference tokens")
    samples: int = setting(0, "held-out clips that are generated when those of eval.prompts are", least=0)
    prompts: Any = setting(None, "clips that are generated during training: a list of prompts, or a YAML file with one")
    sample_interval: int = setting(0, "optimizer steps between two generations of clips; 0: eval.interval", least=0)
    patience: int = setting(0, "measurements without a better held-out loss that end the run; 0: never", least=0)


@dataclass
class LoggerConfig:
    """Where numbers go; metrics.jsonl is always written."""

    wandb: str = setting("offline", "Weights & Biases", choices=("offline", "online", "disabled"))
    project: str = setting("ltx-train", "the W&B project")
    every: int = setting(10, "optimizer steps between two logged rows", least=1)
    also: list[str] = setting(list[str](), "further trackers", choices=("csv", "tensorboard"))


@dataclass
class CheckpointConfig:
    """Checkpoints, from which an interrupted run continues."""

    interval: int = setting(250, "optimizer steps between two saves", least=1)
    keep: int = setting(3, "newest checkpoints that are kept; the best one stays too", least=1)
    on_full: str = setting(
        "wait", "when two saves in a row fail: wait until one succeeds, or stop the run", choices=("wait", "stop")
    )


@dataclass(kw_only=True)
class RunConfig:
    """The run's name. A run lives in <root>/<experiment>/<id>; the same three names continue it."""

    root: str = setting("runs", "folder of all runs")
    experiment: str = setting("default", "name of the experiment")
    id: str = setting("main", "name of the run within the experiment")
    seed: int = setting(42, "seed of training: order, noise, dropout, references")
    resume: str = setting(
        "auto",
        "auto: continue from the newest checkpoint; never: refuse a folder with checkpoints",
        choices=("auto", "never"),
    )
    deterministic: bool = setting(False, "deterministic kernels: equal runs are equal bit for bit, but slower")
    profile: int = setting(0, "optimizer steps whose kernels are recorded to <run>/profile; 0: none", least=0)
    overwrite: bool = setting(False, "outputs may replace files that ltx-train did not write")
    allow: list[str] = setting(list[str](), "settings that may differ from the run's own although its course changes")
