"""Clips generated from held-out samples: their caption, references and conditions, and noise for the rest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ltx_train.assembly import encoder_builder, from_config
from ltx_train.assembly.setup import Setup
from ltx_train.contracts import Batch, Clip, ModalityName
from ltx_train.data.collate import collate
from ltx_train.data.index import Index
from ltx_train.data.order import Address
from ltx_train.data.reader import Reader
from ltx_train.data.record import Record
from ltx_train.diffusion import conditions, references, sigma, transfer
from ltx_train.evaluation import heldout
from ltx_train.model import codecs
from ltx_train.model.transformer import Pair, Transformer
from ltx_train.sampling import media, sampler
from ltx_train.sampling.guidance import Guidance


class Previews:
    """Generates the same clips from the same noise for every adapter. The ranks share the clips out."""

    def __init__(self, setup: Setup, root: Path, index: Index) -> None:
        config = setup.config
        self._config, self._device, self._share = config, setup.device, setup.share
        # Of ranks that share each sample's tokens one writes.
        self._writes = setup.ranks.rank % setup.sharing.sequence == 0
        settings = from_config.measurement_settings(config, from_config.grid(config, index))
        records = heldout.heldout_records(index, settings)[: config.eval.samples]
        reader = Reader(root, index, seed=settings.seed, request=heldout.read_request(settings))
        self._samples = [(record, collate([reader.sample(Address(record.key, 0))])) for record in records]

    def generate(self, transformer: Transformer, folder: Path) -> list[Clip]:
        """Generates one mp4 in `folder` per held-out clip. Returns the clips of all ranks, in their order.

        The decoders come after the last pass of the transformer, and go before the training goes on: a budget that the
        run fills holds them only where the plan has left room (`encoder_plan.between_steps_gib`).
        """
        made: list[tuple[Record, Pair]] = []
        with heldout.undisturbed(transformer):
            for (record, batch), counts in self._share.turns(self._samples):
                latents = self._generated(transformer, batch)
                if counts and self._writes:
                    made.append((record, latents))
        if made:
            decoder = encoder_builder.decoder(self._config, self._device)
            for record, latents in made:
                media.write_mp4(_path(folder, record), *media.decode(decoder, *latents), record.fps)
        return [Clip(f"{record.speaker}: {record.caption}", _path(folder, record)) for record, _ in self._samples]

    def references(self, folder: Path) -> list[Clip]:
        """Decodes the references of the clips to mp4 files in `folder`."""
        if not self._samples or not self._config.mode.references:
            return []
        clips: list[Clip] = []
        decoder = encoder_builder.decoder(self._config, self._device)
        for record, batch in self._samples:
            for condition in self._config.mode.references:
                latent = batch.references[condition.name][0]
                parts = (latent, None) if condition.stream is ModalityName.video else (None, latent)
                path = folder / f"{record.key}-{condition.name.replace('/', '-')}.mp4"
                media.write_mp4(path, *media.decode(decoder, *parts), record.fps)
                clips.append(Clip(f"{record.speaker}: {condition.name}", path))
        return clips

    def _generated(self, transformer: Transformer, batch: Batch) -> Pair:
        """The latents of a clip, (C, F, H, W) of the video and (c, T, f) of the sound."""
        mode, s = self._config.mode, self._config.sample
        draws = conditions.draw(batch, mode, sigma.SigmaDistribution(), s.seed, sigma=1.0)
        inputs = conditions.assemble(transfer.batch_to(batch, self._device), references.always_open(mode), draws)
        guidance = Guidance(modality_scale=s.modality_scale)
        start = sampler.SamplerInputs(video=inputs.video, audio=inputs.audio, gates=references.gates(mode, batch))
        levels = sigma.inference_schedule(s.steps)
        video, audio = sampler.sample(transformer, start, levels, guidance)
        clip = sound = None
        if video is not None and batch.video_latent is not None:
            sizes: Sequence[int] = batch.video_latent.shape[2:]
            clip = codecs.video_grid(video[:, : batch.video_latent[0, 0].numel()], sizes[0], sizes[1], sizes[2])[0]
        if audio is not None and batch.audio_latent is not None:
            sound = codecs.audio_grid(audio[:, : batch.audio_latent.shape[2]], batch.audio_latent.shape[1])[0]
        return clip, sound


def _path(folder: Path, record: Record) -> Path:
    return folder / f"{record.key}.mp4"
