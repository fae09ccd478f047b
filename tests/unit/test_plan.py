"""The planner: its arithmetic against measured peaks, its choices, and what it says when nothing fits."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest

from ltx_train import config
from ltx_train.assembly import memory_plan, mends, model_source, resolve
from ltx_train.assembly.memory_plan import Room
from ltx_train.commands import plan as plan_command
from ltx_train.contracts import UserError
from ltx_train.memory.blocks.keep import Keep, arrange
from ltx_train.memory.planning import search
from ltx_train.memory.planning.cards import CARDS, card_by_name, card_of_device
from ltx_train.memory.planning.duration import model_flops
from ltx_train.memory.planning.footprint import predict
from ltx_train.memory.planning.search import PlanConstraints, StepNeed
from ltx_train.memory.planning.sizes import MemoryChoice, ModelSizes, TrainedWeights, Workload, sizes
from ltx_train.model import presets
from ltx_train.model.checkpoint import RandomWeights
from ltx_train.model.loaders import build_transformer
from ltx_train.updates.kinds import OPTIMIZERS
from tests.conftest import REPOSITORY, command

PEAKS: list[dict[str, Any]] = json.loads((REPOSITORY / "docs/performance/peaks.json").read_text())
WORK_A = Workload(batch=1, video=4096, audio=209, text=1024)
TRAINED_A = TrainedWeights(parameters=144_703_488, moment_bytes=OPTIMIZERS["adamw"].moment_bytes)
EIGHT_BIT = replace(TRAINED_A, moment_bytes=OPTIMIZERS["adamw8bit"].moment_bytes)
H200 = card_by_name("H200")
REAL = ("experiment=voice_reference_22b", "data.source=x", "data.root=y")


@pytest.fixture(scope="module")
def size() -> ModelSizes:
    return sizes(build_transformer(RandomWeights("ltx2_3_22b")))


def _over(peak: dict[str, Any], size: ModelSizes) -> float:
    """By what share the prediction is above what was measured."""
    chosen = {**peak["choice"], "keep": Keep(peak["choice"].get("keep", "inputs"))}
    work = Workload(batch=1, video=peak["video"], audio=peak["audio"], text=peak["text"])
    trained = TrainedWeights(
        parameters=peak["trained"], moment_bytes=OPTIMIZERS[peak.get("optimizer", "adamw")].moment_bytes
    )
    return predict(size, work, trained, MemoryChoice(**chosen), card=H200).gib / peak["reserved_gib"] - 1


@pytest.mark.parametrize("peak", PEAKS, ids=lambda p: f"{p['work']}-{p['reserved_gib']}")
def test_the_predicted_peak_is_within_5_percent_of_measured_ones(peak: dict[str, Any], size: ModelSizes) -> None:
    """But for runs whose inputs wait on the host: some of those take less than is predicted, by up to 13 %."""
    assert -0.05 <= _over(peak, size) <= (0.13 if peak["choice"].get("offload_inputs") else 0.05)


def test_nearly_all_predicted_peaks_are_within_5_percent(size: ModelSizes) -> None:
    assert (sum(abs(_over(peak, size)) <= 0.05 for peak in PEAKS), len(PEAKS)) == (43, 46)


def test_sizes_of_the_real_model(size: ModelSizes) -> None:
    elements = sum(layer.inputs * layer.outputs for layer in size.linears)
    assert size.layers * (elements + size.block_rest) + size.outside == 18_988_838_144
    assert len(size.linears) == 28
    assert {layer.name for layer in size.linears if layer.rows == "text"} == {
        "attn2.to_k", "attn2.to_v", "audio_attn2.to_k", "audio_attn2.to_v",
    }  # fmt: skip
    # By hand, TFLOP a block: 2.23 of products forward and again for gradients, 0.07 for text, 0.35 of attention.
    assert model_flops(size, WORK_A) / 1e12 == pytest.approx(48 * (2 * 2.23 + 0.07 + 3.5 * 0.35), rel=0.02)


def test_tokens_and_trained_weights_come_from_the_configuration() -> None:
    needed = memory_plan.need(config.compose_config(list(REAL)))
    assert (needed.work, needed.trained) == (WORK_A, EIGHT_BIT)
    larger = config.compose_config([*REAL, "data.buckets=[512x512x25,768x512x121]", "optim.batch_size=2"])
    assert resolve.workload(larger) == Workload(batch=2, video=6144, audio=209, text=1024)
    silent = config.compose_config([*REAL, "experiment=talking_head_22b", "mode.audio=absent", "adapter=attention"])
    assert resolve.workload(silent).audio == 0
    full = memory_plan.need(config.compose_config([*REAL, "experiment=talking_head_22b", "adapter=full"]))
    assert full.trained == TrainedWeights(parameters=18_988_838_144, moment_bytes=8.0, full=True)


@pytest.mark.parametrize("budget", [6, 8, 12, 22, 40, 80, 139])
@pytest.mark.parametrize("quantize", ["int8", "int4", "none", "auto"])
def test_a_plan_stays_within_its_budget_and_more_memory_is_never_slower(
    budget: float, quantize: str, size: ModelSizes
) -> None:
    options = ("none", "int8") if quantize == "auto" else (quantize,)
    need = StepNeed(size=size, work=WORK_A, trained=EIGHT_BIT)
    found = search.choose(need, PlanConstraints(quantize=options), H200, budget)
    wider = search.choose(need, PlanConstraints(quantize=options), H200, budget + 4)
    assert found is not None or budget < 10
    assert wider is not None
    if found is not None:
        assert found.footprint.gib <= budget
        assert wider.footprint.step_s <= found.footprint.step_s * 1.06
        assert found.choice.keep_everything + found.choice.stream_blocks <= size.layers


def test_what_is_set_is_not_planned(size: ModelSizes) -> None:
    fixed = PlanConstraints(
        quantize=("int8",), keep=Keep.inputs, keep_everything=0, stream_blocks=48, offload_inputs=False, graphs=False
    )
    found = search.choose(StepNeed(size=size, work=WORK_A, trained=TRAINED_A), fixed, H200, 140)
    assert found is not None
    assert found.choice == MemoryChoice(quantize="int8", stream_blocks=48)
    snapshot = 12 * TRAINED_A.parameters / 2**30
    assert found.footprint.host_gib == pytest.approx(17.3 + snapshot, abs=0.1)
    assert (
        search.choose(StepNeed(size=size, work=WORK_A, trained=TRAINED_A), replace(fixed, host_gib=16), H200, 140)
        is None
    )


@pytest.mark.parametrize("budget", [8, 12, 22, 139])
def test_the_plan_lets_resident_blocks_keep_everything(budget: float, size: ModelSizes) -> None:
    """A streamed block could too, but a quantized one would then keep its dequantized weights."""
    need = StepNeed(size=size, work=WORK_A, trained=EIGHT_BIT)
    plan = search.choose(need, PlanConstraints(quantize=("int8",), keep=Keep.everything), H200, budget)
    assert (plan is not None) == (budget == 139)
    assert plan is None or plan.choice.stream_blocks == 0
    free = search.choose(need, PlanConstraints(quantize=("int8",)), H200, budget)
    assert free is not None
    assert free.choice.keep_everything + free.choice.stream_blocks <= size.layers


@pytest.mark.parametrize("keep", [None, Keep.inputs, Keep.everything])
def test_explicit_counts_of_blocks_are_kept_as_they_are(keep: Keep | None, size: ModelSizes) -> None:
    """Together they exceed the number of blocks: some streamed blocks keep everything, and the prediction counts it."""
    need = StepNeed(size=size, work=WORK_A, trained=EIGHT_BIT)
    fixed = PlanConstraints(quantize=("int8",), keep=keep, keep_everything=40, stream_blocks=24, graphs=False)
    plan = search.choose(need, fixed, H200, 139)
    assert plan is not None
    everything = size.layers if keep is Keep.everything else 40
    assert (plan.choice.keep_everything, plan.choice.stream_blocks) == (everything, 24)
    fewer = search.choose(need, replace(fixed, keep=Keep.inputs, keep_everything=10), H200, 139)
    assert fewer is not None
    assert fewer.footprint.gib < plan.footprint.gib


def test_precision_is_given_up_only_for_speed(size: ModelSizes) -> None:
    need = StepNeed(size=size, work=WORK_A, trained=TRAINED_A)
    roomy, tight = (
        search.choose(need, PlanConstraints(quantize=("none", "int8")), H200, budget) for budget in (139, 12)
    )
    assert roomy is not None
    assert tight is not None
    assert (roomy.choice.quantize, tight.choice.quantize) == ("none", "int8")


def test_a_second_kind_of_block_is_worth_its_compilation(size: ModelSizes) -> None:
    """In 22 GiB one block that keeps everything would save 0.2 % of a step; in 40 GiB four of them save 1.4 %."""
    need = StepNeed(size=size, work=WORK_A, trained=TRAINED_A)

    def kept(budget: float, **constraints: Any) -> int:
        found = search.choose(need, PlanConstraints(**constraints), H200, budget)
        assert found is not None
        return found.choice.keep_everything

    products = {"quantize": ("float8",), "compute": "fp8"}
    assert kept(22, **products) == 0
    assert kept(22, **products, compiled=False) > 0
    assert kept(40) > 0


def test_blocks_that_keep_everything_are_resident() -> None:
    made = arrange(48, Keep.attention, keep_everything=12, stream_blocks=36, offload_inputs=True)
    assert len(made.streamed) == 36
    kept = {i for i, keep in enumerate(made.keep) if keep is Keep.everything}
    assert kept == set(range(48)) - set(made.streamed)
    assert set(made.offloaded) == set(made.streamed)
    assert arrange(3, Keep.inputs, keep_everything=0, stream_blocks=9, offload_inputs=False).streamed == [0, 1, 2]
    assert (
        arrange(3, Keep.inputs, keep_everything=2, stream_blocks=3, offload_inputs=False).keep.count(Keep.everything)
        == 2
    )


def test_cards_by_name() -> None:
    assert card_by_name("rtx 4090").memory_gib == 24
    assert card_by_name("NVIDIA A100").memory_gib == 80
    assert {card_by_name(card.name) for card in CARDS} == set(CARDS)
    with pytest.raises(UserError, match="RTX 5090"):
        card_by_name("Voodoo 2")
    assert card_of_device("NVIDIA H200", 139.8).bf16_tflops == 989
    assert card_of_device("NVIDIA GeForce RTX 4090", 23.6).memory_gib == 23.6
    assert card_of_device("Tesla T4", 15).memory_gib == 15
    assert {card_of_device(f"NVIDIA GeForce {card.name}", card.memory_gib).bf16_tflops == card.bf16_tflops
            for card in CARDS} == {True}  # fmt: skip
    assert card_by_name("RTX 5070").memory_gib == 12
    assert card_of_device("NVIDIA GeForce RTX 5070", 11.9).bf16_tflops == card_by_name("RTX 5070").bf16_tflops
    assert card_of_device("NVIDIA GeForce RTX 4060 Ti", 15.9).host_gbs == 12
    assert card_of_device("NVIDIA A100-SXM4-80GB", 79.3).memory_gbs == card_by_name("A100 80GB").memory_gbs
    assert {12, 16, 24, 32, 48} <= {card.memory_gib for card in CARDS}


def test_a_slower_link_and_little_host_memory_are_respected(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("plan", "experiment=voice_reference_22b", "plan.card=RTX 4070")
    steps: list[float] = []
    for more in ((), ("plan.host_gbs=2",), ("plan.host_gib=8",)):
        code = command(*words, *more)
        shown = capsys.readouterr()
        assert code == (77 if more == ("plan.host_gib=8",) else 0), shown.err
        steps += [float(s) for s in re.findall(r"about ([\d.]+) s a step;", shown.out)]
    assert steps[1] > 1.2 * steps[0], "weights of a 12 GB card come from the host in every step"


RUNS_THAT_DO_NOT_FIT = {
    "frozen base": ([*REAL, "experiment=talking_head_22b", "memory=recompute"], "RTX 4090", 23.0),
    "full fine-tune, ZeRO-3": (
        [
            *REAL, "experiment=talking_head_22b", "adapter=full", "memory=recompute", "optim=adamw", "strategy=zero3",
            "strategy.devices=4",
        ],
        "H100", 79.0,
    ),
    "adapter, ZeRO-1": (
        [*REAL, "experiment=talking_head_22b", "optim=adamw", "strategy=zero1", "strategy.devices=2"], "RTX 4090", 8.0,
    ),
}  # fmt: skip


def test_a_command_that_trains_nothing_is_offered_no_change_of_training() -> None:
    made = config.compose_config(["experiment=voice_reference_22b", "model.weights=random", "memory.quantize=none"])
    room = Room(card=card_by_name("RTX 4090"), budget_gib=2.0, host_gib=None)
    text = memory_plan.refusal(made, room, training=False)
    assert text.startswith("this command does not fit")
    assert "optim." not in text
    assert "adapter.rank" not in text


@pytest.mark.parametrize("name", RUNS_THAT_DO_NOT_FIT)
def test_a_refusal_offers_changes_that_are_valid_and_fit(name: str) -> None:
    """Each is accepted by the rules, fits, is offered once, and holds no other one that is enough by itself."""
    overrides, card, budget = RUNS_THAT_DO_NOT_FIT[name]
    room = Room(card=card_by_name(card), budget_gib=budget, host_gib=None)
    made = config.compose_config(overrides)
    assert memory_plan.plan_for(made, room) is None
    text = memory_plan.refusal(made, room)
    offered = [line.split("   ")[0].split() for line in text.splitlines()[2:]]
    assert offered
    for change in offered:
        plan = memory_plan.plan_for(config.compose_config([*overrides, *change]), room)
        assert plan is not None, change
    for change in offered:
        assert not any(set(other) <= set(change) for other in offered if other is not change), offered
    costs = [float(s) for s in re.findall(r"about ([\d.]+) s", text)]
    changes_result = [any(word.startswith(("adapter.rank", "data.buckets")) for word in change) for change in offered]
    assert any(changes_result) or costs == sorted(costs)
    assert "needs at least" in text


def test_a_run_that_cannot_fit_is_refused_before_it_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("experiment=talking_head_22b", "model.weights=random", "memory.budget_gib=3", "data.source=x")
    assert command("bench", *arguments) == 77
    assert "does not fit into 3.0 GiB" in capsys.readouterr().err


def test_plan_prints_a_card_in_detail_and_all_in_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("plan", "experiment=voice_reference_22b", "plan.card=RTX 4090") == 0
    shown = capsys.readouterr().out
    assert "predicted peak" in shown
    step_s, *offered = (float(s) for s in re.findall(r"about ([\d.]+) s a step", shown))
    assert len(offered) == 2
    assert max(offered) < 0.9 * step_s
    assert "s a step with memory.compute=fp8 memory.quantize=float8" in shown
    assert "held-out loss -0.01 ± 0.14 %" in shown
    fixed = next(line for line in shown.splitlines() if line.startswith("memory.quantize"))
    made = config.compose_config([*REAL, *fixed.split()])
    assert resolve.plan_constraints(made, None).stream_blocks is not None
    assert command("plan", "experiment=voice_reference_22b") == 0
    shown = capsys.readouterr().out
    assert all(card.name in shown for card in CARDS)
    assert {card.memory_gib for card in CARDS} > {12, 16, 24}
    assert "cost" not in shown
    assert command("plan", "experiment=voice_reference_22b", "plan.price_per_hour=2.5", "optim.steps=3600") == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if "H200" in line)
    step_s, hours, cost = (float(re.findall(r"[\d.]+", cell)[0]) for cell in row.split("│")[4:7])
    assert hours == pytest.approx(step_s, abs=0.06), "as many steps as an hour has seconds"
    assert cost == pytest.approx(2.5 * step_s, abs=0.02)
    assert command("plan", "experiment=voice_reference_22b", "plan.card=RTX 4090", "memory.budget_gib=2") == 77
    capsys.readouterr()
    assert command("plan", "experiment=voice_reference_22b", "plan.card=RTX 3090") == 0
    shown = capsys.readouterr().out
    assert "s a step with memory.compute=int8 memory.quantize=int8" in shown
    assert "fp8" not in shown, "a card without float8"
    assert command("plan", "experiment=voice_reference_22b", "plan.card=RTX 4090", "memory=fp8") == 0
    assert "s a step with" not in capsys.readouterr().out


def test_settled_settings_are_plain_without_a_gpu() -> None:
    made, planned = memory_plan.settle(config.compose_config(["memory.quantize=auto"]))
    assert planned is None
    assert (made.memory.quantize, made.memory.keep, made.memory.stream_blocks) == ("none", "inputs", 0)
    made, planned = memory_plan.settle(config.compose_config(["memory.budget_gib=20"]))
    assert planned is not None
    assert made.memory.keep is not None


def test_running_out_of_memory_says_what_the_refusal_says() -> None:
    made = config.compose_config([*REAL, "memory.budget_gib=22"])
    text = memory_plan.out_of_memory(made, memory_plan.settle(made)[1])
    assert "ran out of memory" in text
    assert "planned: " in text
    assert "memory.budget_gib=" in text


@pytest.mark.parametrize(
    ("name", "devices", "expected"),
    [
        # In GiB: weights whole on the device; shares of them; the ring; masters and moments; gradients.
        ("zero3", 8, (0.8, 4.3, 2.15, 26.5, 8.8 + 2.87)),
        ("zero2", 8, (35.4, 0.0, 0.0, 26.5, 8.8 + 2.87)),
        ("zero1", 4, (35.4, 0.0, 0.0, 53.1, 17.7 + 2.15 + 35.4)),
    ],
)
def test_all_weights_in_shares(name: str, devices: int, expected: tuple[float, ...]) -> None:
    """By hand, of 18.99 billion parameters: 2 bytes each in bfloat16, 12 of state and 4 of summed gradients shared."""
    made = config.compose_config(
        [*REAL, "adapter=full", "optim=adamw", "memory=recompute", f"strategy={name}", f"strategy.devices={devices}"]
    )
    found = memory_plan.plan_for(made, Room(card=H200, budget_gib=300.0, host_gib=None))
    assert found is not None
    parts = {part: size / 2**30 for part, size in found.footprint.parts.items()}
    names = (
        "weights", "slices of streamed weights", "ring of streamed weights", "trained weights and moments", "gradients",
    )  # fmt: skip
    assert [parts[part] for part in names] == pytest.approx(expected, abs=0.15)


def test_shares_in_host_memory_leave_the_device() -> None:
    """12 bytes of state, 4 of summed gradients and 2 that are on their way, of 18.99 billion over four; and 12 that a
    save copies, which is all where the state is in files."""
    full = [*REAL, "adapter=full", "optim=adamw", "memory=recompute", "strategy.devices=4"]
    here, away, files = (
        memory_plan.plan_for(config.compose_config([*full, *way]), Room(card=H200, budget_gib=139.0, host_gib=500.0))
        for way in (("strategy=zero3",), ("strategy=zero3_offload",), ("strategy=zero3", "strategy.offload=/nvme/ltx"))
    )
    assert here is not None
    assert away is not None
    assert files is not None
    assert here.footprint.gib - away.footprint.gib == pytest.approx(4.75e9 * 16 / 2**30, rel=0.01)
    assert away.footprint.host_gib == pytest.approx(4.75e9 * 30 / 2**30, rel=0.01)
    assert away.footprint.step_s - here.footprint.step_s == pytest.approx(4.75, abs=0.2)
    assert files.footprint.gib == away.footprint.gib
    # Four devices share a disk that reads and writes 12 bytes of each weight.
    assert files.footprint.step_s - here.footprint.step_s == pytest.approx(24 * 18.99 / 1.8, rel=0.02)
    assert here.footprint.host_gib == files.footprint.host_gib == pytest.approx(4.75e9 * 12 / 2**30, rel=0.01)


@pytest.mark.parametrize(("kept", "graphs", "measured"), [(0, False, 87.2), (28, True, 128.5), (36, True, 138.0)])
def test_the_measured_peaks_of_a_full_fine_tune_on_four_devices(kept: int, graphs: bool, measured: float) -> None:
    """docs/performance/several.json, in GiB: allocated where passes are launched, otherwise reserved."""
    made = config.compose_config(
        [
            *REAL, "adapter=full", "optim=adamw", "memory=recompute", "strategy=zero3", "strategy.devices=4",
            f"memory.keep_everything={kept}", f"memory.graphs={graphs}",
        ]
    )  # fmt: skip
    found = memory_plan.plan_for(made, Room(card=H200, budget_gib=180.0, host_gib=None))
    assert found is not None
    assert found.footprint.gib == pytest.approx(measured, rel=0.05)


WORK_A_SETTINGS = (
    "experiment=voice_reference_22b", "model.weights=random", "adapter.dropout=0", "optim=adamw", "memory=recompute",
)  # fmt: skip
FULL_A = (*WORK_A_SETTINGS, "adapter=full", "memory=recompute")


@pytest.mark.parametrize(
    ("settings", "machines", "blocks", "reserved_gib"),
    [
        ((*WORK_A_SETTINGS, "strategy=deepspeed_zero3", "strategy.devices=2"), 1, 48, 26.01),
        ((*WORK_A_SETTINGS, "strategy=zero3"), 2, 48, 41.04),
        ((*FULL_A, "strategy=deepspeed_zero3", "strategy.devices=2"), 1, 20, 87.25),
        ((*FULL_A, "strategy=zero3"), 2, 4, 30.73),
        ((*FULL_A, "strategy=zero3", "strategy.devices=2"), 2, 4, 23.18),
        ((*FULL_A, "strategy=zero3", "strategy.devices=2"), 2, 2, 18.23),
        ((*FULL_A, "strategy=zero3", "strategy.devices=2", "strategy.hpz=1"), 2, 2, 17.74),
        ((*FULL_A, "strategy=deepspeed_zero3", "strategy.devices=2", "strategy.offload=cpu"), 1, 3, 9.13),
        ((*FULL_A, "strategy=deepspeed_zero3", "strategy.devices=2", "strategy.offload=cpu"), 1, 2, 8.03),
        ((*WORK_A_SETTINGS, "strategy=deepspeed_zero3", "strategy.devices=4"), 1, 48, 16.7),
        ((*FULL_A, "strategy=deepspeed_zero3", "strategy.devices=4"), 1, 48, 103.19),
    ],
    ids=[
        "adapter",
        "adapter-2x1",
        "full",
        "full-2x1",
        "full-2x2-hpz",
        "small-2x2-hpz",
        "small-2x2",
        "offload",
        "small-offload",
        "adapter-4",
        "full-4",
    ],
)
def test_peaks_of_deepspeed_are_within_5_percent_of_measured_ones(
    settings: tuple[str, ...], machines: int, blocks: int, reserved_gib: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/performance/deepspeed.json; full fine-tunes with fewer of the 48 blocks."""
    monkeypatch.setitem(presets.PRESETS, "fewer", replace(presets.PRESETS["ltx2_3_22b"], layers=blocks))
    skeleton = build_transformer(RandomWeights("fewer"))
    monkeypatch.setattr(model_source, "skeleton", lambda _config: skeleton)
    place = Room(card=H200, budget_gib=138.0, host_gib=None, machines=machines)
    found = memory_plan.plan_for(config.compose_config(list(settings)), place)
    assert found is not None
    assert found.footprint.gib == pytest.approx(reserved_gib, rel=0.05)


