"""Ranks that were started with different things refuse to train, and every rank says why."""

from __future__ import annotations

import re
import socket

import pytest
from conftest import run_ranks

from ssl_pretrain.checkpoint import rank_agreement
from ssl_pretrain.distributed import process_group

SETTINGS = {
    "seed": 0,
    "method": {"name": "simclr", "temperature": 0.2},
    "data": {"root": "/a", "num_workers": 2},
    "launch": {"ranks": 3},
}


def said(function, *arguments, world_size=3):
    answers = run_ranks(function, *arguments, world_size=world_size)
    assert len(set(answers)) == 1, "every rank says the same"
    return answers[0].replace(f" ({socket.gethostname()})", "")


def _refused(function, *arguments):
    try:
        function(*arguments)
    except ValueError as error:
        return str(error)
    return "agreed"


def _programs(changes, rank):
    values = SETTINGS | changes if process_group.rank() == rank else SETTINGS
    return _refused(rank_agreement.check_programs, values, "ssl_pretrain.methods.simclr")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"seed": 1}, "seed: 0 on rank 0 and 1 more, 1 on rank 2"),
        (
            {"method": {"name": "simclr", "temperature": 0.5, "queue": 8}},
            "method.queue: absent on rank 0 and 1 more, 8 on rank 2; method.temperature: 0.2 on rank 0 and 1 more, 0.5 on rank 2",
        ),
    ],
)
def test_settings(changes, expected):
    remedy = "start every rank with the same configuration and the same key=value"
    assert said(_programs, changes, 2) == f"the ranks disagree: {expected}; {remedy}"


def test_what_belongs_to_a_machine_may_differ():
    assert (
        said(_programs, {"data": {"root": "/b", "num_workers": 9}, "launch": {"ranks": 1}}, 1)
        == "agreed"
    )


def _other_versions():
    if process_group.rank() == 1:
        real = rank_agreement.provenance.versions
        rank_agreement.provenance.versions = lambda: (
            real() | {"timm": "0.0.1", "revision": "another"}
        )
    return _refused(rank_agreement.check_programs, SETTINGS, "ssl_pretrain.methods.simclr")


def test_versions():
    text = said(_other_versions)
    assert re.fullmatch(
        r"the ranks disagree: timm: '[\d.]+' on rank 0 and 1 more, '0.0.1' on rank 1; .*same versions.*",
        text,
    )


def _other_code(package, own):
    if process_group.rank() == 1:
        rank_agreement.PACKAGE = package / "ssl_pretrain"
    return _refused(rank_agreement.check_programs, SETTINGS, own)


def test_code(tmp_path):
    import shutil

    copy = tmp_path / "ssl_pretrain"
    shutil.copytree(
        rank_agreement.PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "configs")
    )
    assert said(_other_code, tmp_path, "x", world_size=2) == "agreed"
    with (copy / "optim" / "larc.py").open("a") as file:
        file.write("# changed\n")
    text = said(_other_code, tmp_path, "x", world_size=2)
    assert re.fullmatch(
        r"the ranks disagree: ssl_pretrain/\S+\.py: '\w+' on rank 0, '\w+' on rank 1; give every machine the same revision of the code",
        text,
    )


def _data(fingerprints, numbers):
    rank = process_group.rank()
    return _refused(rank_agreement.check_data, fingerprints[rank], numbers[rank], "")


def test_data_of_another_number_and_of_the_same_number():
    text = said(_data, ["f", "f", "g"], [200, 200, 199])
    assert "data.root: training images: 200 on rank 0 and 1 more, 199 on rank 2" in text
    text = said(_data, ["f", "g", "f"], [200, 200, 200])
    assert (
        "data.root: fingerprint: 'f' on rank 0 and 1 more, 'g' on rank 1" in text
        and "training images" not in text
    )
    assert text.endswith("; give every machine the same copy of the data set")


def _checkpoints(runs):
    process_group._timeout_seconds = 4.0
    run = runs[process_group.rank()]
    return _refused(
        rank_agreement.check_checkpoints, "r", lambda: sorted(run.glob("*/manifest.json"))
    ).replace("\\", "")


def test_checkpoints_that_a_machine_does_not_see(tmp_path):
    """A folder that only the first machine has: its ranks would resume, the others would start anew."""
    for name in ("a", "b", "c"):
        (tmp_path / name / "step_00000004").mkdir(parents=True)
        (tmp_path / name / "step_00000004" / "manifest.json").write_text(
            "{}" if name != "c" else "{ }"
        )
    runs = [tmp_path / "a", tmp_path / "b", tmp_path / "nowhere"]
    text = said(_checkpoints, runs)
    assert (
        "output: checkpoints: 'step_00000004 " in text
        and "'' on rank 2" in text
        and "a file system that every machine" in text
    )
    assert "on rank 2" in said(_checkpoints, [tmp_path / "a", tmp_path / "b", tmp_path / "c"])
    assert said(_checkpoints, [tmp_path / "a", tmp_path / "b", tmp_path / "b"]) == "agreed"
