"""Tables of launches and of collectives per step, which tests compare with new counts.

    PYTHONPATH=. .venv/bin/python tests/cuda_offline/tables.py [CONFIG ...]

writes launches.md and collectives.md beside this file. With names of configurations, only their
rows are counted again.
"""

import sys
from collections.abc import Mapping
from pathlib import Path

FOLDER = Path(__file__).parent
if __name__ == "__main__":
    sys.path[:0] = [str(FOLDER), str(FOLDER.parent), str(FOLDER.parents[1])]

import fake_step
import pytest
import torch
from fake_ranks import NUM_RANKS, traffic_per_step
from traffic import Traffic

REMEDY = "if the change is meant, run python tests/cuda_offline/tables.py and commit the tables"
PHASES = ["color", "forward", "targets", "loss", "backward", "optimizer", "other", "total"]
KINDS = ["batch norm forward", "batch norm backward", "gather", "loss backward", "sum", "gradients"]
TORCH = ".".join(torch.__version__.split(".")[:2])
STEMS = [*fake_step.SMALL, *fake_step.IMAGENET]
TITLES = {
    "launches": f"""# Kernel launches per step with torch {TORCH}

One GPU, eager mode, bfloat16 autocast. The batch is one batch norm group, so that a norm runs once
per call. `launches.py` says how operations are counted, and `tables.py` writes this file. `targets`
is the teacher's forward pass. `other` is batch norm's snapshots, the watch for embeddings that are
not finite, and `after_step`.
""",
    "collectives": f"""# Collectives per step with torch {TORCH}

The collectives of one rank among {NUM_RANKS}, and the megabytes (10^6 bytes) that it sends over
rings, with the shipped global batch. `tables.py` writes this file. No step waits for the GPU.
`sum` stands for sums of the loss and of `after_step`. Blocks that are recomputed in the backward
pass (`parallel.activation_checkpointing`) send their batch norms' statistics twice.
""",
}
COLUMNS = {"launches": PHASES, "collectives": [*KINDS, "total"]}


def format_launches(counts: Mapping[str, int]) -> list[str]:
    """Return the cells of a row."""
    assert counts.keys() <= set(PHASES), sorted(counts)
    total = sum(counts.values())
    return [f"{counts.get(phase, 0):,}" for phase in PHASES[:-1]] + [f"{total:,}"]


def format_traffic(traffic: Traffic) -> list[str]:
    """Return the cells of a row: the number of collectives, and megabytes."""
    assert traffic.calls.keys() <= set(KINDS), sorted(traffic.calls)
    pairs = [(traffic.calls[kind], traffic.sent[kind]) for kind in KINDS]
    pairs.append((traffic.calls.total(), sum(num_bytes for _, num_bytes in pairs)))
    return [f"{calls}: {float(sent) / 1e6:,.3f}" if calls else "" for calls, sent in pairs]


def skip_unless_version(name: str) -> None:
    """Skip a test if another version of torch wrote the table, whose operations may differ."""
    version = (FOLDER / f"{name}.md").read_text("utf-8").split("\n")[0].rpartition(" ")[2]
    if version != TORCH:
        pytest.skip(f"{name}.md holds for torch {version}; this is {TORCH}")


def read(name: str) -> dict[str, list[str]]:
    """Return the cells of each row of a committed table."""
    path = FOLDER / f"{name}.md"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines
        if line.startswith("|")
    ]
    return {row[0]: row[1:] for row in cells[2:]}


def write(name: str, rows: dict[str, list[str]]) -> None:
    """Write a table."""
    lines = [["configuration", *COLUMNS[name]], ["---"] * (1 + len(COLUMNS[name]))]
    lines += [[stem, *rows[stem]] for stem in STEMS if stem in rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    (FOLDER / f"{name}.md").write_text(f"{TITLES[name]}\n{table}\n", encoding="utf-8")


def main(stems: list[str]) -> None:
    """Count the steps of some configurations, or of all."""
    launches, collectives = read("launches"), read("collectives")
    for stem in stems or STEMS:
        launches[stem] = format_launches(fake_step.launches_per_step(stem))
        collectives[stem] = format_traffic(traffic_per_step(stem))
        print(stem, *launches[stem], sep="  ", flush=True)
        write("launches", launches)
        write("collectives", collectives)


if __name__ == "__main__":
    main(sys.argv[1:])
