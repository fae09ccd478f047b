"""`ltx-train bench` over several "hosts" of one machine, with the bytes that cross between them.

    two_hosts.py OUT.json CASE HOSTS DEVICES SETTING ...      (LTX_TRAIN_BLOCKS=4: fewer blocks)

NCCL takes ranks with different NCCL_HOSTID for different hosts and sends between them through sockets on the loopback
interface, whose counters give the bytes. Several hosts may share a GPU. Step times hold for that link alone, some GB/s.
`two_hosts.py link` measures it: an all-gather between two ranks of different hosts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

FEWER = Path(__file__).with_name("fewer_blocks.py")


def loopback_bytes() -> int:
    line = next(row for row in Path("/proc/net/dev").read_text().splitlines() if row.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[0])


def environment(rank: int, hosts: int, devices: int, count: int, port: int) -> dict[str, str]:
    host, local = divmod(rank, devices)
    visible = ",".join(str((host * devices + index) % count) for index in range(devices))
    return {
        **os.environ, "RANK": str(rank), "WORLD_SIZE": str(hosts * devices), "LOCAL_RANK": str(local),
        "LOCAL_WORLD_SIZE": str(devices), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "CUDA_VISIBLE_DEVICES": visible, "NCCL_HOSTID": f"host{host}", "NCCL_SOCKET_IFNAME": "lo",
        "GLOO_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1", "NCCL_NET": "Socket", "NCCL_NSOCKS_PERTHREAD": "4",
        "NCCL_SOCKET_NTHREADS": "4",
    }  # fmt: skip


def together(command: list[str], hosts: int, devices: int, count: int, seconds: float) -> int:
    """Runs the command on all ranks; the largest exit code."""
    port = 29600 + os.getpid() % 1000
    ranks = [
        subprocess.Popen(command, env=environment(rank, hosts, devices, count, port)) for rank in range(hosts * devices)
    ]
    deadline, codes = time.monotonic() + seconds, list[int]()
    for process in ranks:
        try:
            codes.append(process.wait(max(1.0, deadline - time.monotonic())))
        except subprocess.TimeoutExpired:
            process.kill()
            codes.append(124)
    return max(codes, key=abs)


def link() -> int:
    return together([sys.executable, __file__, "link-rank"], 2, 1, 2, 120)


def link_rank() -> int:
    """On each of two ranks: GB/s that an all-gather of 256 MiB a rank brings into a host."""
    import torch
    import torch.distributed as dist

    rank = int(os.environ["RANK"])
    dist.init_process_group("nccl", device_id=torch.device("cuda", 0))
    part = torch.ones(2**28, dtype=torch.uint8, device="cuda")
    whole = torch.empty(2 * len(part), dtype=torch.uint8, device="cuda")
    for _ in range(2):
        dist.all_gather_into_tensor(whole, part)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(4):
        dist.all_gather_into_tensor(whole, part)
    torch.cuda.synchronize()
    if rank == 0:
        print(json.dumps({"link_gbs": round(4 * len(part) / (time.perf_counter() - started) / 1e9, 2)}), flush=True)
    dist.destroy_process_group()
    return 0


def main() -> int:
    import torch

    out, case, hosts, devices = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    count, steps, warmup = torch.cuda.device_count(), 3, 2
    command = [
        sys.executable, "-W", "ignore", str(FEWER), "bench", *sys.argv[5:], f"strategy.devices={devices}",
        f"bench.case={case}", f"bench.out={out}", f"bench.steps={steps}", f"bench.warmup={warmup}",
    ]  # fmt: skip
    before = loopback_bytes()
    code = together(command, hosts, devices, count, 280)
    crossed = loopback_bytes() - before
    if code == 0:
        records = json.loads(out.read_text())
        # Sent and received are the same bytes on the loopback: this is what enters all hosts together.
        records[-1] |= {"hosts": hosts, "gb_between_hosts_a_step": round(crossed / (steps + warmup) / 1e9, 3)}
        out.write_text(json.dumps(records, indent=1) + "\n")
    return code


if __name__ == "__main__":
    sys.exit({"link": link, "link-rank": link_rank}.get(" ".join(sys.argv[1:]), main)())
