"""`did you mean ...?` for a mistyped name, and the names that other trainers use for the same thing."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

# By the last part of what was typed: learning_rate, optim.learning_rate and training.learning_rate all mean optim.lr.
_SYNONYMS: Mapping[str, str] = {
    "learning_rate": "optim.lr", "unet_lr": "optim.lr", "lr": "optim.lr",
    "max_train_steps": "optim.steps", "num_train_steps": "optim.steps", "max_steps": "optim.steps",
    "total_steps": "optim.steps", "num_steps": "optim.steps", "iterations": "optim.steps", "steps": "optim.steps",
    "train_batch_size": "optim.batch_size", "batch_size": "optim.batch_size", "micro_batch_size": "optim.batch_size",
    "gradient_accumulation_steps": "optim.global_batch", "accumulate": "optim.global_batch",
    "accumulate_grad_batches": "optim.global_batch", "grad_accum": "optim.global_batch",
    "optimizer": "optim", "optimizer_type": "optim", "lr_scheduler": "optim.schedule", "scheduler": "optim.schedule",
    "lr_warmup_steps": "optim.warmup", "warmup_steps": "optim.warmup", "max_grad_norm": "optim.clip",
    "gradient_clip_val": "optim.clip", "weight_decay": "optim.weight_decay",
    "lora_rank": "adapter.rank", "network_dim": "adapter.rank", "rank": "adapter.rank", "lora_r": "adapter.rank",
    "lora_alpha": "adapter.alpha", "network_alpha": "adapter.alpha", "alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout", "network_dropout": "adapter.dropout", "target_modules": "adapter.targets",
    "network_weights": "adapter.start_from", "ema_decay": "adapter.ema",
    "resolution": "data.buckets", "resolution_buckets": "data.buckets", "num_frames": "data.buckets",
    "frames": "data.buckets", "bucket": "data.buckets", "frame_rate": "data.fps", "fps": "data.fps",
    "trigger_word": "data.trigger", "id_token": "data.trigger", "caption_dropout_rate": "data.caption_dropout",
    "dataset": "data.source", "train_data_dir": "data.source", "instance_data_root": "data.source",
    "dataset_path": "data.source", "data_dir": "data.source", "preprocessed_data_root": "data.root",
    "cache_directory": "data.root", "num_workers": "data.workers", "dataloader_num_workers": "data.workers",
    "model_path": "model.path", "pretrained_model_name_or_path": "model.path", "ckpt_path": "model.path",
    "dit": "model.path", "checkpoint_path": "model.path", "text_encoder_path": "model.text_encoder",
    "gemma": "model.text_encoder", "mixed_precision": "model.dtype", "precision": "model.dtype",
    "output_dir": "run.root", "output_name": "run.id", "run_name": "run.id", "run_id": "run.id", "seed": "run.seed",
    "resume_from_checkpoint": "run.resume", "resume": "run.resume",
    "save_every_n_steps": "checkpoint.interval", "checkpointing_steps": "checkpoint.interval",
    "save_steps": "checkpoint.interval", "checkpoints_total_limit": "checkpoint.keep",
    "validation_steps": "eval.interval", "eval_steps": "eval.interval", "sample_every_n_steps": "eval.interval",
    "log_every_n_steps": "logger.every", "wandb_project": "logger.project", "report_to": "logger",
    "blocks_to_swap": "memory.stream_blocks", "block_swap": "memory.stream_blocks",
    "gradient_checkpointing": "memory.keep", "quantization": "memory.quantize", "base_precision": "memory.quantize",
    "vram": "memory.budget_gib", "fp8_base": "memory.quantize", "torch_compile": "memory.compile",
    "num_gpus": "strategy.devices", "gpus": "strategy.devices", "nproc_per_node": "strategy.devices",
    "num_processes": "strategy.devices", "devices": "strategy.devices", "nnodes": "cluster.nodes",
    "prompt": "sample.prompt", "negative": "sample.negative_prompt", "guidance_scale": "sample.video_cfg",
    "cfg": "sample.video_cfg", "cfg_scale": "sample.video_cfg", "num_inference_steps": "sample.steps",
    "lora": "sample.adapter", "lora_path": "sample.adapter", "lora_weight": "sample.strength", "output": "sample.out",
}  # fmt: skip
_COMMANDS: Mapping[str, str] = {
    "train": "fit", "training": "fit", "finetune": "fit", "fine-tune": "fit", "run": "fit", "start": "fit",
    "preprocess": "prepare", "encode": "prepare", "cache": "prepare", "process": "prepare",
    "validate": "evaluate", "eval": "evaluate", "test": "evaluate", "compare": "evaluate", "report": "evaluate",
    "generate": "sample", "infer": "sample", "inference": "sample", "predict": "sample", "convert": "export",
    "save": "export", "verify": "inspect", "info": "inspect", "audit": "check", "benchmark": "bench",
    "search": "sweep", "tune": "sweep", "multirun": "sweep", "sbatch": "submit", "slurm": "submit",
    "diagnose": "doctor", "resume": "fit", "serve": "watch", "dashboard": "watch",
}  # fmt: skip


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean ...?` for the closest known word, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def for_setting(key: str, known: Iterable[str]) -> str:
    """The same for a setting's name: another trainer's name for it comes before a similar spelling."""
    known = list(known)
    leaf = key.rsplit(".", 1)[-1].replace("-", "_").lower()
    within = [name for name in known if name.rsplit(".", 1)[-1] == leaf]
    if len(within) == 1 and leaf not in _SYNONYMS:
        return f"; did you mean {within[0]!r}?"
    meant = _SYNONYMS.get(leaf)
    return f"; did you mean {meant!r}?" if meant in known else nearest(key, known)


def for_command(word: str, known: Iterable[str]) -> str:
    """The same for a command: `trian` is close to `train`, which means `fit`."""
    close = difflib.get_close_matches(word.lower(), [*known, *_COMMANDS], n=1, cutoff=0.6)
    if not close:
        return ""
    meant = _COMMANDS.get(close[0], close[0])
    return f"; did you mean {meant!r}?"