def test_a_step_with_its_state_in_files_takes_the_disks_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/performance/deepspeed.json, offload_nvme: 10.93 s, one of the 48 blocks, two devices."""
    monkeypatch.setitem(presets.PRESETS, "fewer", replace(presets.PRESETS["ltx2_3_22b"], layers=1))
    skeleton = build_transformer(RandomWeights("fewer"))
    monkeypatch.setattr(model_source, "skeleton", lambda _config: skeleton)
    made = config.compose_config(
        [*FULL_A, "strategy=deepspeed_zero3", "strategy.devices=2", "strategy.offload=/nvme/ltx"]
    )
    found = memory_plan.plan_for(made, Room(card=H200, budget_gib=138.0, host_gib=None))
    assert found is not None
    assert found.footprint.step_s == pytest.approx(10.93, rel=0.05)


def test_what_machines_send_each_other_is_what_was_counted() -> None:
    """Two hosts of one GPU over a link of 8.36 GB/s: 1.741 GB a step into both, 0.835 to 0.857 s a step where one GPU
    takes 0.741."""
    made = config.compose_config([*WORK_A_SETTINGS, "strategy=zero3"])
    sent = memory_plan.traffic(made, 2)
    assert sent.total == pytest.approx(1.741e9 / 2, rel=0.01)
    assert sent.step_s(0.741, 8.36) == pytest.approx(0.846, rel=0.02)


def test_shares_and_traffic_follow_the_number_of_machines() -> None:
    """By hand: masters and moments of 19 billion weights over 64 GPUs, and the gathers that hpZ keeps inside."""
    made = config.compose_config([*FULL_A, "strategy=zero3", "strategy.devices=8"])
    place = Room(card=card_by_name("H100"), budget_gib=79.0, host_gib=None, machines=8)
    found = memory_plan.plan_for(made, place)
    assert found is not None
    assert found.footprint.parts["trained weights and moments"] == pytest.approx(18_988_838_144 * 12 / 64, rel=0.01)
    assert found.footprint.parts["second slice of the weights"] == pytest.approx(18_988_838_144 * 2 / 8, rel=0.01)
    crossing = 63 / 64 * 18_988_838_144
    assert memory_plan.traffic(made, 8).total == pytest.approx(crossing * (2 + 4), rel=0.01)
    without = config.changed(made, {"strategy.hpz": 1})
    assert memory_plan.traffic(without, 8).total == pytest.approx(crossing * (2 * 2 + 4), rel=0.01)
    copies = config.compose_config([*WORK_A_SETTINGS, "strategy=ddp", "strategy.devices=8"])
    assert memory_plan.traffic(copies, 8).weights == 0
    assert memory_plan.traffic(copies, 8).gradients == pytest.approx(2 * 4 * 63 / 64 * 144_703_488)


def test_a_shared_base_takes_a_share_and_the_ring_of_every_device() -> None:
    """By hand: the blocks of the 22B in bfloat16 are 34.4 GiB, a quarter of them 8.6, three in the ring 2.2."""
    place = Room(card=H200, budget_gib=40.0, host_gib=None)
    made = config.compose_config([*REAL, "strategy=zero3", "strategy.devices=4", "memory=recompute"])
    found = memory_plan.plan_for(made, place)
    assert found is not None
    assert found.choice.slices == 4
    parts = {name: size / 2**30 for name, size in found.footprint.parts.items()}
    assert parts["slices of streamed weights"] == pytest.approx(8.6, abs=0.1)
    assert parts["ring of streamed weights"] == pytest.approx(2.15, abs=0.05)
    assert found.footprint.host_gib == pytest.approx(0.81, abs=0.01), "what a save copies, and no weights"
    alone = memory_plan.plan_for(config.compose_config([*REAL, "memory=recompute"]), replace(place, budget_gib=80))
    assert alone is not None
    assert alone.footprint.gib - found.footprint.gib == pytest.approx(34.4 * 3 / 4 - 2.15, abs=0.9)


def test_the_price_of_8_bit_products_is_the_measured_one() -> None:
    rows = json.loads((REPOSITORY / "docs/performance/quantization.json").read_text())
    measured = {row["weights"]: row for row in rows}
    for compute, (mean, half) in plan_command._PRICES.items():
        found = measured[f"{compute} products"]["trained_to_bf16"]
        plain = measured["bf16"]["heldout_trained"] / 100
        assert (mean, half) == (round(found["mean"] / plain, 2), round(found["half"] / plain, 2))


@pytest.mark.parametrize(("compute", "stored"), [("fp8", "float8"), ("int8", "int8")])
def test_8_bit_products_are_offered_their_own_precision_for_the_rest(compute: str, stored: str) -> None:
    made = config.compose_config([*REAL, "memory=auto", f"memory.compute={compute}"])
    offered = [change.overrides.get("memory.quantize") for change in mends._changes_of_the_model(made)]
    assert stored in offered


SAMPLED = json.loads((REPOSITORY / "docs/performance/sampling.json").read_text())


@pytest.mark.parametrize("row", [row for row in SAMPLED if row["what"] == "sample"], ids=lambda row: row["case"])
def test_sampling_peaks_are_within_5_percent_of_measured_ones(row: dict[str, Any]) -> None:
    """A pass without backward keeps nothing."""
    words = ("mode=t2av", "adapter=attention", f"data.buckets=[{row['bucket']}]", "data.fps=25", *row["overrides"])
    made = config.continued(config.compose_config([*REAL, *words]), None, 1)
    room = Room(card=card_by_name("H200"), budget_gib=made.memory.budget_gib or 139.0, host_gib=None)
    planned = memory_plan.plan_for(made, room, training=False)
    assert planned is not None
    assert planned.footprint.gib == pytest.approx(row["reserved_gib"], rel=0.05)
