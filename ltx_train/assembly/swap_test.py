"""Generates the clips of the swap test and measures them: the same prompts and noise under every reference.

Owns which clips are generated. `evaluation.swap` compares them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from ltx_train import terminal
from ltx_train.assembly import encoder_builder, neutral_references, planned_clips, requests
from ltx_train.assembly.requests import SampleRequest
from ltx_train.assembly.setup import Setup
from ltx_train.config import Config
from ltx_train.contracts import Batch, Clip, ConfigError, DataError, ModalityName, Role
from ltx_train.data.collate import collate
from ltx_train.data.index import HELDOUT, Index
from ltx_train.data.order import Address
from ltx_train.data.reader import Reader, ReadRequest
from ltx_train.data.record import Record
from ltx_train.evaluation import heldout, voice_features
from ltx_train.evaluation.heldout import Neutral
from ltx_train.evaluation.swap import DROPPED, OFF, ON, SILENCE, Output
from ltx_train.evaluation.voice_features import Voice
from ltx_train.model import adapter
from ltx_train.model.transformer import Pair, Transformer
from ltx_train.sampling import media
from ltx_train.sampling.media import Decoder


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """One clip to generate: what it is called in the comparison, and its inputs. strength: of the adapter."""

    arm: str
    reference: str
    prompt: str
    config: Config
    request: SampleRequest
    strength: float

    @property
    def seed(self) -> int:
        return self.config.sample.seed


@dataclass(frozen=True, slots=True, kw_only=True)
class Swapped:
    """outputs: what was measured. references: the voices by speaker. clips: to listen to, by title."""

    outputs: Sequence[Output]
    references: Mapping[str, Voice]
    clips: Mapping[str, Sequence[Clip]]


class SwapTest:
    """Reads and encodes what the clips are made of. Created before the model is loaded.

    ConfigError for a mode without a voice reference; UserError without librosa.
    """

    def __init__(self, setup: Setup, root: Path, index: Index) -> None:
        config = setup.config
        voices = [c for c in config.mode.references if c.stream is ModalityName.audio]
        if not voices or config.mode.audio is not Role.generate:
            raise ConfigError("the swap test is for modes that generate sound with a voice reference (audio_reference)")
        voice_features.library()
        self._setup, self._name = setup, voices[0].name
        self._silence = neutral_references.of_heldout(setup, root, index)
        self._negative = planned_clips.negative(setup)
        request = replace(ReadRequest.of([config.mode]), variants=False)
        self._reader = Reader(root, index, seed=config.eval.seed, request=request)
        self._speakers = _one_clip_each(index)[: config.swap.speakers]
        self._prompts = _prompts(index)[: config.swap.prompts]
        if len(self._speakers) < 2:
            raise DataError("the swap test needs two held-out speakers at least: hold out more (data.heldout_speakers)")

    def run(self, transformer: Transformer, folder: Path) -> Swapped:
        """Generates, decodes and measures all clips. The adapter's own strength is sample.strength."""
        jobs = list(self._jobs())
        made: list[tuple[_Job, Pair]] = []
        with heldout.undisturbed(transformer):
            for job in terminal.each("generating", jobs):
                off = adapter.disabled(transformer) if job.arm == OFF or job.strength == 0 else nullcontext()
                with adapter.at_strength(transformer, job.strength * job.config.sample.strength), off:
                    latents = requests.generate(transformer, job.config, job.request, self._setup.device)
                made.append((job, latents))
        decoder = encoder_builder.decoder(self._setup.config, self._setup.device)
        outputs = [_measured(decoder, job, latents) for job, latents in terminal.each("decoding", made)]
        references = {r.speaker: self._voice_of(decoder, r) for r in self._speakers}
        return Swapped(outputs=outputs, references=references, clips=self._written(decoder, made, folder))

    def _jobs(self) -> Iterator[_Job]:
        """All arms at strength 1, then the references once more at the strengths of the sweep."""
        config = self._setup.config
        seeds = [config.sample.seed + number for number in range(config.swap.seeds)]
        for prompt in self._prompts:
            for seed in seeds:
                for speaker in self._speakers:
                    request = self._request(prompt, speaker)
                    for arm in (ON, OFF):
                        yield self._job(arm, prompt, request, seed, reference=speaker.speaker)
                own = self._request(prompt, prompt)
                yield self._job(DROPPED, prompt, _without_references(own), seed)
                if self._silence:
                    yield self._job(SILENCE, prompt, _with_silence(own, self._silence), seed)
        for strength in config.swap.strengths:
            for speaker in self._speakers if strength != 1 else ():
                request = self._request(self._prompts[0], speaker)
                who = speaker.speaker
                yield self._job(ON, self._prompts[0], request, seeds[0], reference=who, strength=strength)

    def _job(
        self, arm: str, prompt: Record, request: SampleRequest, seed: int, *, reference: str = "", strength: float = 1.0
    ) -> _Job:  # fmt: skip
        config = self._setup.config
        config = replace(config, sample=replace(config.sample, seed=seed))
        return _Job(arm=arm, reference=reference, prompt=prompt.key, config=config, request=request, strength=strength)

    def _request(self, prompt: Record, speaker: Record) -> SampleRequest:
        """The prompt's clip with the voice of a speaker."""
        sample = self._reader.with_references_of(Address(prompt.key, 0), speaker.key)
        return requests.of_batch(self._setup.config.mode, collate([sample]), self._negative, prompt.fps)

    def _voice_of(self, decoder: Decoder, speaker: Record) -> Voice:
        """Of the reference as the model gets it."""
        latent = self._request(self._prompts[0], speaker).batch.references[self._name][0]
        _, sound = media.decode(decoder, None, latent)
        assert sound is not None
        return voice_features.of_sound(sound.waveform, sound.rate)

    def _written(self, decoder: Decoder, made: Sequence[tuple[_Job, Pair]], folder: Path) -> dict[str, list[Clip]]:
        """Clips of the first prompt and seed: of each speaker the reference, and the output without and with the
        adapter."""
        groups: dict[str, list[Clip]] = {}
        first = (self._prompts[0].key, self._setup.config.sample.seed)
        for speaker in self._speakers:
            request = self._request(self._prompts[0], speaker)
            path = folder / f"{speaker.key}-reference.mp4"
            requests.write(decoder, request, (None, request.batch.references[self._name][0]), path)
            groups[speaker.speaker] = [Clip("reference", path)]
        for job, latents in made:
            if (job.prompt, job.seed) == first and job.strength == 1:
                title = job.reference or "none of them"
                path = folder / f"{title}-{job.arm}.mp4".replace(" ", "-").replace("/", "-")
                requests.write(decoder, job.request, latents, path)
                groups.setdefault(title, []).append(Clip(job.arm, path))
        return groups


