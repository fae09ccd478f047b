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
from ltx_train.data.reader import VIDEO, Reader, ReadRequest
from ltx_train.data.record import Record
from ltx_train.evaluation import heldout, traits
from ltx_train.evaluation.embeddings import FaceModel, SpeakerModel
from ltx_train.evaluation.heldout import Neutral
from ltx_train.evaluation.swap import DROPPED, OFF, ON, SILENCE, Output
from ltx_train.evaluation.traits import Traits
from ltx_train.model import adapter
from ltx_train.model.transformer import Pair, Transformer
from ltx_train.sampling import media
from ltx_train.sampling.media import Decoder


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """One clip to generate: what it is called in the comparison, and its inputs. strength: of the adapter. variant: of
    the reference's recording."""

    arm: str
    reference: str
    prompt: str
    config: Config
    request: SampleRequest
    strength: float
    variant: str = ""

    @property
    def seed(self) -> int:
        return self.config.sample.seed


@dataclass(frozen=True, slots=True, kw_only=True)
class Swapped:
    """outputs: what was measured. references: of each speaker's voice, and face with a model of faces. clips: to listen
    to, by title."""

    outputs: Sequence[Output]
    references: Mapping[str, Traits]
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
        traits.library()
        self._setup, self._name = setup, voices[0].name
        self._silence = neutral_references.of_heldout(setup, root, index)
        self._negative = planned_clips.negative(setup)
        self._measure = _Measure(config)
        self._variants = config.data.voice_variants if config.swap.variants else []
        self._readers = {v: _reader(root, index, config, v) for v in ("", *self._variants)}
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
        outputs = [self._measure.output(decoder, job, latents) for job, latents in terminal.each("decoding", made)]
        references = {r.speaker: self._traits_of(decoder, r) for r in self._speakers}
        return Swapped(outputs=outputs, references=references, clips=self._written(decoder, made, folder))

    def _jobs(self) -> Iterator[_Job]:
        """All arms at strength 1, then the references once more at the strengths of the sweep and in all variants."""
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
        for variant in self._variants:
            for speaker in self._speakers:
                request = self._request(self._prompts[0], speaker, variant)
                job = self._job(ON, self._prompts[0], request, seeds[0], reference=speaker.speaker)
                yield replace(job, variant=variant)

    def _job(
        self, arm: str, prompt: Record, request: SampleRequest, seed: int, *, reference: str = "", strength: float = 1.0
    ) -> _Job:  # fmt: skip
        config = self._setup.config
        config = replace(config, sample=replace(config.sample, seed=seed))
        return _Job(arm=arm, reference=reference, prompt=prompt.key, config=config, request=request, strength=strength)

    def _request(self, prompt: Record, speaker: Record, variant: str = "") -> SampleRequest:
        """The prompt's clip with the voice of a speaker."""
        sample = self._readers[variant].with_references_of(Address(prompt.key, 0), speaker.key)
        return requests.of_batch(self._setup.config.mode, collate([sample]), self._negative, prompt.fps)

    def _traits_of(self, decoder: Decoder, speaker: Record) -> Traits:
        """Of the reference's sound as the model gets it, and of the face in the speaker's own clip."""
        latent = self._request(self._prompts[0], speaker).batch.references[self._name][0]
        own = self._readers[""].tensors(speaker).get(VIDEO) if self._measure.has_face else None
        return self._measure.traits(decoder, (own, latent))

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
            if (job.prompt, job.seed) == first and job.strength == 1 and not job.variant:
                title = job.reference or "none of them"
                path = folder / f"{title}-{job.arm}.mp4".replace(" ", "-").replace("/", "-")
                requests.write(decoder, job.request, latents, path)
                groups.setdefault(title, []).append(Clip(job.arm, path))
        return groups


class _Measure:
    """Traits of clips, with the models of identities that are configured. The pictures are decoded for a face alone."""

    def __init__(self, config: Config) -> None:
        s = config.swap
        self._speaker = None if s.speaker_model is None else SpeakerModel(s.speaker_model)
        self._face = None if s.face_model is None else FaceModel(s.face_model)

    @property
    def has_face(self) -> bool:
        return self._face is not None

    def traits(self, decoder: Decoder, latents: Pair) -> Traits:
        pixels, sound = media.decode(decoder, latents[0] if self._face else None, latents[1])
        assert sound is not None
        found = traits.of_sound(sound.waveform, sound.rate)
        speaker = self._speaker.of_sound(sound.waveform, sound.rate) if self._speaker else ()
        face = self._face.of_pictures(pixels) if self._face and pixels is not None else ()
        return replace(found, speaker=speaker, face=face)

    def output(self, decoder: Decoder, job: _Job, latents: Pair) -> Output:
        generated = [latents[1]] if job.request.mode.video is not Role.generate else list(latents)
        flat = np.concatenate([latent.float().cpu().numpy().ravel() for latent in generated if latent is not None])
        return Output(
            arm=job.arm, reference=job.reference, prompt=job.prompt, seed=job.seed, latent=flat,
            traits=self.traits(decoder, latents), strength=job.strength, variant=job.variant,
        )  # fmt: skip


def _reader(root: Path, index: Index, config: Config, variant: str) -> Reader:
    """Of references in one variant, or as recorded."""
    request = replace(ReadRequest.of([config.mode]), variants=False)
    if variant:
        request = replace(request, voice_variants=(variant,), voice_variant_share=1.0)
    return Reader(root, index, seed=config.eval.seed, request=request)


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
