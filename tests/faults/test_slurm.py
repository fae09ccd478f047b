"""Jobs on a real SLURM of two nodes: submitted, signalled, requeued, continued, finished."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import optuna
import pytest

from ltx_train.commands import submit
from ltx_train.config import changed, compose_config, from_file
from ltx_train.contracts import ConfigError
from ltx_train.jobs import slurm as slurm_jobs
from ltx_train.training.tracking.metrics import read_rows
from tests.conftest import REPOSITORY, command
from tests.faults.harness import PATIENCE_S, started, steps_done, wait_for
from tests.faults.slurm import Slurm
from tests.faults.test_ranks import fit
from tests.faults.test_resume import newest
from tests.faults.test_sliced import FULL

needs_slurm = pytest.mark.skipif(
    shutil.which("slurmctld", path="/usr/sbin:/usr/bin") is None, reason="slurm-wlm is not installed (make tools)"
)
pytestmark = pytest.mark.slow
SMALL = (
    "cluster.cpus=1", "cluster.time=30", "cluster.signal_s=110", "cluster.setup=['export OMP_NUM_THREADS=1']",
)  # fmt: skip


ENDLESS = ("optim.steps=100000", "cluster.nodes=2")
LAUNCH = Path(__file__).parent.parent.parent / "launch" / "slurm"
PYTHON = shlex.quote(sys.executable)
BROKEN_GPU = """
from ltx_train.jobs.exit_codes import exit_code_of
def work(): raise RuntimeError('CUDA error: uncorrectable ECC error encountered')
raise SystemExit(exit_code_of(work))"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Generator[Slurm]:
    with Slurm(tmp_path_factory.mktemp("slurm")) as started:
        yield started


def waited(condition: Callable[[], bool], seconds: float = 2 * PATIENCE_S) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.2)


def submitted(
    slurm: Slurm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> str:
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, slurm.env[name])
    assert command("submit", *arguments[1:], *SMALL) == 0
    shown = capsys.readouterr().out
    assert "#SBATCH --signal=B:USR1@110" in shown
    return shown.split("submitted job ")[1].split()[0]


def unhurried(folder: Path) -> str:
    """The setting with which a job trains a step a second. Endless runs leave the processors to other tests then."""
    python = folder / "unhurried"
    python.write_text(
        f'#!/bin/bash\nif [ "$2" = ltx_train ]; then exec {PYTHON} -m tests.faults.unhurried "${{@:3}}"; fi\n'
        f'exec {PYTHON} "$@"\n'
    )
    python.chmod(0o755)
    return f"cluster.python={python}"


