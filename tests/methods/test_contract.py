"""The promises of every method: ranks, micro-batches, resuming, masked steps, golden losses."""

import traceback

import contract
import pytest
import torch
from conftest import run_ranks

from ssl_pretrain import methods
from ssl_pretrain.optim.schedules import Progress

pytestmark = pytest.mark.promise

NAMES = methods.names()
FLOAT64 = {"steps": 2, "precision": "float64"}
FLOAT32 = {"steps": 2, "precision": "float32"}
# Largest allowed error of several ranks, as a multiple of the rounding error of one process in
# float32. For SwAV that rounding error is up to 1e-3 of a tensor's largest entry.
ROUNDING = 5


def group_arguments(name):
    """Return the arguments of a run with batch norm groups of 8 images."""
    overrides = getattr(contract.import_test_file(name), "WITH_MICRO_BATCHES", {})
    return {**FLOAT64, "group": 8, **overrides}


def train_one_process(name, num_ranks, **variant):
    """Train on one process. With dropout, its micro-batches are the slices of the ranks."""
    if getattr(contract.import_test_file(name), "HAS_DROPOUT", False):
        variant |= {"num_micro_batches": num_ranks, "group": contract.ROWS // num_ranks}
    return contract.train(name, **variant)


def _run_all(names, with_groups):
    """Run the methods on this rank, and return the runs of each, or a traceback.

    All methods share one set of processes, because starting processes takes longest.
    """
    runs = {}
    for name in names:
        variants = [FLOAT64, FLOAT32] + [group_arguments(name)] * with_groups
        try:
            runs[name] = [contract.train(name, **variant) for variant in variants]
        except Exception:
            runs[name] = traceback.format_exc()
    return runs


@pytest.fixture(scope="module")
def runs_on_ranks(request):
    """Return the runs by world size, rank and name, for the methods whose tests are selected."""
    items = [item for item in request.session.items if item.path == request.path]
    names = sorted({item.callspec.params["name"] for item in items if hasattr(item, "callspec")})
    return {size: run_ranks(_run_all, names, size == 3, world_size=size) for size in (2, 3)}


def assert_same_bits(state, expected):
    """Compare two states bit for bit, with their weights, teachers, queues and centers."""
    assert all(torch.equal(value, expected[key]) for key, value in state.items())


@pytest.mark.parametrize("name", NAMES)
def test_ranks_agree_with_one_process(name, runs_on_ranks):
    for size in (2, 3):
        expected = train_one_process(name, size, **FLOAT64)
        assert any(gradient.abs().max() > 1e-6 for gradient in expected["gradients"].values())
        for rank in runs_on_ranks[size]:
            assert not isinstance(rank[name], str), rank[name]
            contract.assert_equal_by_name(rank[name][0]["gradients"], expected["gradients"])
            contract.assert_equal_by_name(rank[name][0]["state"], expected["state"])
            assert rank[name][0]["losses"] == pytest.approx(expected["losses"], rel=1e-9)
            assert_same_bits(rank[name][0]["state"], runs_on_ranks[size][0][name][0]["state"])


@pytest.mark.parametrize("name", NAMES)
def test_ranks_agree_with_one_process_in_float32(name, runs_on_ranks):
    for size in (2, 3):
        exact = train_one_process(name, size, **FLOAT64)
        rounded = train_one_process(name, size, **FLOAT32)
        for rank in runs_on_ranks[size]:
            assert not isinstance(rank[name], str), rank[name]
            for key in ("gradients", "state"):
                rounding = max(1e-5, contract.largest_error(rounded[key], exact[key]))
                error = contract.largest_error(rank[name][1][key], exact[key])
                assert error < ROUNDING * rounding
            assert_same_bits(rank[name][1]["state"], runs_on_ranks[size][0][name][1]["state"])


@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_on_one_rank_equal_as_many_ranks(name, runs_on_ranks):
    one_rank = contract.train(name, num_micro_batches=3, **group_arguments(name))
    for rank in runs_on_ranks[3]:
        assert not isinstance(rank[name], str), rank[name]
        contract.assert_equal_by_name(one_rank["gradients"], rank[name][2]["gradients"])
        contract.assert_equal_by_name(one_rank["state"], rank[name][2]["state"])
        assert one_rank["losses"] == pytest.approx(rank[name][2]["losses"], rel=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_ten_steps_with_a_stop_equal_ten_uninterrupted_steps_bit_for_bit(name, tmp_path):
    uninterrupted = contract.train(name, steps=10)
    stopped = contract.train(name, steps=5, folder=tmp_path)
    resumed = contract.train(name, steps=5, folder=tmp_path)
    assert stopped["losses"] + resumed["losses"] == uninterrupted["losses"]
    assert len(set(uninterrupted["losses"])) == 10
    assert_same_bits(uninterrupted["state"], resumed["state"])


# SimCLR's ten golden steps are taken by the trainer, in test_simclr.py.
@pytest.mark.parametrize("name", [name for name in NAMES if name != "simclr"])
def test_ten_steps_have_the_golden_losses(name):
    expected = contract.read_golden(name)
    losses = contract.train(name, steps=10, precision="float64")["losses"]
    assert losses == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_a_masked_step_changes_nothing(name):
    method, images = contract.build(name), contract.random_batch(name)
    with torch.no_grad():
        embeddings, targets = method(images), method.targets(images)
        for parameter in method.backbone.parameters():
            parameter.add_(0.1)
        before = {key: value.clone() for key, value in method.state_dict().items()}
        method.step_taken = torch.zeros(())
        halfway = Progress(contract.NUM_STEPS // 2, contract.NUM_STEPS, contract.STEPS_PER_EPOCH)
        method.after_step(halfway, embeddings, targets)
    # Buffers that are a function of progress may change.
    scheduled = getattr(contract.import_test_file(name), "SCHEDULED", set())
    for key, value in method.state_dict().items():
        assert key in scheduled or torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_pure(name):
    method, images = contract.build(name), contract.random_batch(name)
    embeddings, targets = method(images), method.targets(images)
    tensors = {**embeddings, **targets, **method.state_dict()}
    before = {key: value.clone() for key, value in tensors.items()}
    first, second = (method.loss(embeddings, targets) for _ in range(2))
    assert torch.equal(first.loss, second.loss)
    contract.assert_equal_by_name(first.logs, second.logs, rtol=0, atol=0)
    tensors = {**embeddings, **targets, **method.state_dict()}
    contract.assert_equal_by_name(tensors, before, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_no_embedding_is_a_view_of_a_parameter(name):
    """FSDP frees the memory of gathered parameters while the embeddings are still in use."""
    method = contract.build(name)
    storages = {p.untyped_storage().data_ptr() for p in method.parameters()}
    for key, z in method(contract.random_batch(name)).items():
        assert z.untyped_storage().data_ptr() not in storages, key


@pytest.mark.parametrize("name", NAMES)
def test_the_collapse_metrics_compare_two_views_of_the_same_images(name):
    method, images = contract.build(name), contract.random_batch(name)
    embeddings, targets = method(images), method.targets(images)
    persistent_tensors = [
        {key: z for key, z in tensors.items() if key not in method.transient}
        for tensors in (embeddings, targets)
    ]
    monitored = method.monitored(*persistent_tensors)
    assert len(monitored.embeddings) == contract.ROWS
    if getattr(contract.import_test_file(name), "HAS_PAIR", True):
        z_a, z_b = monitored.pair
        assert z_a is monitored.embeddings and z_a.shape == z_b.shape
        assert not torch.equal(z_a, z_b)
    else:
        assert monitored.pair is None
    has_prototypes = hasattr(method.config, "num_prototypes")
    assert (monitored.assignments is not None) is has_prototypes
    if has_prototypes:
        assert monitored.assignments.shape == (contract.ROWS,)
        assert monitored.assignments.max() < monitored.num_prototypes


@pytest.mark.parametrize("name", NAMES)
def test_the_small_heads_of_the_cpu_preset_are_valid_settings(name):
    methods.find(name).Config(**methods.find(name).SMALL_CONFIG)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_trains_to_finite_weights(name):
    method, images = contract.build(name).float(), contract.random_batch(name)
    images = contract.replace_views(images, [view.float() for view in images.views])
    contract.take_step(method, contract.import_test_file(name).OPTIM, images, precision="bfloat16")
    assert method.step_taken == 1
    for key, value in method.state_dict().items():
        assert not value.is_floating_point() or value.isfinite().all(), key


@pytest.mark.parametrize("name", NAMES)
def test_the_evaluated_network_is_a_complete_backbone(name):
    method = contract.build(name)
    prefix = f"{method.evaluated_module}."
    keys = [key for key in method.state_dict() if key.startswith(prefix)]
    assert {key.removeprefix(prefix) for key in keys} == set(method.backbone.state_dict())
    assert method.evaluated_network == (
        "teacher" if method.evaluated_module.startswith("teacher") else "student"
    )
