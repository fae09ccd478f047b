"""The command line before a command runs: what it answers to mistakes, what it shows, what it takes folders and lists
for."""

from __future__ import annotations

import os
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ltx_train import config
from ltx_train.config import help as helping
from ltx_train.config import suggest, targets
from ltx_train.config.command_table import COMMANDS
from ltx_train.config.folders import from_folder
from ltx_train.config.multirun import as_search, split_lists, top_level_values
from ltx_train.config.settings import all_settings, known_names
from ltx_train.contracts import ConfigError, Exit
from ltx_train.jobs import processes
from tests.conftest import REPOSITORY, TINY, command


@pytest.mark.parametrize(
    ("line", "answers"),
    [
        ("fit optim.lr=abc", ["optim.lr=abc: a number is expected, as optim.lr=0.0001"]),
        ("fit optim.steps=1.5", ["optim.steps=1.5: a whole number is expected, as optim.steps=1000"]),
        ("fit eval.dropped=maybe", ["eval.dropped=maybe: true or false is expected"]),
        ("fit memory.budget_gib=much", ["a number or null is expected"]),
        ("fit data.buckets=64x64x33", ["a list in brackets is expected: write data.buckets=[64x64x33]"]),
        ("bench optim.lr=1e-4,1e-3", ["one value is expected", "ltx-train fit -m optim.lr=1e-4,1e-3"]),
        ("fit -m", ["-m searches over comma lists"]),
        ("fit -m optim=adamw,prodigy", ["a search is over single settings"]),
        ("trian", ["there is no command 'trian'; did you mean 'fit'?"]),
        ("generate", ["did you mean 'sample'?"]),
        ("prepar", ["did you mean 'prepare'?"]),
        ("experiment=audio_reference optim.lr=1", ["the command is missing: ltx-train fit experiment=audio_reference"]),
        ("fit --nonsense", ["unrecognized arguments: --nonsense"]),
        ("fit runs/nowhere", ["'runs/nowhere' is neither an override (key=value) nor a folder"]),
        ("fit tests", ["tests has no config.yaml", "runs/<experiment>/<id>"]),
        ("help nonsense", ["there is no help on 'nonsense'", "memory"]),
        ("completion tcsh", ["bash, zsh, fish"]),
        ("fit --cfg hydra", ["only `--cfg job` is known"]),
        ("fit data.buckets=64x64x33,64x64x65", ["as data.buckets=[64x64x33,64x64x65]"]),
        ("evaluate checkpoints=runs/a,runs/b", ["a list is written in brackets, as checkpoints=[runs/a,runs/b]"]),
        ("fit optim.betas=[0.9]", ["optim.betas=[0.9]: give the two decay rates"]),
        ("fit memory.keep=None", ["memory.keep", "choose one of"]),
        ("sample sample.fps=0", ["sample.fps=0", "at least 1"]),
        ("fit run.id=../../x", ["run.id='../../x'", "without slashes"]),
        ("fit run.experiment=..", ["run.experiment='..'"]),
        (f"fit run.id={'x' * 300}", ["run.id has 300 bytes: at most 200"]),
        ("export export.out=precious.txt", ["export.out=precious.txt", ".safetensors"]),
        ("sample sample.out=precious.txt", ["sample.out=precious.txt", ".mp4"]),
        ("fit data --config saved.yaml", ["--config beside the folder data"]),
        ("fit --config saved.yaml --config-dir mine", ["leave --config-dir out"]),
    ],
)
def test_a_mistake_is_answered_with_what_was_expected_and_the_mend(
    line: str, answers: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*line.split()) == Exit.CONFIG
    shown = capsys.readouterr()
    assert shown.out == ""
    for answer in answers:
        assert answer in shown.err
    assert "Traceback" not in shown.err


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("learning_rate", "optim.lr"), ("optim.learning_rate", "optim.lr"), ("max_train_steps", "optim.steps"),
        ("train_batch_size", "optim.batch_size"), ("gradient_accumulation_steps", "optim.global_batch"),
        ("lora_rank", "adapter.rank"), ("network_dim", "adapter.rank"), ("lora-alpha", "adapter.alpha"),
        ("resolution", "data.buckets"), ("num_frames", "data.buckets"), ("trigger_word", "data.trigger"),
        ("seed", "run.seed"), ("output_dir", "run.root"), ("blocks_to_swap", "memory.stream_blocks"),
        ("num_gpus", "strategy.devices"), ("mixed_precision", "model.dtype"), ("prompt", "sample.prompt"),
        ("optm.lr", "optim.lr"), ("stream_blocks", "memory.stream_blocks"),
    ],
)  # fmt: skip
def test_names_of_other_trainers_lead_to_ours(typed: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("fit", f"{typed}=1") == Exit.CONFIG
    assert f"did you mean {meant!r}?" in capsys.readouterr().err


def test_every_synonym_leads_to_a_setting_or_a_group() -> None:
    assert set(suggest._SYNONYMS.values()) <= set(known_names())
    assert set(suggest._COMMANDS.values()) <= set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_lists_the_settings_of_a_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """All of its groups, each setting with its default and its one line; nothing of other groups."""
    assert command(name, "--help") == Exit.DONE
    shown = capsys.readouterr().out
    assert shown.startswith(f"ltx-train {name}: {COMMANDS[name].summary}")
    for setting in all_settings().values():
        is_listed = setting.group in COMMANDS[name].groups or setting.name in (
            {"fit": ["mixture"], "evaluate": ["checkpoints"]}.get(name, [])
        )
        assert (f"\n  {setting.name}=" in shown) == is_listed, setting.name
        assert not is_listed or setting.declared.help in shown
    assert ("every setting of fit" in shown) == COMMANDS[name].reads_fit


def test_every_setting_is_declared_with_its_help() -> None:
    for setting in all_settings().values():
        assert 5 < len(setting.declared.help) < 100, setting.name
        if setting.declared.choices and setting.kind != "number" and not setting.name.startswith("mode."):
            defaults = setting.default if isinstance(setting.default, list) else [setting.default]
            assert set(defaults) <= set(setting.declared.choices), setting.name


def test_the_page_of_settings_is_current() -> None:
    assert (REPOSITORY / "docs" / "settings.md").read_text() == helping.settings_page(), "run: make settings"


def test_a_group_has_help_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("help", "optim") == Exit.DONE
    shown = capsys.readouterr().out
    assert "optim=NAME takes adamw, adamw8bit, paged_adamw8bit, prodigy" in shown
    assert "optim.lr=0.0001" in shown
    assert "memory." not in shown


def test_bash_completes_commands_settings_and_choices() -> None:
    script = """
        source <(python -m ltx_train completion bash)
        at() { COMP_LINE="$1"; COMP_POINT=${#1}; COMPREPLY=(); _ltx_train 2>/dev/null; echo "${COMPREPLY[*]}"; }
        at "ltx-train pre"; at "ltx-train fit optim.l"; at "ltx-train fit a=1 memory.keep=att"
        at "ltx-train fit adapter=cross"
    """
    done = subprocess.run(
        ["bash", "-c", script.replace("python", shlex.quote(sys.executable))], cwd=REPOSITORY, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == ["prepare", "optim.lr=", "attention", "cross_modal"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_lists_every_setting_and_option(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("completion", shell) == Exit.DONE
    shown = capsys.readouterr().out
    assert all(name in shown for name in all_settings())
    assert "experiment=voice_reference_22b" in shown


def test_output_outlives_its_reader() -> None:
    """More lines than a pipe holds; the program goes on to its end after the reader has left."""
    code = "from ltx_train.jobs import output; import os; output.survive_readers()\n" + (
        "[print('x' * 100) for _ in range(5000)]; os.write(2, b'the end')"
    )
    done = subprocess.run(
        ["bash", "-c", f'set -o pipefail; {shlex.quote(sys.executable)} -c "$CODE" | head -1'], cwd=REPOSITORY,
        env={**os.environ, "CODE": code}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "x" * 100 + "\n", "the end")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"])
def test_a_signal_during_imports_asks_for_a_restart(name: str, tmp_path: Path) -> None:
    """It arrives in the middle of the import of torch: exit code 75 and one line."""
    (tmp_path / "torch.py").write_text(
        f"import os, signal, time\nos.kill(os.getpid(), signal.{name})\ntime.sleep(60)\n"
    )
    (tmp_path / "index.safetensors").touch()
    arguments = ["fit", "model.weights=random", f"data.root={tmp_path}", "data.source=x", "strategy.device=cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "ltx_train", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(tmp_path)}, timeout=300,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (75, "ltx-train: stopped\n")


def test_settings_of_a_folder_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--cfg job` over a folder and over a saved file; entries of a list by their number."""
    made = config.compose_config(["mode=v2v_ic", "optim.steps=7"])
    (tmp_path / "config.yaml").write_text(config.dump(made))
    (tmp_path / "index.safetensors").write_text("{}")
    for words in ([str(tmp_path)], ["--config", str(tmp_path / "config.yaml")]):
        assert command("fit", *words, "mode.conditions.0.p=0.25", "--cfg", "job") == Exit.DONE
        shown = capsys.readouterr().out
        assert "steps: 7" in shown
        assert "p: 0.25" in shown


def test_a_damaged_configuration_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(8)
    )
    for text in ("a: [", "\x00", "!!python/object/apply:os.system ['x']", bomb):
        (tmp_path / "config.yaml").write_text(text)
        assert command("fit", "--config", str(tmp_path / "config.yaml")) == Exit.CONFIG
        assert "config.yaml is not a configuration of this release" in capsys.readouterr().err


def test_an_unusable_folder_for_kernels_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/proc/nope")
    assert command("plan", "plan.card=RTX 4090") == Exit.CONFIG
    assert "TORCHINDUCTOR_CACHE_DIR=/proc/nope cannot be used" in capsys.readouterr().err


def test_a_configuration_from_others_reads_no_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SECRET", "s3cr3t")
    text = config.dump(config.compose_config([])).partition("\n")[2]
    assert "caption: null" in text
    (tmp_path / "config.yaml").write_text(text.replace("caption: null", "caption: ${oc.env:SECRET}"))
    assert command("fit", "--config", str(tmp_path / "config.yaml"), "--cfg", "job") == Exit.CONFIG
    shown = capsys.readouterr()
    assert "environment variables" in shown.err
    assert "s3cr3t" not in shown.out + shown.err


def test_processes_of_another_launcher_must_be_as_many_as_the_strategy_has(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert command("plan", "strategy=zero3", "strategy.devices=2") == Exit.CONFIG
    assert "set strategy.devices=4" in capsys.readouterr().err


def seconds_of(*arguments: str) -> float:
    """Processor time of a command line, best of three: other tests run beside this one."""
    times: list[float] = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-m", "ltx_train", *arguments], cwd=REPOSITORY, capture_output=True, check=False
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    return min(times)


@pytest.mark.slow
def test_help_and_refusals_import_nothing_heavy() -> None:
    """Help without Hydra, a wrong path without torch."""
    assert seconds_of("prepare", "--help") < 0.4
    assert seconds_of("fit", "model.path=nowhere.safetensors") < 1.2
    code = (
        "import sys; from ltx_train.__main__ import run\n"
        "run(['fit', 'model.path=nowhere']); run(['prepare', '--help'])\n"
        "print([name for name in ('torch', 'numpy', 'lightning', 'diffusers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.slow
def test_the_model_is_imported_without_8_bit_optimizers() -> None:
    """peft and diffusers import them for layers of their own, which takes a second."""
    code = (
        "import sys, ltx_train.model\n"
        "print([name for name in ('peft', 'diffusers', 'bitsandbytes') if name in sys.modules])\n"
        "import bitsandbytes.optim; print(bitsandbytes.optim.AdamW8bit.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-2:] == ["['peft', 'diffusers']", "AdamW8bit"]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1e-4,1e-3", ["1e-4", "1e-3"]), ("[a,b]", ["[a,b]"]), ("[a],[b,c]", ["[a]", "[b,c]"]),
        ("'a, b'", ["'a, b'"]), ("{a: 1, b: 2},{}", ["{a: 1, b: 2}", "{}"]), ("1", ["1"]), ("", [""]),
    ],
)  # fmt: skip
def test_commas_within_brackets_or_quotes_separate_nothing(text: str, values: list[str]) -> None:
    assert top_level_values(text) == values


def test_comma_lists_are_a_grid_search() -> None:
    words = [
        "experiment=audio_reference",
        "optim.lr=1e-4,3e-4",
        "adapter.rank=8,16",
        "data.buckets=[64x64x33,32x32x33]",
    ]
    plain, lists = split_lists("fit", words, multirun=True)
    assert plain == [words[0], words[3]]
    made = as_search(config.compose_config(plain), lists)
    assert made.sweep.space == ["optim.lr=choice(1e-4, 3e-4)", "adapter.rank=choice(8, 16)"]
    assert (made.sweep.sampler, made.sweep.prune) == ("grid", False)
    again = as_search(config.compose_config(plain), lists)
    other = as_search(config.compose_config(plain), {"optim.lr": ["1e-4", "5e-4"], "adapter.rank": ["8", "16"]})
    assert again.sweep.name == made.sweep.name != other.sweep.name
    named = as_search(config.compose_config([*plain, "sweep.name=mine"]), lists)
    assert named.sweep.name == "mine"


@pytest.mark.parametrize("flag", [["-m"], []])
def test_fit_with_comma_lists_runs_the_search(flag: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, list[str]]] = []

    def run(name: str, made: config.Config) -> int:
        ran.append((name, made.sweep.space))
        return 0

    monkeypatch.setattr(processes, "run_command", run)
    arguments = ("experiment=audio_reference", f"model.path={TINY}", "optim.lr=1e-4,3e-4")
    assert command("fit", *flag, *arguments) == 0
    assert ran == [("sweep", ["optim.lr=choice(1e-4, 3e-4)"])]


@pytest.mark.parametrize(
    "prompt", ["a woman says: hello, world", "naïve ü, 漢字", "it's 5 o'clock", "[brackets] {braces}"]
)
def test_free_text_needs_no_second_quotes(prompt: str, tmp_path: Path) -> None:
    made = config.compose_config([f"sample.prompt={prompt}", "run.id=007"])
    assert (made.sample.prompt, made.run.id) == (prompt, "007")
    (tmp_path / "config.yaml").write_text(config.dump(made))
    again = config.from_file(tmp_path / "config.yaml", [f"sample.prompt={prompt}!", "run.id=008"])
    assert (again.sample.prompt, again.run.id) == (f"{prompt}!", "008")
    quoted = config.compose_config([f'sample.negative_prompt="{prompt}"'] if '"' not in prompt else [])
    assert quoted.sample.negative_prompt == prompt


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run's folder as `fit` leaves it, without the tensors."""
    folder = tmp_path / "runs" / "voices" / "first"
    (folder / "adapters").mkdir(parents=True)
    for step in (100, 200):
        (folder / "adapters" / f"step-{step:06d}.safetensors").touch()
    (folder / "adapters" / "best.safetensors").symlink_to("step-000100.safetensors")
    made = config.compose_config(["experiment=audio_reference", "run.root=/elsewhere", "optim.lr=0.5"])
    (folder / "config.yaml").write_text(config.dump(made))
    return folder


def test_a_run_folder_names_the_run_and_its_files(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = run_folder / "adapters"
    made = from_folder(str(run_folder), "evaluate", ["eval.max_samples=3"])
    assert (made.run.root, made.run.experiment, made.run.id) == (str(run_folder.parent.parent), "voices", "first")
    assert (made.optim.lr, made.eval.max_samples) == (0.5, 3)
    assert from_folder(str(run_folder), "export", []).export.run == str(run_folder)
    inspected = from_folder(str(run_folder), "inspect", []).inspect
    assert (inspected.run, inspected.file) == (str(run_folder), str(adapters / "step-000200.safetensors"))
    assert from_folder(str(run_folder), "sample", []).sample.adapter == str(adapters / "best.safetensors")
    assert from_folder(str(run_folder), "sample", ["sample.adapter=mine"]).sample.adapter == "mine"
    monkeypatch.chdir(run_folder.parent)
    assert from_folder("first", "fit", []).run.experiment == "voices"
    assert from_folder("first", "fit", ["run.id=second"]).run.id == "second"
    assert from_folder("first", "fit", ["debug=limit"]).run.id == "debug-limit"


def test_options_of_groups_over_a_folder(run_folder: Path) -> None:
    """An option replaces what its group's options set, and leaves all else as the folder has it."""
    before = from_folder(str(run_folder), "fit", ["memory=recompute", "memory.budget_gib=20", "optim.steps=77"])
    (run_folder / "config.yaml").write_text(config.dump(before))
    made = from_folder(
        str(run_folder), "fit",
        ["memory=int8", "optim=prodigy", "strategy=zero3", "mode=extend", "debug=overfit", "optim.lr=0.5"],
    )  # fmt: skip
    assert (made.memory.quantize, made.memory.keep, made.memory.budget_gib) == ("int8", None, 20)
    assert (made.optim.name, made.optim.lr, made.optim.steps) == ("prodigy", 0.5, 200)
    assert made.strategy.name == "zero3"
    assert [c.kind.value for c in made.mode.conditions] == ["prefix"]
    assert made.data.limit == 1
    again = from_folder(
        str(run_folder), "fit", ["optim=adamw", "adapter=full", "memory=none", "strategy=zero3_offload"]
    )
    assert (again.optim.steps, again.adapter.kind, again.strategy.offload) == (77, "full", "cpu")


def test_targets_follow_the_mode_unless_they_are_chosen(run_folder: Path) -> None:
    saved = run_folder / "config.yaml"
    saved.write_text(config.dump(from_folder(str(run_folder), "fit", ["mode=t2av", "adapter=auto"])))
    assert from_folder(str(run_folder), "fit", ["mode=t2a"]).adapter.targets == list(targets.SETS["audio_only"])
    saved.write_text(config.dump(from_folder(str(run_folder), "fit", ["adapter.targets=[ff.net.2]"])))
    assert from_folder(str(run_folder), "fit", ["mode=t2v"]).adapter.targets == ["ff.net.2"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("experiment=av_lora", "the folder has an experiment's settings"),
        ("memory=int9", "did you mean 'int8'"),
    ],
)
def test_options_that_a_folder_cannot_take(override: str, message: str, run_folder: Path) -> None:
    with pytest.raises(config.ConfigError, match=message):
        from_folder(str(run_folder), "fit", [override])


def test_a_run_folder_that_cannot_be_sampled_is_refused(run_folder: Path) -> None:
    for path in (run_folder / "adapters").iterdir():
        path.unlink()
    with pytest.raises(ConfigError, match="has no adapter yet"):
        from_folder(str(run_folder), "sample", [])
    full = config.compose_config(["experiment=tiny_base"])
    (run_folder / "config.yaml").write_text(config.dump(full))
    with pytest.raises(ConfigError, match="trained all weights: `ltx-train export"):
        from_folder(str(run_folder), "sample", [])


def test_a_prepared_folder_is_found_where_it_is(tmp_path: Path) -> None:
    (tmp_path / "index.safetensors").touch()
    (tmp_path / "config.yaml").write_text(config.dump(config.compose_config(["data.root=moved", "run.id=x"])))
    made = from_folder(str(tmp_path), "fit", [])
    assert (made.data.root, made.run.id) == (str(tmp_path), "x")
