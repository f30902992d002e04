"""What every method promises, method by method: ranks, parts, resuming, masked steps, and ten golden losses."""

from __future__ import annotations

import traceback

import contract
import pytest
import torch
from conftest import run_ranks

from ssl_pretrain import methods
from ssl_pretrain.optim.schedules import Progress

pytestmark = pytest.mark.promise

NAMES = methods.names()


def same(got, expected, rtol=1e-9, atol=1e-10):
    assert got.keys() == expected.keys()
    for name, value in got.items():
        torch.testing.assert_close(
            value,
            expected[name],
            rtol=rtol,
            atol=atol,
            msg=lambda text, name=name: f"{name}: {text}",
        )


WHOLE = {"steps": 2, "precision": "float64"}
SHIPPED = {"steps": 2}  # in the precision of a run on CPU, float32
ROUNDING = 5  # times the rounding of one process in float32, which is up to 1e-3 of a tensor's largest entry for SwAV


def in_groups(name):
    return {**WHOLE, "group": 8, **getattr(contract.test_file(name), "IN_PARTS", {})}


def _all(names, groups):
    """By method: its runs on this rank, or what went wrong. All methods in one set of processes, as starting them takes longest."""
    found = {}
    for name in names:
        try:
            found[name] = [
                contract.run(name, **variant)
                for variant in [WHOLE, SHIPPED] + [in_groups(name)] * groups
            ]
        except Exception:
            found[name] = traceback.format_exc()
    return found


@pytest.fixture(scope="module")
def on_ranks(request):
    """on_ranks[world_size][rank][name], of the methods whose tests were asked for."""
    names = sorted(
        {
            item.callspec.params["name"]
            for item in request.session.items
            if hasattr(item, "callspec") and item.path == request.path
        }
    )
    return {size: run_ranks(_all, names, size == 3, world_size=size) for size in (2, 3)}


@pytest.mark.parametrize("name", NAMES)
def test_ranks_agree_with_one_process(name, on_ranks):
    one = contract.run(name, **WHOLE)
    assert any(gradient.abs().max() > 1e-6 for gradient in one["gradients"].values())
    for size in (2, 3):
        for rank in on_ranks[size]:
            assert not isinstance(rank[name], str), rank[name]
            same(rank[name][0]["gradients"], one["gradients"])
            same(rank[name][0]["state"], one["state"])
            assert rank[name][0]["losses"] == pytest.approx(one["losses"], rel=1e-9)
            first = on_ranks[size][0][name][0]["state"]
            assert all(
                torch.equal(value, first[key]) for key, value in rank[name][0]["state"].items()
            )  # teachers, queues, centers


@pytest.mark.parametrize("name", NAMES)
def test_ranks_agree_with_one_process_as_shipped(name, on_ranks):
    exact, one = contract.run(name, **WHOLE), contract.run(name, **SHIPPED)
    for size in (2, 3):
        for rank in on_ranks[size]:
            assert not isinstance(rank[name], str), rank[name]
            for part in ("gradients", "state"):
                rounding = max(1e-5, contract.largest_error(one[part], exact[part]))
                assert (
                    contract.largest_error(rank[name][1][part], exact[part]) < ROUNDING * rounding
                )
            first = on_ranks[size][0][name][1]["state"]
            assert all(
                torch.equal(value, first[key]) for key, value in rank[name][1]["state"].items()
            )


