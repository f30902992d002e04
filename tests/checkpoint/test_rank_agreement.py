"""Ranks that were started differently refuse to train, and every rank gives the reason."""

import re
import shutil
import socket

from conftest import run_ranks

from ssl_pretrain.checkpoint import rank_agreement
from ssl_pretrain.distributed import process_group

METHOD_MODULE = "ssl_pretrain.methods.simclr"
SETTINGS = {
    "seed": 0,
    "method": {"name": "simclr", "temperature": 0.2},
    "data": {"root": "/a", "num_workers": 2},
    "launch": {"ranks": 3},
}


def get_common_answer(function, *arguments, world_size=3):
    """Run a function on all ranks and return their common answer without the host name."""
    answers = run_ranks(function, *arguments, world_size=world_size)
    assert len(set(answers)) == 1
    return answers[0].replace(f" ({socket.gethostname()})", "")


def run_check(check, *arguments):
    """Return the message of the check's error, or "agreed"."""
    try:
        check(*arguments)
    except ValueError as error:
        return str(error)
    return "agreed"


def check_settings(changes, rank):
    settings = SETTINGS | changes if process_group.rank() == rank else SETTINGS
    return run_check(rank_agreement.check_settings_and_code, settings, METHOD_MODULE)


def test_different_settings_are_refused():
    remedy = "start every rank with the same configuration and overrides"
    assert get_common_answer(check_settings, {"seed": 1}, 2) == (
        f"the ranks disagree: seed: 0 on rank 0 and 1 more, 1 on rank 2; {remedy}"
    )
    method = {"name": "simclr", "temperature": 0.5, "queue": 8}
    assert get_common_answer(check_settings, {"method": method}, 2) == (
        "the ranks disagree: method.queue: absent on rank 0 and 1 more, 8 on rank 2; "
        f"method.temperature: 0.2 on rank 0 and 1 more, 0.5 on rank 2; {remedy}"
    )


def test_settings_of_one_machine_may_differ():
    changes = {"data": {"root": "/b", "num_workers": 9}, "launch": {"ranks": 1}}
    assert get_common_answer(check_settings, changes, 1) == "agreed"


def check_with_other_versions():
    if process_group.rank() == 1:
        versions = rank_agreement.list_versions() | {"timm": "0.0.1", "revision": "another"}
        rank_agreement.list_versions = lambda: versions
    return run_check(rank_agreement.check_settings_and_code, SETTINGS, METHOD_MODULE)


def test_different_versions_are_refused():
    expected = (
        r"the ranks disagree: timm: '[\d.]+' on rank 0 and 1 more, '0\.0\.1' on rank 1; "
        r"install the same versions on every machine"
    )
    assert re.fullmatch(expected, get_common_answer(check_with_other_versions))


def check_with_other_code(folder):
    if process_group.rank() == 1:
        rank_agreement.PACKAGE = folder / "ssl_pretrain"
    return run_check(rank_agreement.check_settings_and_code, SETTINGS, "x")


def test_different_code_is_refused(tmp_path):
    copy = tmp_path / "ssl_pretrain"
    ignore = shutil.ignore_patterns("__pycache__", "configs")
    shutil.copytree(rank_agreement.PACKAGE, copy, ignore=ignore)
    assert get_common_answer(check_with_other_code, tmp_path, world_size=2) == "agreed"
    with (copy / "optim" / "schedules.py").open("a") as file:
        file.write("# changed\n")
    expected = (
        r"the ranks disagree: ssl_pretrain/\S+\.py: '\w+' on rank 0, '\w+' on rank 1; "
        r"give every machine the same revision of the code"
    )
    assert re.fullmatch(expected, get_common_answer(check_with_other_code, tmp_path, world_size=2))


def check_data(fingerprints, counts):
    rank = process_group.rank()
    return run_check(rank_agreement.check_data, fingerprints[rank], counts[rank], "")


def test_different_data_are_refused():
    answer = get_common_answer(check_data, ["f", "f", "g"], [200, 200, 199])
    assert "data.root: training images: 200 on rank 0 and 1 more, 199 on rank 2" in answer
    answer = get_common_answer(check_data, ["f", "g", "f"], [200, 200, 200])
    assert "data.root: fingerprint: 'f' on rank 0 and 1 more, 'g' on rank 1" in answer
    assert "training images" not in answer
    assert answer.endswith("; give every machine the same copy of the data set")


def check_checkpoints(runs):
    process_group._timeout_seconds = 4.0
    answer = run_check(rank_agreement.check_checkpoints, runs[process_group.rank()])
    return re.sub(r"\(/\S+\)", "(RUN)", answer)


def test_checkpoints_that_a_machine_does_not_see_are_refused(tmp_path):
    """Ranks that see the folder would resume while the others would start from step 0."""
    for name, content in (("a", "{}"), ("b", "{}"), ("c", "{ }")):
        folder = tmp_path / name / "checkpoints" / "step_00000004"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(content)
    a, b, c = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    answer = get_common_answer(check_checkpoints, [a, b, tmp_path / "missing"])
    assert "output: checkpoints: 'step_00000004 " in answer and "'' on rank 2" in answer
    assert answer.endswith("on a file system that every machine mounts at that path")
    assert "on rank 2" in get_common_answer(check_checkpoints, [a, b, c])
    assert get_common_answer(check_checkpoints, [a, b, b]) == "agreed"
