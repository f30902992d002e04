"""Try collectives of two NCCL ranks on one GPU, and print one line of JSON with the outcome.

NCCL refuses two ranks on one device since version 2.5 ("Duplicate GPU detected"). Then the line has
its message, and collectives over NCCL remain untested on a machine with one GPU.
"""

import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from ranks import free_port

TIMEOUT = timedelta(seconds=40)


def run_rank(rank: int, port: int, backend: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    device = torch.device("cuda", 0) if backend == "nccl" else torch.device("cpu")
    dist.init_process_group(backend, rank=rank, world_size=2, timeout=TIMEOUT)
    x = torch.full((1024,), float(rank + 1), device=device)
    dist.all_reduce(x)
    gathered = [torch.empty_like(x) for _ in range(2)]
    dist.all_gather(gathered, x)
    assert x.tolist() == [3.0] * 1024 and all(torch.equal(tensor, x) for tensor in gathered)
    dist.destroy_process_group()


def main() -> None:
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    try:
        mp.spawn(run_rank, (free_port(), backend), nprocs=2)
        outcome = f"two {backend} ranks on one device reduced and gathered correctly"
    except Exception as error:  # also of the spawned ranks
        lines = str(error).strip().splitlines()
        reason = next((line for line in lines if "uplicate GPU" in line), lines[-1])
        outcome = f"refused: {reason.strip()[:300]}"
    print(json.dumps({"nccl": outcome}))


if __name__ == "__main__":
    main()