@pytest.mark.parametrize("name", NAMES)
def test_parts_on_one_rank_equal_as_many_ranks(name, on_ranks):
    parts = contract.run(name, parts=3, **in_groups(name))
    for rank in on_ranks[3]:
        assert not isinstance(rank[name], str), rank[name]
        same(parts["gradients"], rank[name][2]["gradients"])
        same(parts["state"], rank[name][2]["state"])
        assert parts["losses"] == pytest.approx(rank[name][2]["losses"], rel=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_ten_steps_stopped_in_the_middle_are_bit_for_bit_those_that_were_not(name, tmp_path):
    straight = contract.run(name, steps=10)
    stopped = (
        contract.run(name, steps=5, folder=tmp_path)["losses"]
        + (resumed := contract.run(name, steps=5, folder=tmp_path))["losses"]
    )
    assert stopped == straight["losses"] and len(set(stopped)) == 10
    assert all(
        torch.equal(value, resumed["state"][key]) for key, value in straight["state"].items()
    )


@pytest.mark.parametrize(
    "name", [name for name in NAMES if name != "simclr"]
)  # its golden steps are the trainer's
def test_ten_golden_steps(name):
    expected = contract.golden(name)
    assert contract.run(name, steps=10, precision="float64")["losses"] == pytest.approx(
        expected, rel=1e-8
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_masked_step_moves_nothing(name):
    method, images = contract.build(name), contract.batch(name)
    with torch.no_grad():
        embeddings, targets = method(images), method.targets(images)
        for parameter in method.backbone.parameters():
            parameter.add_(0.1)
        before = {key: value.clone() for key, value in method.state_dict().items()}
        method.stepped = torch.zeros(())
        halfway = Progress(contract.NUM_STEPS // 2, contract.NUM_STEPS, contract.STEPS_PER_EPOCH)
        method.after_step(halfway, embeddings, targets)
    scheduled = getattr(
        contract.test_file(name), "SCHEDULED", set()
    )  # functions of progress, not movements
    assert all(
        torch.equal(value, before[key])
        for key, value in method.state_dict().items()
        if key not in scheduled
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_pure(name):
    method, images = contract.build(name), contract.batch(name)
    embeddings, targets = method(images), method.targets(images)
    tensors = {**embeddings, **targets, **method.state_dict()}
    before = {key: value.clone() for key, value in tensors.items()}
    first, second = (method.loss(embeddings, targets) for _ in range(2))
    assert torch.equal(first.loss, second.loss)
    same(first.logs, second.logs, rtol=0, atol=0)
    same({**embeddings, **targets, **method.state_dict()}, before, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_the_collapse_metrics_watch_two_views_of_the_same_images(name):
    method, images = contract.build(name), contract.batch(name)
    embeddings, targets = method(images), method.targets(images)
    kept = [
        {key: z for key, z in tensors.items() if key not in method.transient}
        for tensors in (embeddings, targets)
    ]
    monitored = method.monitored(*kept)
    assert len(monitored.embeddings) == contract.ROWS
    if name == "cpc":
        assert monitored.pair is None
    else:
        z_a, z_b = monitored.pair
        assert z_a is monitored.embeddings and z_a.shape == z_b.shape
        assert not torch.equal(z_a, z_b)
    has_prototypes = hasattr(method.config, "num_prototypes")
    assert (monitored.assignments is not None) is has_prototypes
    if has_prototypes:
        assert monitored.assignments.shape == (contract.ROWS,)
        assert monitored.assignments.max() < monitored.num_prototypes


@pytest.mark.parametrize("name", NAMES)
def test_the_heads_of_the_cpu_preset_are_settings(name):
    methods.find(name).Config(**methods.find(name).SMALL)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_trains_to_finite_weights(name):
    method = contract.build(name).float()
    views = [view.float() for view in contract.batch(name).views]
    contract.one_step(
        method,
        contract.test_file(name).OPTIM,
        contract.with_views(contract.batch(name), views),
        precision="bfloat16",
    )
    assert method.stepped == 1 and all(
        value.isfinite().all()
        for value in method.state_dict().values()
        if value.is_floating_point()
    )


@pytest.mark.parametrize("name", NAMES)
def test_what_evaluations_judge_is_a_whole_backbone(name):
    method = contract.build(name)
    prefix = f"{method.evaluated}."
    assert {
        key.removeprefix(prefix) for key in method.state_dict() if key.startswith(prefix)
    } == set(method.backbone.state_dict())
    assert method.network == ("teacher" if method.evaluated.startswith("teacher") else "student")
