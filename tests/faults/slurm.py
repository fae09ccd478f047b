"""A real SLURM of two nodes on this machine: every daemon is a child of the test process."""

from __future__ import annotations

import os
import pwd
import socket
import subprocess
import textwrap
import time
from pathlib import Path
from types import TracebackType

from ltx_train.distributed.ranks import MEETING_PORTS


def _configuration(root: Path, nodes: int, port: int) -> str:
    host = socket.gethostname().split(".")[0]
    user = pwd.getpwuid(os.getuid()).pw_name
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20 - 512
    cores = os.cpu_count()
    # cred_expire: a requeued job waits that long; the default is two minutes.
    return textwrap.dedent(f"""\
        ClusterName=mini
        FirstJobId={port - MEETING_PORTS[0] + 10}
        SlurmctldHost={host}(127.0.0.1)
        SlurmctldPort={port}
        SlurmUser={user}
        SlurmdUser={user}
        AuthType=auth/munge
        AuthInfo=socket={root}/munge/sock,cred_expire=5
        StateSaveLocation={root}/ctld
        SlurmdSpoolDir={root}/%n
        SlurmctldPidFile={root}/slurmctld.pid
        SlurmdPidFile={root}/slurmd-%n.pid
        SlurmctldLogFile={root}/log/slurmctld.log
        SlurmdLogFile={root}/log/slurmd-%n.log
        ProctrackType=proctrack/linuxproc
        TaskPlugin=task/none
        JobAcctGatherType=jobacct_gather/none
        AccountingStorageType=accounting_storage/none
        SelectType=select/cons_tres
        SelectTypeParameters=CR_Core
        SchedulerParameters=bf_interval=1,sched_min_interval=1
        MpiDefault=none
        ReturnToService=2
        KillWait=5
        NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{port + 1}-{port + nodes}] CPUs={cores} \
        Boards=1 SocketsPerBoard=1 CoresPerSocket={cores} ThreadsPerCore=1 RealMemory={memory} State=UNKNOWN
        PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
        """)


class Slurm:
    """`with Slurm(folder) as slurm:` and its `env` for commands; nodes are n1, n2."""

    def __init__(self, root: Path, nodes: int = 2) -> None:
        # Test processes side by side, also of another checkout, have a cluster each: below the ports that the system
        # gives away by itself. Of 40 ports the first are the daemons'; at those from the tenth on its jobs' ranks meet.
        self.root, self._nodes, self._port = root, nodes, MEETING_PORTS[0] + 40 * (os.getpid() % 490)
        self._daemons: list[subprocess.Popen[bytes]] = []
        path = f"/usr/sbin:/sbin:{os.environ['PATH']}"
        self.env = {**os.environ, "SLURM_CONF": str(root / "slurm.conf"), "PATH": path}

    def __enter__(self) -> Slurm:
        root = self.root
        for name in ("ctld", "log", "munge", *(f"n{i + 1}" for i in range(self._nodes))):
            (root / name).mkdir(parents=True, exist_ok=True)
        (root / "munge").chmod(0o711)
        key = root / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        (root / "slurm.conf").write_text(_configuration(root, self._nodes, self._port))
        (root / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        munge = [f"--{n}={root}/munge/{f}" for n, f in (("socket", "sock"), ("pid-file", "pid"), ("log-file", "log"))]
        self._start("munged", "-F", "--force", f"--key-file={key}", *munge, f"--seed-file={root}/munge/seed")
        self._until((root / "munge" / "sock").exists)
        conf = str(root / "slurm.conf")
        self._start("slurmctld", "-D", "-f", conf)
        for number in range(self._nodes):
            self._start("slurmd", "-D", "-f", conf, "-N", f"n{number + 1}")
        self._until(lambda: self("sinfo", "-h", "-o", "%t %D").strip() == f"idle {self._nodes}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        subprocess.run(["scancel", "-u", str(os.getuid())], env=self.env, capture_output=True, timeout=20, check=False)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def __call__(self, *arguments: str) -> str:
        """A SLURM command's output; whether it succeeded is seen in what it does."""
        return subprocess.run(arguments, env=self.env, capture_output=True, text=True, check=False).stdout

    def state(self, job: str) -> str:
        found = [w for w in self("scontrol", "show", "job", job).split() if w.startswith("JobState=")]
        return found[0].removeprefix("JobState=") if found else ""

    def _start(self, *arguments: str) -> None:
        with (self.root / "log" / f"{Path(arguments[0]).name}.out").open("ab") as log:
            self._daemons.append(
                subprocess.Popen(
                    arguments, env=self.env, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
                )
            )

    @staticmethod
    def _until(condition) -> None:  # type: ignore[no-untyped-def]
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline, "SLURM did not come up"
            time.sleep(0.1)
