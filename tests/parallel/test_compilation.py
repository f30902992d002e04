"""Compiled parts: how many graphs they take, and the values that they compute."""

from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from conftest import run_ranks
from networks import run
from suites import quick_and_full

from ssl_pretrain import config as configuration
from ssl_pretrain.models import backbones
from ssl_pretrain.models.timm_networks import BackboneConfig
from ssl_pretrain.parallel import compilation, drop_path
from ssl_pretrain.views.batch import Batch

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
FLOAT64 = {"precision": "float64"}  # the order of summation changes results by less than 1e-9
HEADS = {  # small, to save time
    "dino": ["method.hidden_dim=16", "method.bottleneck_dim=8", "method.num_prototypes=16"],
    "simclr": ["method.projector_dims=[16,8]"],
    "moco_v3": ["method.hidden_dim=16", "method.dim=8"],
}


def count_graphs(monkeypatch, preset, sizes, overrides=()):
    """Return the numbers of graphs in blocks, stems and heads after a forward pass and targets."""
    torch._dynamo.reset()
    run_config = configuration.load(
        ROOT / "configs" / f"{preset}.yaml", ["data.root=x", *overrides]
    )
    torch.manual_seed(0)
    counts = dict.fromkeys(("block", "stem", "head"), 0)

    def count(kind, graph, example_inputs):
        counts[kind] += 1
        return graph.forward

    backends = {kind: partial(count, kind) for kind in counts}  # one cache of graphs per backend

    def compile_and_count(function, mode=None, **keywords):
        owner = getattr(function, "__self__", None)
        kind = "stem" if owner is None else "head" if id(owner) in head_ids else "block"
        return compile_function(function, backend=backends[kind], fullgraph=True, **keywords)

    compile_function = torch.compile
    method = run_config.method.build(backbones.build(run_config.backbone, max(sizes)))
    head_ids = {id(head) for head in compilation._heads(method)}
    monkeypatch.setattr(torch, "compile", compile_and_count)
    compilation.compile_network(method, CPU, cuda_graphs=False)
    batch = Batch(
        [torch.randn(2, 3, size, size) for size in sizes], torch.zeros(2), torch.arange(2)
    )
    embeddings, _ = method(batch), method.targets(batch)
    sum(z.float().sum() for z in embeddings.values()).backward()
    return counts


GRAPHS = [
    # Two sizes of the student's views and one of the teacher's.
    ("dino_imagenet", (32, 32, 16, 16), HEADS["dino"], {"block": 3, "stem": 3, "head": 4}),
    # The blocks of a ResNet-50 have eight shapes.
    ("simclr_imagenet", (32, 32), HEADS["simclr"], {"block": 8, "stem": 1, "head": 1}),
    # Student and teacher. The student's stem is not trained.
    (
        "moco_v3_vit_imagenet",
        (32, 32),
        HEADS["moco_v3"],
        {"block": 2, "stem": 2, "head": 3},
    ),
]


@pytest.mark.parametrize(
    ("preset", "sizes", "overrides", "expected"), quick_and_full(GRAPHS[:1], GRAPHS)
)
def test_blocks_of_one_shape_share_a_graph(monkeypatch, preset, sizes, overrides, expected):
    assert count_graphs(monkeypatch, preset, sizes, overrides) == expected


def test_compilation_keeps_the_names_of_weights():
    method = configuration.load(ROOT / "configs/dino_imagenet.yaml", HEADS["dino"]).method.build(
        backbones.build(BackboneConfig(name="test_vit", drop_path=0.1), 32)
    )
    names = list(method.state_dict())
    modules = list(dict(method.named_modules()))
    compilation.compile_network(method, CPU, cuda_graphs=False)
    assert list(method.state_dict()) == names
    assert list(dict(method.named_modules())) == modules


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scale_by_keep", [True, False])
def test_drop_path_equals_timms_bit_for_bit(dtype, scale_by_keep):
    x, images = torch.randn(64, 5, 3).to(dtype), []
    for module in (
        timm.layers.DropPath(0.3, scale_by_keep),
        drop_path.DropPath(0.3, scale_by_keep, CPU),
    ):
        torch.manual_seed(0)
        images.append(module(x))
        images.append(torch.rand(1))
    assert torch.equal(images[0], images[2])
    assert torch.equal(images[1], images[3])  # both have drawn equally many numbers
    assert torch.equal(module.eval()(x), x)


def test_a_rate_of_0_changes_nothing_and_draws_nothing():
    x, state = torch.randn(4, 3), torch.get_rng_state()
    assert torch.equal(drop_path.DropPath(0.0, True, CPU)(x), x)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_drawing_for_cuda_has_timms_values_and_rate():
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(20_000, 1, dtype=dtype)
        keep_prob = torch.tensor(0.7, dtype=torch.float64)
        factors = drop_path._draw_on_device(keep_prob, [20_000, 1], dtype, True)
        expected = timm.layers.drop_path(x, 0.3, training=True)
        assert factors.dtype == dtype
        assert torch.equal(factors.unique(), expected.unique())
        assert (factors > 0).float().mean().item() == pytest.approx(0.7, abs=0.02)


def _train_traced(name, settings):
    """Return the states of an uncompiled and a traced run. Traced operations run as they are."""
    torch.compile = partial(torch.compile, backend="eager")
    backbone = {"drop_path": 0.3} if name == "moco_v3" else {}
    return [
        run(name, 2, backbone=backbone, compile=choice, **settings)["state"]
        for choice in (False, True)
    ]


SLOW = pytest.mark.full
DDP, FSDP = {"strategy": "ddp"}, {"strategy": "fsdp"}
BFLOAT16 = {"precision": "bfloat16"}
RECOMPUTED = {"activation_checkpointing": "blocks"}


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        pytest.param("moco_v3", DDP, id="ViT, DDP", marks=SLOW),
        pytest.param("moco_v3", FSDP, id="ViT, FSDP"),
        pytest.param("moco_v3", RECOMPUTED, id="ViT, recomputed", marks=SLOW),
        pytest.param("moco_v3", BFLOAT16, id="ViT, bfloat16", marks=SLOW),
        pytest.param("simclr", DDP, id="ResNet, DDP", marks=SLOW),
        pytest.param("simclr", FSDP, id="ResNet, FSDP", marks=SLOW),
        pytest.param("simclr", RECOMPUTED, id="ResNet, recomputed", marks=SLOW),
    ],
)
def test_traced_parts_train_the_same_weights_on_two_ranks(name, settings):
    for plain, traced in run_ranks(_train_traced, name, settings, world_size=2):
        assert plain.keys() == traced.keys()
        assert [key for key in plain if not torch.equal(traced[key], plain[key])] == []


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "drop_path_rate"), [("moco_v3", 0.3), ("simclr", 0.0), ("dino", 0.3)]
)
def test_compiled_parts_train_the_same_weights(name, drop_path_rate):
    eager, compiled = (
        run(name, 2, backbone={"drop_path": drop_path_rate}, compile=choice, **FLOAT64)["state"]
        for choice in (False, True)
    )
    assert compiled.keys() == eager.keys()
    for key, value in eager.items():
        torch.testing.assert_close(compiled[key], value, rtol=1e-9, atol=1e-9)
