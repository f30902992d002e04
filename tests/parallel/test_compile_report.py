"""The line and the metric about compilation."""

import subprocess
import sys

import pytest

from ssl_pretrain.parallel import compile_report
from ssl_pretrain.system.import_path import child_environment

CODE = """
import torch
from ssl_pretrain.parallel import compile_report
compile_report.observe()
assert compile_report.measure() == {}
layer = torch.nn.Linear(3, 2)
function = torch.compile(lambda x: layer(x).relu(), dynamic=False)
function(torch.ones(4, 3)).sum().backward()
(seconds,) = compile_report.measure().values()
assert 0 < seconds < 600
assert compile_report.measure() == {}
with torch.no_grad():
    function(torch.ones(4, 3))
assert compile_report.measure()["compile_seconds"] > seconds
"""


@pytest.mark.parametrize(
    ("num_cached", "is_default_cache", "expected"),
    [
        (
            0,
            True,
            "compilation: 84 s for 12 graphs, none of them from /tmp/torchinductor_me; set "
            "TORCHINDUCTOR_CACHE_DIR to a folder that later jobs can read, to save this time",
        ),
        (0, False, "compilation: 84 s for 12 graphs, none of them from /tmp/torchinductor_me"),
        (5, False, "compilation: 84 s for 12 graphs, 5 of them from /tmp/torchinductor_me"),
        (12, True, "compilation: 84 s for 12 graphs, all of them from /tmp/torchinductor_me"),
    ],
)
def test_the_line_names_the_time_the_graphs_and_the_cache(num_cached, is_default_cache, expected):
    line = compile_report.describe(83.6, 12, num_cached, "/tmp/torchinductor_me", is_default_cache)
    assert line == expected


def test_nothing_is_reported_without_compilation():
    assert compile_report.measure() == {}


@pytest.mark.full
def test_a_second_process_loads_all_graphs_from_the_cache(tmp_path):
    environment = child_environment() | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    shares = []
    for _ in range(2):  # the folder is not the default, so there is no remedy
        result = subprocess.run(
            [sys.executable, "-c", CODE],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        lines = [line for line in result.stderr.splitlines() if line.startswith("compilation: ")]
        assert len(lines) == 1
        shares.append(lines[0].partition(" s for ")[2])
    assert shares == [
        f"2 graphs, none of them from {tmp_path}",
        f"2 graphs, all of them from {tmp_path}",
    ]
