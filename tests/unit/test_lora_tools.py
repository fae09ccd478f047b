"""LoRA files made of LoRA files: products add up, streams part, ranks shrink, and every program's names are read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ltx_train.contracts import DataError
from ltx_train.model import adapter, export, load_transformer, lora_file, lora_formats, lora_tools
from ltx_train.model.checkpoint import RandomWeights
from ltx_train.model.loaders import build_transformer, transformer_original_name
from ltx_train.model.lora_tools import Stream
from ltx_train.model.transformer import Pair, Transformer
from tests.conftest import TINY, command
from tests.golden.support import modality, read

TARGETS = ("to_q", "to_out.0", "ff.net.2", "audio_ff.net.0.proj")


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    """Of an adapter of rank 3 on layers of all streams."""
    model = load_transformer(TINY)
    lora = adapter.Lora(rank=3, alpha=3, dropout=0.0, targets=TARGETS)
    adapter.attach(model, lora, 0)
    generator = torch.Generator().manual_seed(5)
    weights = {n: torch.randn(p.shape, generator=generator) * 0.2 for n, p in adapter.lora_parameters(model).items()}
    named = export.lora_tensors(weights, lora, torch.float32)
    return {name.removeprefix(lora_file.LORA_PREFIX): tensor for name, tensor in named.items()}


def output(tensors: dict[str, Tensor], strength: float = 1.0) -> Pair:
    model = load_transformer(TINY)
    if tensors:
        export.bind(model, tensors, strength)
    return run(model)


def run(model: Transformer) -> Pair:
    inputs = read("transformer_c_audio_ref_negative")
    with torch.no_grad():
        return model.eval()(modality(inputs, "video"), modality(inputs, "audio"))


def far(first: Pair, second: Pair) -> float:
    return max(
        float((a - b).abs().max()) for a, b in zip(first, second, strict=True) if a is not None and b is not None
    )


def products(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    modules = {lora_file.module_of(name) for name in tensors}
    return {m: tensors[f"{m}.lora_B.weight"].double() @ tensors[f"{m}.lora_A.weight"].double() for m in modules}


@pytest.mark.parametrize(
    ("module", "stream"),
    [
        ("transformer_blocks.0.attn1.to_q", Stream.video), ("transformer_blocks.47.audio_attn2.to_k", Stream.audio),
        ("transformer_blocks.3.audio_to_video_attn.to_v", Stream.bridge), ("audio_proj_out", Stream.audio),
        ("transformer_blocks.3.video_to_audio_attn.to_out.0", Stream.bridge), ("proj_in", Stream.video),
        ("av_cross_attn_video_scale_shift.linear", Stream.bridge),
        ("transformer_blocks.1.audio_ff.net.2", Stream.audio),
    ],
)  # fmt: skip
def test_every_layer_has_a_stream(module: str, stream: Stream) -> None:
    assert lora_tools.stream_of(module) is stream


def test_audio_one_and_bridge_zero_is_the_audio_part_alone(tensors: dict[str, Tensor]) -> None:
    parts = lora_tools.split(tensors)
    assert set(parts) == set(Stream)
    assert sum(map(len, parts.values())) == len(tensors)
    alone = lora_tools.scaled(tensors, {Stream.audio: 1.0, Stream.bridge: 0.0, Stream.video: 0.0})
    assert far(output(alone), output(parts[Stream.audio])) < 1e-6
    assert far(output(alone), output(tensors)) > 1e-3
    half = lora_tools.scaled(tensors, dict.fromkeys(Stream, 0.5))
    assert far(output(half), output(tensors, 0.5)) < 1e-5


def test_all_ranks_are_the_identity_and_fewer_lose_what_they_say(tensors: dict[str, Tensor]) -> None:
    same, lost = lora_tools.resized(tensors, 3)
    assert lost < 1e-6
    assert far(output(same), output(tensors)) < 1e-5
    larger, _ = lora_tools.resized(tensors, 64)
    assert {t.shape[0] for n, t in larger.items() if ".lora_A." in n} == {3}, "no rank is made up"
    small, lost = lora_tools.resized(tensors, 1)
    before, after = products(tensors), products(small)
    error = sum(float((before[m] - after[m]).square().sum()) for m in before)
    whole = sum(float(p.square().sum()) for p in before.values())
    assert lost == pytest.approx((error / whole) ** 0.5, rel=1e-5)
    assert 0.1 < lost < 0.9


def test_a_merge_is_the_sum_of_the_products(tensors: dict[str, Tensor]) -> None:
    audio = lora_tools.split(tensors)[Stream.audio]
    both = lora_tools.merged([(tensors, 0.5), (audio, 2.0)])
    expected, part = products(tensors), products(audio)
    for module, product in products(both).items():
        wanted = 0.5 * expected[module] + (2 * part[module] if module in part else 0)
        torch.testing.assert_close(product, wanted, atol=1e-6, rtol=1e-5)
    assert lora_file.unbound_keys(both, load_transformer(TINY)) == []


def test_a_fine_tune_minus_its_base_is_the_adapter_that_was_merged(tensors: dict[str, Tensor]) -> None:
    base, tuned = load_transformer(TINY), load_transformer(TINY)
    export.merge(tuned, tensors)
    names = {n: m for n, m in base.named_modules() if isinstance(m, torch.nn.Linear)}
    pairs = [(n, m.weight, tuned.get_submodule(n).weight) for n, m in names.items()]
    made, lost = lora_tools.extracted(pairs, 3, torch.float32)
    assert lost < 1e-4
    assert {lora_file.module_of(n) for n in made} == {lora_file.module_of(n) for n in tensors}
    assert far(output(made), output(tensors)) < 1e-4
    with pytest.raises(DataError, match="do not differ"):
        lora_tools.extracted([(n, m.weight, m.weight) for n, m in names.items()], 3, torch.float32)


def test_a_large_difference_is_projected_as_exactly_as_it_needs() -> None:
    """Against the whole decomposition, of a matrix with a falling spectrum."""
    generator = torch.Generator().manual_seed(3)
    u, v = (torch.linalg.qr(torch.randn(400, 400, generator=generator)).Q for _ in range(2))
    difference = u @ torch.diag(0.9 ** torch.arange(400)) @ v
    base = torch.zeros(400, 400)
    made, lost = lora_tools.extracted([("ff.net.2", base, difference)], 8, torch.float32)
    values = torch.linalg.svdvals(difference.double())
    best = float(values[8:].square().sum() / values.square().sum()) ** 0.5
    assert lost == pytest.approx(best, rel=1e-3)
    error = (difference.double() - products(made)["ff.net.2"]).norm() / difference.double().norm()
    assert float(error) == pytest.approx(best, rel=1e-3)


def test_magnitudes_become_a_plain_file_with_its_error(tensors: dict[str, Tensor]) -> None:
    model = load_transformer(TINY)
    module = next(m for m in products(tensors) if m.endswith("attn1.to_q"))
    weight = model.get_submodule(module).weight
    one = {n: t for n, t in tensors.items() if n.startswith(module)}
    one[f"{module}.dora_scale"] = 1.1 * torch.linalg.vector_norm(weight.float(), dim=1, keepdim=True)
    for change in (lambda: lora_tools.resized(one, 2), lambda: lora_tools.merged([(one, 1.0)]),
                   lambda: lora_tools.scaled(one, dict.fromkeys(Stream, 0.5))):  # fmt: skip
        with pytest.raises(DataError, match=r"DoRA's magnitudes.*lora\.do=plain"):
            change()
    made, lost = lora_tools.plain(one, {module: weight}, min(weight.shape))
    assert lost < 1e-5
    assert far(output(made), output(one)) < 1e-4
    assert lora_tools.plain(one, {module: weight}, 1)[1] > 0.1


@pytest.mark.parametrize("kind", lora_formats.PREFIXES)
def test_every_format_is_read_back(kind: str, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    written = lora_formats.write(tmp_path / "a.safetensors", tensors, {"trigger": "X"}, kind)
    again, metadata = lora_file.read_lora(written)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)
    assert metadata["trigger"] == "X"


def test_peft_itself_loads_its_folder(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    folder = lora_formats.write(tmp_path / "a.safetensors", tensors, {}, "peft")
    model = load_transformer(TINY)
    inject_adapter_in_model(LoraConfig.from_pretrained(str(folder)), model)
    weights = {n.removeprefix("base_model.model."): t for n, t in load_peft_weights(str(folder), device="cpu").items()}
    told = set_peft_model_state_dict(model, weights)
    assert not told.unexpected_keys
    assert far(run(model), output(tensors)) < 1e-5
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "lora_alpha": 6}))
    assert far(output(lora_file.read_lora(folder)[0]), output(tensors, 2.0)) < 1e-4
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(DataError, match="no readable adapter_config"):
        lora_file.read_lora(folder)


def test_kohyas_names_and_alphas_are_read(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    theirs: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module, half = lora_file.module_of(name), "lora_down" if ".lora_A." in name else "lora_up"
        key = f"lora_unet_{module.replace('.', '_')}"
        theirs[f"{key}.{half}.weight"] = tensor
        theirs[f"{key}.alpha"] = torch.tensor(1.5)
    save_file(theirs, tmp_path / "k.safetensors")
    again, _ = lora_file.read_lora(tmp_path / "k.safetensors")
    assert again.keys() == tensors.keys()
    assert far(output(again), output(tensors, 0.5)) < 1e-5
    prefixed = {f"transformer.{name}": tensor for name, tensor in tensors.items()}
    save_file(prefixed, tmp_path / "d.safetensors")
    assert lora_file.read_lora(tmp_path / "d.safetensors")[0].keys() == tensors.keys()


def test_the_command_makes_files_of_files(
    tensors: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    lora_formats.write(file, tensors, {"trigger": "X", "step": "7"}, "comfyui")
    given = (f"lora.files=[{file}]", f"lora.out={out}")
    assert command("lora", *given, "lora.do=split") == 0
    assert {p.name for p in tmp_path.glob("b-*")} == {f"b-{stream.value}.safetensors" for stream in Stream}
    assert command("lora", *given, "lora.do=resize", "lora.rank=1") == 0
    assert "% of the norm is lost" in capsys.readouterr().out
    assert command("lora", *given, "lora.do=resize", "model.path=absent") == 0, "it needs no base"
    assert command("lora", *given, "lora.do=plain", "model.path=absent") == 78
    assert lora_file.read_lora(out)[1].keys() >= {"trigger", "trainer"}
    assert "step" not in lora_file.read_lora(out)[1], "it is no step of that run any more"
    assert command("lora", *given, "lora.do=scale", "lora.strength_of={bridge: 0}") == 0
    assert not any("_to_" in lora_file.module_of(name).split(".")[2] for name in lora_file.read_lora(out)[0])
    assert (
        command("lora", f"lora.files=[{file},{out}]", "lora.do=merge", "lora.strengths=[1,-1]", f"lora.out={out}") == 0
    )
    left = products(lora_file.read_lora(out)[0])
    bridges = {m for m in left if lora_tools.stream_of(m) is Stream.bridge}
    assert max(float(left[m].abs().max()) for m in left.keys() - bridges) < 1e-5
    assert max(float(left[m].abs().max()) for m in bridges) > 1e-2
    assert command("lora", f"lora.files=[{file},{out}]", "lora.do=split") == 77
    assert command("lora", *given, "lora.do=scale", "lora.strength_of={brigde: 0}") == 77
    assert "give video, audio, bridge" in capsys.readouterr().err
    assert command("lora", "lora.files=[gone.safetensors]") == 78
    assert command("lora") == 77
    foreign = tmp_path / "mine.safetensors"
    save_file({"x": torch.ones(1)}, foreign)
    assert command("lora", f"lora.files=[{file}]", f"lora.out={foreign}") == 77
    assert load_file(foreign).keys() == {"x"}


def test_norms_and_likeness_are_those_of_the_products(tensors: dict[str, Tensor]) -> None:
    whole = products(tensors)
    for module, norm in lora_tools.norms(tensors).items():
        assert norm == pytest.approx(float(whole[module].norm()), rel=1e-6)
    blocks = lora_tools.norms_by_block(tensors)
    inside = sum(
        norm**2 for module, norm in lora_tools.norms(tensors).items() if module.startswith("transformer_blocks.")
    )
    assert sum(norm**2 for stream in blocks.values() for norm in stream.values()) == pytest.approx(inside, rel=1e-9)
    assert lora_tools.likeness(tensors, tensors) == {stream: pytest.approx(1) for stream in Stream}
    turned = {n: -t if ".lora_B." in n else t for n, t in tensors.items()}
    assert lora_tools.likeness(tensors, turned) == {stream: pytest.approx(-1) for stream in Stream}
    audio = lora_tools.split(tensors)[Stream.audio]
    assert lora_tools.likeness(tensors, audio) == {Stream.audio: pytest.approx(1)}


def test_inspect_looks_into_the_bases_own_file(
    tensors: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A base with one tensor binds nothing, whatever its configuration describes."""
    file, base = tmp_path / "a.safetensors", tmp_path / "base.safetensors"
    lora_formats.write(file, tensors, {}, "comfyui")
    asked = ("inspect", f"inspect.file={file}", f"inspect.compare={file}")
    assert command(*asked, f"model.path={TINY}") == 0
    shown = capsys.readouterr().out
    assert "audio: cosine with" in shown
    assert "+1.000" in shown
    assert "bridge: " in shown
    page = tmp_path / "norms.html"
    assert command(*asked, f"model.path={TINY}", f"inspect.page={page}") == 0
    capsys.readouterr()
    assert "data:image/svg+xml" in page.read_text()
    assert all(f"<td>{stream}</td>" in page.read_text() for stream in Stream)
    page.write_text("mine")
    assert command(*asked, f"model.path={TINY}", f"inspect.page={page}") == 77
    assert page.read_text() == "mine"
    capsys.readouterr()
    with safe_open(TINY, "pt") as handle:
        metadata, one = handle.metadata(), next(iter(handle.keys()))
        save_file({one: handle.get_tensor(one)}, base, metadata)
    assert command(*asked, f"model.path={base}") == 78
    assert "of the weights that the LoRA changes" in capsys.readouterr().err


def test_every_layer_binds_by_comfyuis_rule() -> None:
    """It knows a checkpoint's weights as `diffusion_model.<name>.weight`, and a LoRA's layer as what stands before
    `.lora_A.weight`, or with underscores behind `lora_unet_`."""
    model = build_transformer(RandomWeights("ltx2_3_22b"))
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    originals = [transformer_original_name(f"{name}.weight").removeprefix("model.") for name in linear]
    known = {name.removesuffix(".weight") for name in originals}
    assert len(known) == len(linear) > 1600
    lora = adapter.Lora(rank=1, alpha=1, dropout=0, targets=())
    for name in linear:
        (key,) = export.lora_tensors({f"{name}.lora_A.weight": torch.ones(1, 1)}, lora, torch.float32)
        assert key.removesuffix(".lora_A.weight") in known
    underscored = {f"lora_unet_{n.removeprefix('diffusion_model.').replace('.', '_')}": n for n in known}
    for kohya, name in underscored.items():
        plain = lora_file._plain_name(f"{kohya}.lora_down.weight")
        if name.split(".")[1] == "transformer_blocks":
            assert plain == f"{name.removeprefix('diffusion_model.')}.lora_A.weight"
