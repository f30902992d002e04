"""Print the table of docs/correctness.md, or the rows of some methods.

    PYTHONPATH=. .venv/bin/python tests/proofs.py [METHOD ...]

Every method runs in float64 on a small network with real batch norm and the kind of
optimizer that its authors use. Each error is relative to the largest compared entry.

- Ranks: the gradients of the second step on 2 and on 3 ranks, each with different images, against
  those of one process. With dropout, its micro-batches are the slices of the ranks.
- Micro-batches: the gradients of three micro-batches on one rank against those of three ranks.
- Authors: every parameter, statistic, teacher and queue after one optimizer step (three for MoCo)
  against a step whose loss is the authors' arithmetic in plain loops, as in
  tests/methods/test_<name>.py. Entries below 0.001 count as 0.001.
"""

import sys
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "methods")]

import contract
from conftest import run_ranks
from test_contract import FLOAT64, group_arguments, train_one_process

from ssl_pretrain import methods


def measure_gradient_error(result: dict, expected_result: dict) -> float:
    gradients, expected = result["gradients"], expected_result["gradients"]
    scale = max(value.abs().max() for value in expected.values())
    return max(
        (gradients[name] - value).abs().max() / scale for name, value in expected.items()
    ).item()


def run_methods(names: list[str], use_groups: bool) -> dict:
    return {
        name: contract.train(name, **(group_arguments(name) if use_groups else FLOAT64))
        for name in names
    }


def measure_error_against_authors(name: str) -> float:
    """Return the largest error over the cases of the method's step tests."""
    errors: list[float] = []

    def record_error(result: Any, expected: Any, **_: Any) -> None:
        errors.append(contract.largest_error(result, expected))

    contract.assert_same = record_error
    for case, test in vars(contract.import_test_file(name)).items():
        if case.startswith("test_") and "_step" in case and case.endswith(("_authors", "_papers")):
            marks = [mark for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
            for values in [(value,) for value in marks[0].args[1]] if marks else [()]:
                test(*values)
    return max(errors)


def main() -> None:
    torch.set_num_threads(1)
    names = sys.argv[1:] or methods.names()
    micro_batch_results = {
        name: contract.train(name, num_micro_batches=3, **group_arguments(name)) for name in names
    }
    results_by_world_size = {
        size: run_ranks(run_methods, names, False, world_size=size) for size in (2, 3)
    }
    grouped_results = run_ranks(run_methods, names, True, world_size=3)
    columns = ["method", "against the authors", "2 ranks", "3 ranks", "3 micro-batches = 3 ranks"]
    print(f"torch {torch.__version__}\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for name in names:
        errors = [measure_error_against_authors(name)]
        for size in (2, 3):
            one_process = train_one_process(name, size, **FLOAT64)
            errors.append(
                max(
                    measure_gradient_error(rank[name], one_process)
                    for rank in results_by_world_size[size]
                )
            )
        errors.append(
            max(
                measure_gradient_error(micro_batch_results[name], rank[name])
                for rank in grouped_results
            )
        )
        print(f"| {name} | {' | '.join(f'{error:.1e}' for error in errors)} |")


if __name__ == "__main__":
    main()