@needs_slurm
def test_two_nodes_save_requeue_and_finish(
    slurm: Slurm, prepared: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """An adapter on two nodes: under DeepSpeed, with slices of two kinds, and as copies of the model. The notice before
    the time limit (SLURM looks every 30 s, and may be a minute early); then a node that is lost. Nothing is computed
    twice after the notice, and the curve is that of one process.

    The job cannot end by itself before both have happened. Its configuration is written again while it is pending."""
    arguments = fit(prepared, clips, tmp_path, "checkpoint.interval=5", "eval.interval=0", unhurried(tmp_path))
    run = tmp_path / "audio_reference" / "main"
    job = submitted(slurm, monkeypatch, capsys, [*arguments, *ENDLESS, "strategy=zero3"])
    waited(lambda: steps_done(run) > 3)
    slurm("scontrol", "update", f"JobId={job}", "TimeLimit=2")
    waited(lambda: "ended with 75" in _log(run, job))
    _rewritten(arguments, *ENDLESS, "strategy=zero2")
    slurm("scontrol", "update", f"JobId={job}", "TimeLimit=30")
    stopped = steps_done(run)
    waited(lambda: steps_done(run) > stopped + 2)
    assert "start 1 on n[1-2]" in _log(run, job)
    assert f"resuming {run} at step {stopped}" in _log(run, job)
    _lose_a_node(slurm, job)
    steps = f"optim.steps={steps_done(run) + 5}"
    _rewritten(arguments, steps, "cluster.nodes=2", "strategy=ddp")
    slurm("scontrol", "update", "NodeName=n2", "State=RESUME")
    waited(lambda: slurm.state(job) == "COMPLETED")
    assert "start 2 on n[1-2]" in _log(run, job)
    assert _strategies(run, job) == ["zero3, DeepSpeed's engine", "zero2, DeepSpeed's engine", "ddp"]
    _assert_curve_of_one_process(run, fit(prepared, clips, tmp_path / "one", steps, "eval.interval=0"), monkeypatch)


@needs_slurm
def test_two_nodes_train_every_weight(
    slurm: Slurm, prepared: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A full fine-tune under DeepSpeed's three stages: a notice, then a lost node. Each node saves its slice."""
    arguments = fit(prepared, clips, tmp_path, *FULL, "checkpoint.interval=5", "eval.interval=0")
    run = tmp_path / "audio_reference" / "main"
    job = submitted(slurm, monkeypatch, capsys, [*arguments, *ENDLESS, "strategy=zero3"])
    waited(lambda: steps_done(run) > 3)
    slurm("scancel", "--signal=USR1", "--batch", job)
    waited(lambda: "ended with 75" in _log(run, job))
    assert len(list(newest(run).glob("shard-*-of-00002.safetensors"))) == 2
    _rewritten(arguments, *ENDLESS, "strategy=zero1")
    stopped = steps_done(run)
    waited(lambda: steps_done(run) > stopped + 5)
    assert f"resuming {run} at step {stopped}" in _log(run, job)
    _lose_a_node(slurm, job)
    steps = f"optim.steps={steps_done(run) + 3}"
    _rewritten(arguments, steps, "cluster.nodes=2", "strategy=zero2")
    slurm("scontrol", "update", "NodeName=n2", "State=RESUME")
    waited(lambda: slurm.state(job) == "COMPLETED")
    assert _strategies(run, job) == [f"zero{stage}, DeepSpeed's engine" for stage in (3, 1, 2)]
    alone = fit(prepared, clips, tmp_path / "one", *FULL, steps, "eval.interval=0")
    _assert_curve_of_one_process(run, alone, monkeypatch)


@needs_slurm
def test_a_job_goes_on_without_the_node_whose_gpu_failed(
    slurm: Slurm, prepared: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The first start ends as a process does whose GPU fails."""
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/bash\n"
        f'if [ "${{SLURM_RESTART_COUNT:-0}}" = 0 ]; then exec {PYTHON} -c "{BROKEN_GPU}"; fi\n'
        f'exec {PYTHON} "$@"\n'
    )
    python.chmod(0o755)
    arguments = fit(prepared, clips, tmp_path, "optim.steps=2", "eval.interval=0", f"cluster.python={python}")
    run = tmp_path / "audio_reference" / "main"
    job = submitted(slurm, monkeypatch, capsys, arguments)
    waited(lambda: slurm.state(job) == "COMPLETED")
    log = _log(run, job)
    assert "a GPU of n1 failed" in log
    assert "ended with 71" in log
    assert "goes on without n1" in log
    assert "start 1 on n2" in log
    assert steps_done(run) == 2


@needs_slurm
@pytest.mark.parametrize("kind", ["venv", "container"])
def test_launch_files_run_over_two_nodes(
    kind: str, slurm: Slurm, prepared: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """As they are shipped, with the numbers of this cluster. A stand-in for apptainer starts the command itself."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    apptainer = bin_folder / "apptainer"
    apptainer.write_text(f'#!/bin/bash\nwhile [ "$1" != python ]; do shift; done\nshift\nexec {PYTHON} "$@"\n')
    apptainer.chmod(0o755)
    environment = {
        **slurm.env, "PATH": f"{bin_folder}:{slurm.env['PATH']}", "LTX_TRAIN_LAUNCH": str(LAUNCH),
        "LTX_TRAIN_VENV": str(Path(sys.executable).parent.parent), "LTX_TRAIN_PREPARED": str(prepared),
        "LTX_TRAIN_DEVICES": "1", "OMP_NUM_THREADS": "1", "LTX_TRAIN_IMAGE": "none", "LTX_TRAIN_MOUNT": str(tmp_path),
    }  # fmt: skip
    settings = [
        f"run.root={tmp_path}", "optim.steps=2", "optim.batch_size=1", "eval.interval=0", "strategy.device=cpu",
        "data.workers=0",
    ]  # fmt: skip
    options = ["--gres=none", "--ntasks-per-node=1", "--cpus-per-task=1", f"--output={tmp_path}/log"]
    call = ["sbatch", "--parsable", *options, str(LAUNCH / f"{kind}.sbatch"), *settings]
    done = subprocess.run(call, env=environment, capture_output=True, text=True, check=True)
    waited(lambda: slurm.state(done.stdout.strip()) in ("COMPLETED", "FAILED"))
    assert "2 on 2 machines, strategy=zero3, DeepSpeed's engine" in (tmp_path / "log").read_text()
    assert steps_done(tmp_path / "audio_reference" / "main") == 2


def test_a_notice_that_is_lost_is_repeated(tmp_path: Path) -> None:
    """srun loses a signal that comes while it starts its tasks."""
    step = f"trap '' USR1; touch {tmp_path}/started; sleep 1; trap 'exit 75' USR1; while :; do sleep 0.1; done"
    script = f"""
        . {shlex.quote(str(REPOSITORY))}/launch/slurm/requeue.sh
        scontrol() {{ echo "scontrol $*"; }}
        run_step 0 0 bash -c "{step}"
    """
    environment = {**os.environ, "SLURM_JOB_ID": "7", "LTX_TRAIN_LOST_DEVICES": str(tmp_path / "lost")}
    with subprocess.Popen(["bash", "-c", script], env=environment, stdout=subprocess.PIPE, text=True) as shell:
        waited((tmp_path / "started").exists)
        shell.send_signal(signal.SIGUSR1)
        shown, _ = shell.communicate(timeout=PATIENCE_S)
    assert shell.returncode == 75
    assert "job 7 ended with 75" in shown
    assert "scontrol requeue 7" in shown


@needs_slurm
def test_a_notice_while_a_job_starts_requeues_it(
    slurm: Slurm, prepared: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The signal comes while the command imports, before it has set up anything."""
    arguments = fit(prepared, clips, tmp_path, "optim.steps=2", "eval.interval=0")
    run = tmp_path / "audio_reference" / "main"
    job = submitted(slurm, monkeypatch, capsys, arguments)
    waited(lambda: "start 0 on" in _log(run, job))
    time.sleep(1)
    slurm("scancel", "--signal=USR1", "--batch", job)
    waited(lambda: "ended with 75" in _log(run, job))
    waited(lambda: slurm.state(job) == "COMPLETED")
    assert "start 1 on" in _log(run, job)
    assert steps_done(run) == 2


@needs_slurm
def test_a_job_array_is_one_run_per_line(
    slurm: Slurm, prepared: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    arguments = fit(prepared, clips, tmp_path, "optim.steps=3", "eval.interval=0")
    array = "cluster.array=['run.id=low optim.lr=1e-5','run.id=high optim.lr=1e-3']"
    job = submitted(slurm, monkeypatch, capsys, [*arguments, array])
    waited(lambda: slurm.state(f"{job}_0") == slurm.state(f"{job}_1") == "COMPLETED")
    rates = [read_rows(tmp_path / "audio_reference" / n / "metrics.jsonl")[-1]["optim/lr"] for n in ("low", "high")]
    assert rates == [1e-5, 1e-3]


@needs_slurm
def test_a_search_in_jobs_is_found_again(
    slurm: Slurm, prepared: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Two trials at a time; the search is killed, its jobs go on, and the same command waits for them."""
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, slurm.env[name])
    arguments = [
        "sweep", *fit(prepared, clips, tmp_path, "optim.steps=4", "eval.interval=2")[1:], "sweep.name=jobs",
        "sweep.space=['optim.lr=choice(1e-4, 1e-3)']", "sweep.sampler=grid", "sweep.place=slurm", "sweep.parallel=2",
        "cluster.cpus=1", "cluster.time=30",
    ]  # fmt: skip
    with started(arguments, tmp_path / "log") as process:
        wait_for(lambda: (tmp_path / "log").read_text().count(", job ") == 2, process)
        os.kill(process.pid, signal.SIGKILL)
    assert command(*arguments) == 0
    first, again = (
        re.findall(r"job (\d+)", text) for text in ((tmp_path / "log").read_text(), capsys.readouterr().err)
    )
    assert first == again
    study = optuna.load_study(study_name="jobs", storage=f"sqlite:///{tmp_path}/audio_reference/sweep-jobs/study.db")
    assert sorted(trial.params["optim.lr"] for trial in study.trials) == [1e-4, 1e-3]
    assert all(trial.value is not None for trial in study.trials)


def test_the_script_of_a_large_job(tmp_path: Path) -> None:
    made = compose_config([
        "experiment=voice_reference_22b", "data.source=x", "data.root=y", f"run.root={tmp_path}", "cluster.nodes=4",
        "cluster.devices=8", "cluster.partition=gpu", "cluster.container=docker://image", "cluster.python=python3",
        "cluster.setup=[module load cuda]", "cluster.directives=['--exclusive']", "cluster.submit=false",
    ])  # fmt: skip
    assert submit.run(made) == 0
    run = tmp_path / "voice_reference_22b" / "main"
    script = (run / "submit.sbatch").read_text()
    for line in (
        "#SBATCH --nodes=4", "#SBATCH --ntasks-per-node=8", "#SBATCH --gres=gpu:8", "#SBATCH --partition=gpu",
        "#SBATCH --exclusive", "module load cuda", "--container-image=docker://image python3 -m ltx_train fit --config",
    ):  # fmt: skip
        assert line in script
    assert "{{" not in script
    assert from_file(str(run / "submit.yaml"), []).strategy.name == "ddp"


def test_words_of_a_job_stay_words(tmp_path: Path) -> None:
    """The script runs with stand-ins for srun and scontrol. Blanks, globs and `$()` of the overrides arrive as typed,
    and nothing of them is executed. shellcheck finds nothing."""
    values = ["run.id=a 'data.caption=a b *'", f"'data.trigger=$(touch {tmp_path}/pwned)' optim.steps=3"]
    made = compose_config([
        "experiment=audio_reference", f"run.root={tmp_path / 'ro ot'}", "cluster.python=python3",
        f"cluster.array={json.dumps(values)}",
    ])  # fmt: skip
    script = slurm_jobs.write_script(made)
    (tmp_path / "bin").mkdir()
    for name, body in {"srun": 'printf "%s\\n" "$@"', "scontrol": "true"}.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "1",
        "SLURM_JOB_NODELIST": "n",
    }  # fmt: skip
    words: list[list[str]] = []
    for task in range(2):
        done = subprocess.run(
            ["bash", str(script)], env={**environment, "SLURM_ARRAY_TASK_ID": str(task)}, capture_output=True,
            text=True, check=True,
        )  # fmt: skip
        words.append(done.stdout.splitlines())
    assert {"run.id=a", "data.caption=a b *"} <= set(words[0])
    assert {f"data.trigger=$(touch {tmp_path}/pwned)", "optim.steps=3"} <= set(words[1])
    assert str(script.parent / "submit.yaml") in words[0]
    assert not (tmp_path / "pwned").exists()
    assert f'#SBATCH --output="{script.parent}/slurm-%A_%a.log"' in script.read_text()
    check = Path(sys.executable).parent / "shellcheck"
    subprocess.run([check, "--exclude=SC2034,SC2016", script], check=True)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("cluster.partition", "gpu\ntouch PWNED"), ("cluster.account", "a b"), ("cluster.time", "1:00;x"),
        ("cluster.gres", "gpu:1\n"), ("cluster.directives", ["--exclusive\ntouch PWNED"]), ("run.root", 'a"b'),
        ("cluster.array", ["run.id='open"]),
    ],
)  # fmt: skip
def test_what_cannot_stand_in_a_script_is_refused(setting: str, value: Any, tmp_path: Path) -> None:
    made = changed(compose_config(["experiment=audio_reference", f"run.root={tmp_path}"]), {setting: value})
    with pytest.raises(ConfigError, match=setting):
        slurm_jobs.render(made, tmp_path / str(made.run.root) / "submit.yaml")


