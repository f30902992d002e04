"""Times are divided by a measured share of the roofline, and without one they are lower bounds."""

from dataclasses import replace
from pathlib import Path

import pytest
from test_configs import REPRESENTATIVES, reduce_recipe

from ssl_pretrain.planning import hardware, plan
from ssl_pretrain.planning.communication import Cluster
from ssl_pretrain.planning.estimate import Estimate
from ssl_pretrain.planning.measured_shares import COLOR, MEASURED_SHARES, describe_share

RESULT_PAGE = Path(__file__).parents[2] / "docs" / "results" / "gpu.md"


def describe(run, gpu, **parallel):
    run = replace(
        run,
        plan=replace(run.plan, gpu=gpu, num_images=10_000),
        launch=replace(run.launch, nodes=1, gpus_per_node=1),
        parallel=replace(run.parallel, **parallel),
    )
    return plan.describe(run).splitlines()


def find_line(lines, start):
    return next(line for line in lines if line.startswith(start))


@pytest.fixture
def run(tmp_path):
    path = next(path for path in REPRESENTATIVES if path.stem == "simclr_imagenet")
    return reduce_recipe(path, tmp_path)


def test_a_measured_share_is_named_with_its_source_and_lengthens_the_times(run):
    lines = describe(run, "H200")
    page = "revision b09de66, docs/results/gpu.md"
    assert [line for line in lines if line.startswith("share of the roofline")] == [
        f"share of the roofline: 65%, measured on H200 for ResNet, eager (simclr_resnet50, {page})",
        f"share of the roofline: 8%, measured on H200 for color and copy (simclr_resnet50, {page})",
    ]
    assert "at least" not in find_line(lines, "time per step")
    machine = replace(hardware.MACHINES["H200"], launch_seconds=0.0)
    bound, measured = (
        Estimate(run, Cluster(1, 1), replace(machine, roofline_share=share, color_share=share / 2))
        for share in (1.0, 0.65)
    )
    times, measured_times = bound.step_time(4), measured.step_time(4)
    for name in ("compute_seconds", "loss_seconds", "optimizer_seconds", "color_seconds"):
        assert getattr(measured_times, name) == pytest.approx(getattr(times, name) / 0.65)


def test_without_a_measurement_the_plan_says_so_and_gives_lower_bounds(run):
    lines = describe(run, "H100")
    assert (
        "share of the roofline: not measured on H100 for ResNet, eager; the times are lower bounds"
    ) in lines
    assert find_line(lines, "time per step").startswith("time per step: at least ")
    duration = find_line(lines, "epochs per day")
    assert duration.startswith("epochs per day: at most ") and "takes at least " in duration


def test_a_compiled_step_without_a_measurement_has_no_lower_bound(run):
    lines = describe(run, "H200", compile=True)
    assert (
        "share of the roofline: not measured on H200 for ResNet, compiled; the times are the "
        "roofline of the step without compilation"
    ) in lines
    assert "at least" not in find_line(lines, "time per step")


def test_color_takes_the_bytes_of_its_kernels(run):
    crops = run.views.crops
    crops["global"].blur = 0.5
    estimate = Estimate(run, Cluster(1, 1), hardware.MACHINES["H200"])
    pixels = sum(crop.count * 3 * crop.size**2 for crop in crops.values())
    # uint8 twice, bfloat16 once, and two float32 buffers written and read for half of the images
    expected_bytes = pixels * (1 + 1 + 2 + 0.5 * 16)
    assert len(crops) == 1
    assert estimate.color_seconds_per_image == pytest.approx(expected_bytes / (4.8e12 * 0.85))


def test_each_kind_of_work_has_one_measurement_which_the_result_page_shows():
    keys = [(entry.gpu, entry.network, entry.compiled) for entry in MEASURED_SHARES]
    assert len(keys) == len(set(keys))
    page = RESULT_PAGE.read_text()
    for entry in MEASURED_SHARES:
        assert entry.gpu in hardware.MACHINES
        assert entry.source in describe_share(entry.gpu, entry.network, entry.compiled)
        if entry.network != COLOR:
            step = entry.source.partition(", revision")[0]
            row = find_line(page.splitlines(), f"| {step} |")
            assert f" {entry.share:.0%} " in row
