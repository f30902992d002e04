"""The first columns of the table of methods, measured: PYTHONPATH=. .venv/bin/python tests/proofs.py [NAME ...]

Error against the authors: the largest difference of any parameter or buffer, over that tensor's largest entry (or 0.001), after an
optimizer step (three for MoCo) whose loss is their arithmetic in plain loops, float64: the cases of tests/methods/test_NAME.py.
1 = 2 = 3 ranks: the same of any parameter's gradient in the second step, averaged over ranks by DDP with batch norm over all
of them, between one process and 2 and 3 ranks with different images on each.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "methods")]

import contract
from conftest import run_ranks

from ssl_pretrain import methods


def error_against_the_authors(name: str) -> float:
    """The largest of all cases of the method's step tests."""
    errors: list[float] = []
    file = contract.test_file(name)
    contract.assert_same = lambda got, expected, skip="": errors.append(contract.largest_error(got, expected, skip))
    for case, test in vars(file).items():
        if case.startswith("test_") and "_step" in case and case.endswith(("_authors", "_papers")):
            marks = [mark for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
            for values in [(value,) for value in marks[0].args[1]] if marks else [()]:
                test(*values)
    return max(errors)


def gradients(names: list[str]) -> dict[str, Any]:
    return {name: contract.run(name)["gradients"] for name in names}


def main() -> None:
    torch.set_num_threads(1)
    names = sys.argv[1:] or methods.names()
    alone = gradients(names)
    ranks = {size: run_ranks(gradients, names, world_size=size) for size in (2, 3)}
    print(f"torch {torch.__version__}\n| method | error against the authors | 2 ranks | 3 ranks |\n|---|---|---|---|")
    for name in names:
        errors = [max(contract.largest_error(rank[name], alone[name]) for rank in ranks[size]) for size in (2, 3)]
        print(f"| {name} | {error_against_the_authors(name):.1e} | {errors[0]:.1e} | {errors[1]:.1e} |", flush=True)


if __name__ == "__main__":
    main()