def test_submit_without_sbatch_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert command("submit", f"run.root={tmp_path}") == 77
    assert "sbatch is not on the PATH" in capsys.readouterr().err


def _log(run: Path, job: str) -> str:
    path = run / f"slurm-{job}.log"
    return path.read_text() if path.is_file() else ""


def _rewritten(arguments: list[str], *more: str) -> None:
    """The configuration of a pending job."""
    assert command("submit", *arguments[1:], *SMALL, *more, "cluster.submit=false") == 0


def _lose_a_node(slurm: Slurm, job: str) -> None:
    slurm("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    waited(lambda: slurm.state(job) == "PENDING")


def _strategies(run: Path, job: str) -> list[str]:
    """What each start of a job printed of its strategy."""
    return [found.strip() for found in re.findall(r"2 on 2 machines, strategy=([^│\n]*)", _log(run, job))]


def _assert_curve_of_one_process(run: Path, alone: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.chdir(LAUNCH.parent.parent)
    assert command(*alone) == 0
    one = Path(next(a for a in alone if a.startswith("run.root=")).partition("=")[2]) / "audio_reference" / "main"
    found, expected = ([row["train/loss"] for row in read_rows(f / "metrics.jsonl")] for f in (run, one))
    assert found == pytest.approx(expected, rel=1e-5)
