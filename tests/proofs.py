"""What was verified, as the README's table has it: PYTHONPATH=. .venv/bin/python tests/proofs.py

For every method, in float64, on a small network with real batch norm, two optimizer steps of its authors' kind of optimizer:
the largest difference, over the largest entry, between the last step's gradients of one process and those of 2 and of 3 ranks
with different images on each; and between three parts on one rank and three ranks. Against the authors: the largest difference of
any parameter, statistic, teacher or queue, over that tensor's largest entry (or 0.001), after an optimizer step (three for MoCo) whose
loss is their arithmetic in plain loops: the cases of tests/methods/test_<name>.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "methods")]

import contract
from conftest import run_ranks
from test_contract import WHOLE, in_groups

from ssl_pretrain import methods


def largest(got: dict, want: dict) -> float:
    scale = max(value.abs().max() for value in want["gradients"].values())
    return max(
        (got["gradients"][name] - value).abs().max() / scale
        for name, value in want["gradients"].items()
    ).item()


def everything(names: list[str], groups: bool) -> dict:
    return {name: contract.run(name, **(in_groups(name) if groups else WHOLE)) for name in names}


def against_the_authors(name: str) -> float:
    """The largest error of all cases of the method's step tests."""
    errors: list[float] = []
    contract.assert_same = lambda got, expected, skip="": errors.append(
        contract.largest_error(got, expected, skip)
    )
    for case, test in vars(contract.test_file(name)).items():
        if case.startswith("test_") and "_step" in case and case.endswith(("_authors", "_papers")):
            marks = [mark for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
            for values in [(value,) for value in marks[0].args[1]] if marks else [()]:
                test(*values)
    return max(errors)


def main() -> None:
    torch.set_num_threads(1)
    names = methods.names()
    alone, in_parts = (
        everything(names, False),
        {name: contract.run(name, parts=3, **in_groups(name)) for name in names},
    )
    ranks = {size: run_ranks(everything, names, False, world_size=size) for size in (2, 3)}
    grouped = run_ranks(everything, names, True, world_size=3)
    print(
        f"torch {torch.__version__}\n| method | against the authors | 2 ranks | 3 ranks | 3 parts = 3 ranks |\n|---|---|---|---|---|"
    )
    for name in names:
        errors = [against_the_authors(name)] + [
            max(largest(rank[name], alone[name]) for rank in ranks[size]) for size in (2, 3)
        ]
        errors.append(max(largest(in_parts[name], rank[name]) for rank in grouped))
        print(f"| {name} | {' | '.join(f'{error:.1e}' for error in errors)} |")


if __name__ == "__main__":
    main()