def _measured(decoder: Decoder, job: _Job, latents: Pair) -> Output:
    _, sound = media.decode(decoder, None, latents[1])
    voice = None if sound is None else voice_features.of_sound(sound.waveform, sound.rate)
    generated = [latents[1]] if job.request.mode.video is not Role.generate else list(latents)
    flat = np.concatenate([latent.float().cpu().numpy().ravel() for latent in generated if latent is not None])
    return Output(
        arm=job.arm, reference=job.reference, prompt=job.prompt, seed=job.seed, latent=flat, voice=voice,
        strength=job.strength,
    )  # fmt: skip


def _one_clip_each(index: Index) -> list[Record]:
    """The first held-out clip of every speaker that has a voice."""
    found: dict[str, Record] = {}
    for record in sorted(index.split(HELDOUT), key=lambda r: r.key):
        if record.voice:
            found.setdefault(record.speaker, record)
    return list(found.values())


def _prompts(index: Index) -> list[Record]:
    """A held-out clip for every caption: its text, its length and its size are those of the clips."""
    found: dict[str, Record] = {}
    for record in sorted(index.split(HELDOUT), key=lambda r: r.key):
        found.setdefault(record.caption, record)
    return list(found.values())


def _without_references(request: SampleRequest) -> SampleRequest:
    mode = request.mode
    kept = [c for c in mode.conditions if c not in mode.references]
    mode = replace(mode, conditions=kept)
    return replace(request, mode=mode, batch=replace(request.batch, references={}))


def _with_silence(request: SampleRequest, silence: Neutral) -> SampleRequest:
    return replace(request, batch=_silenced(request.batch, silence))


def _silenced(batch: Batch, silence: Neutral) -> Batch:
    replaced = {
        name: silence.get((name, tuple(latent.shape[1:])), torch.zeros_like(latent[0]))[None]
        for name, latent in batch.references.items()
    }
    return replace(batch, references=replaced)
