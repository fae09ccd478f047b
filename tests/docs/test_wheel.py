"""A wheel works as a checkout does, from any folder."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY


@pytest.mark.slow
def test_the_wheel_brings_its_configuration(tmp_path: Path) -> None:
    def run(*arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        done = subprocess.run(
            [str(a) for a in arguments], cwd=tmp_path, capture_output=True, text=True, env=environment, check=False
        )
        assert done.returncode == code, done.stderr
        return done

    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path / "dist", REPOSITORY)
    wheel = next((tmp_path / "dist").glob("*.whl"))
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").stdout.strip()
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", wheel)
    assert (Path(site) / "ltx_train" / "py.typed").is_file()
    # The dependencies of this environment, without its editable ltx-train.
    Path(site, "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    command = tmp_path / "venv" / "bin" / "ltx-train"
    assert "prepare" in run(command, "--help").stdout
    shown = run(command, "fit", "--cfg", "job", "experiment=talking_head_22b").stdout
    assert "OHWXPERSON" in shown
    assert "preset: ltx2_3_22b" in run(python, "-m", "ltx_train", "fit", "--cfg", "job", "model=ltx2_3_22b").stdout
    where = run(python, "-c", "from ltx_train import config; print(config.config_dir())").stdout
    assert str(tmp_path) in where
    assert "did you mean" in run(command, "fit", "optm.lr=1", code=77).stderr
    assert "no prepared data" in run(command, "fit", "model.weights=random", code=78).stderr
