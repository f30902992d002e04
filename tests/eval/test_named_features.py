"""Features other than the pooled one, in every evaluation of frozen features."""

import json

import pytest
import torch
from suites import quick_and_full
from untrained_run import make_run

from ssl_pretrain.eval import attentive, knn, linear, result_text, results, retrieval, runs
from ssl_pretrain.eval import spectrum as spectrum_module
from ssl_pretrain.eval.frozen import named_features
from ssl_pretrain.eval.frozen.evaluation_split import EvaluationSplit
from ssl_pretrain.eval.frozen.named_features import Feature
from ssl_pretrain.eval.frozen.patch_tokens import TokenSequence
from ssl_pretrain.eval.html import sections
from ssl_pretrain.eval.named_evaluations import evaluate
from ssl_pretrain.models import backbones
from ssl_pretrain.models.timm_networks import BackboneConfig

VIT = BackboneConfig("test_vit")
BEIT = BackboneConfig("beit_base_patch16_224", args={"depth": 2, "embed_dim": 48, "num_heads": 3})
CAIT = BackboneConfig("cait_xxs24_224", args={"depth": 2})
MIXER = BackboneConfig("gmixer_12_224")
REGISTERS = BackboneConfig("test_vit", args={"reg_tokens": 2})


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    return make_run(folder, "backbone.name=test_vit", "data.subset=200")


@pytest.fixture(scope="module")
def resnet_folder(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "resnet", "data.subset=200")


@pytest.fixture(scope="module")
def mixer_folder(tmp_path_factory):

    folder = tmp_path_factory.mktemp("runs") / "mixer"
    return make_run(folder, f"backbone.name={MIXER.name}", "data.subset=200")


def load(path):
    return runs.load_run(path, device="cpu")


def build(config=VIT):
    return backbones.build(config, 32).eval()


def random_images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("num_layers", [1, 2, 4])
def test_class_tokens_are_bit_for_bit_those_of_timms_intermediate_layers(num_layers):
    backbone, images = build(), random_images()
    layers = backbone.model.get_intermediate_layers(
        images, num_layers, return_prefix_tokens=True, norm=True
    )
    expected = torch.cat([prefix[:, 0] for _, prefix in layers], dim=1)
    assert torch.equal(Feature(backbone, f"last{num_layers}")(images), expected)
    patches, prefix = layers[-1]
    with_mean = torch.cat([prefix[:, 0], patches.mean(dim=1)], dim=1)
    assert torch.equal(Feature(backbone, "cls_mean")(images), with_mean)
    assert torch.equal(Feature(backbone, "patch_mean")(images), patches.mean(dim=1))


@torch.no_grad()
def test_the_prefix_has_the_class_token_and_the_registers():
    backbone, images = build(REGISTERS), random_images()
    tokens = backbone.model.forward_features(images)[:, :3]
    feature = Feature(backbone, "prefix")
    assert torch.equal(feature(images), tokens.flatten(1))
    assert feature.feature_dim == 3 * backbone.token_dim


@torch.no_grad()
def test_the_mean_over_a_feature_map_is_a_resnets_pooled_feature():
    backbone, images = build(BackboneConfig("test_resnet")), random_images()
    torch.testing.assert_close(Feature(backbone, "patch_mean")(images), backbone(images))


@pytest.mark.parametrize("name", ["pooled", "prefix", "patch_mean", "cls_mean", "last3"])
def test_the_width_is_that_of_the_values(name):
    backbone = build(REGISTERS)
    feature = Feature(backbone, name)
    with torch.no_grad():
        assert feature(random_images()).shape == (3, feature.feature_dim)
    assert str(feature).endswith(f", {feature.feature_dim} numbers")


@torch.no_grad()
def test_sequences_of_tokens_have_their_width_and_number():
    backbone, images = build(REGISTERS), random_images()
    for name in ("patches", "prefix", "last2"):
        sequence = TokenSequence(backbone, name)
        assert sequence(images).shape == (3, sequence.count(32), sequence.dim)
    patches = TokenSequence(backbone)(images)
    assert torch.equal(TokenSequence(backbone, "last2")(images)[..., -patches.shape[2] :], patches)


def test_pooled_features_are_computed_by_the_backbone_itself(run_folder):
    run = load(run_folder)
    assert named_features.network_of_feature(run.backbone, "pooled") is run.backbone


EVALUATIONS = {
    "knn": (knn, "--k 5 --shifts 0", "accuracy, %"),
    "linear": (linear, "--epochs 1", "accuracy, %"),
    "linear_moco": (linear, "--epochs 1 --protocol moco", "accuracy, %"),
    "retrieval": (retrieval, "", "%"),
    "spectrum": (spectrum_module, "", "spectrum"),
}


@pytest.mark.parametrize("name", EVALUATIONS)
def test_the_result_names_the_feature_beside_the_numbers(run_folder, capsys, name):
    module, options, measure = EVALUATIONS[name]
    folder = run_folder / "eval"
    module.main([str(run_folder), "--device", "cpu", *options.split()])
    pooled = (folder / f"{name}.json").read_text()
    assert json.loads(pooled)["measure"] == measure
    capsys.readouterr()
    module.main([str(run_folder), "--device", "cpu", *options.split(), "--feature", "last2"])
    assert f"last2, {measure}" in capsys.readouterr().out
    result = json.loads((folder / f"{name}_last2.json").read_text())
    assert result["measure"] == f"last2, {measure}"
    entry = "embeddings" if name == "spectrum" else "feature"
    dim = load(run_folder).backbone.token_dim
    assert ("last2, 128 dimensions" if name == "spectrum" else f"{2 * dim} numbers") in (
        result["protocol"][entry]
    )
    assert (folder / f"{name}.json").read_text() == pooled  # the pooled result is kept
    numbers = [row["metrics"] for row in result["rows"] if row["features"] == "pretrained"]
    others = [
        row["metrics"] for row in json.loads(pooled)["rows"] if row["features"] == "pretrained"
    ]
    assert numbers != others


def test_an_attentive_probe_names_its_tokens(run_folder, capsys):
    arguments = [str(run_folder), "--device", "cpu", "--epochs", "1", "--feature", "last2"]
    attentive.main([*arguments, "--rows", "pretrained"])
    assert "last2, accuracy, %" in capsys.readouterr().out
    result = json.loads((run_folder / "eval/attentive_last2.json").read_text())
    assert "patch tokens of the last 2 layers" in result["protocol"]["feature"]
    attentive.main([*arguments, "--protocol", "vjepa"])
    assert (run_folder / "eval/attentive_vjepa_last2_grid.json").is_file()


def test_the_python_api_takes_features(run_folder):
    evaluation = evaluate(load(run_folder), "knn", k=5, shift_distances=[], feature="cls_mean")
    assert evaluation.measure == "cls_mean, accuracy, %"
    assert evaluation.path.name == "knn_cls_mean.json"


def test_titles_name_the_feature(tmp_path):
    assert sections.evaluation_title("knn") == "k-NN"
    assert sections.evaluation_title("knn_patch_mean_grid") == (
        "k-NN, every k and temperature, patch_mean"
    )
    row = results.Row("pretrained", {"clean": 50.0})
    provenance = {"checkpoint": "step_1", "step": 1}
    for name in ("knn", "knn_last4"):
        results.save(tmp_path, name, {}, [row], provenance, 1.0)
    table = result_text.summary_table(results.load_newest(tmp_path))
    assert [line.split("  ")[0] for line in table.splitlines()[2:]] == ["k-NN", "k-NN, last4"]


@pytest.mark.parametrize(
    ("config", "name", "message"),
    [
        (
            BackboneConfig("test_resnet"),
            "cls_mean",
            "--feature cls_mean: ResNet has no class token; give --feature pooled",
        ),
        (
            BackboneConfig("test_resnet"),
            "prefix",
            "--feature prefix: ResNet has no class token and no registers; give --feature pooled",
        ),
        (VIT, "last99", "--feature last99: test_vit has {depth} layers; give at most last{depth}"),
        (
            VIT,
            "mean",
            "--feature mean: is not a feature; give pooled, prefix, patch_mean, cls_mean or"
            " last<n>, such as last4",
        ),
    ],
)
def test_a_feature_that_the_backbone_lacks_is_refused(config, name, message):
    backbone = build(config)
    with pytest.raises(ValueError) as error:
        Feature(backbone, name)
    depth = len(getattr(backbone.model, "blocks", ()))
    assert str(error.value) == message.format(depth=depth)


@pytest.mark.parametrize("name", ["prefix", "patch_mean", "cls_mean", "last1"])
@pytest.mark.parametrize("config", [BEIT, CAIT])
def test_tokens_of_other_transformers_are_refused_before_any_batch(config, name):
    with pytest.raises(ValueError) as error:
        Feature(backbones.build_on_meta(config, 32), name)
    assert str(error.value) == (
        f"--feature {name}: {config.name} has tokens, but they can only be computed for timm's"
        " VisionTransformer and Eva classes (vit_*, deit*, eva02*); give --feature pooled"
    )


@pytest.mark.parametrize("name", ["patches", "prefix", "last2"])
def test_a_probe_refuses_tokens_of_other_transformers(name):
    with pytest.raises(ValueError) as error:
        TokenSequence(backbones.build_on_meta(BEIT, 32), name)
    assert str(error.value) == (
        f"--feature {name}: beit_base_patch16_224 has tokens, but they can only be computed for"
        " timm's VisionTransformer and Eva classes (vit_*, deit*, eva02*); evaluate its pooled"
        " feature with ssl-pretrain linear or knn"
    )


# A member of each family of timm whose output before pooling is a sequence without `cls_token`.
SEQUENCES = [
    BackboneConfig("coat_lite_tiny"),
    BackboneConfig("efficientformer_l1"),
    BackboneConfig("hiera_tiny_224"),
    BackboneConfig("levit_128s"),
    MIXER,
    BackboneConfig("mvitv2_tiny"),
    BackboneConfig("naflexvit_base_patch16_gap", args={"depth": 1}),
    BackboneConfig("test_vit_relpos"),
    BackboneConfig("twins_svt_small"),
]
SEQUENCE = (
    "{} has tokens, but they can only be computed for timm's VisionTransformer and Eva classes"
    " (vit_*, deit*, eva02*)"
)


@pytest.mark.parametrize(
    "config", quick_and_full([MIXER, SEQUENCES[2]], SEQUENCES), ids=lambda config: config.name
)
def test_sequences_of_other_networks_are_refused(config):
    backbone = backbones.build_on_meta(config, 224)
    assert backbone.find_token_problem() == SEQUENCE.format(config.name)


@pytest.mark.parametrize(
    "name", quick_and_full(["coat_tiny"], ["coat_tiny", "crossvit_9_240", "efficientvim_m1"])
)
def test_networks_with_several_outputs_are_refused(name):
    backbone = backbones.build_on_meta(BackboneConfig(name), 240 if "crossvit" in name else 224)
    assert backbone.find_token_problem() == (
        f"{name} gives a list instead of a map (B, channels, rows, columns)"
    )


@pytest.mark.parametrize(
    ("module", "options", "remedy"),
    [
        (knn, "--feature patch_mean", "give --feature pooled"),
        (linear, "--feature patch_mean", "give --feature pooled"),
        (linear, "--feature patch_mean --protocol moco", "give --feature pooled"),
        (retrieval, "--feature patch_mean", "give --feature pooled"),
        (spectrum_module, "--feature patch_mean", "give --feature pooled"),
        (attentive, "", "evaluate its pooled feature with ssl-pretrain linear or knn"),
        (
            attentive,
            "--protocol capi",
            "evaluate its pooled feature with ssl-pretrain linear or knn",
        ),
    ],
)
def test_a_mixers_tokens_are_refused_before_any_image_is_read(
    mixer_folder, module, options, remedy, monkeypatch
):
    monkeypatch.setattr(EvaluationSplit, "batches", lambda split: pytest.fail("reads images"))
    with pytest.raises(ValueError) as error:
        module.main([str(mixer_folder), "--device", "cpu", *options.split()])
    feature = "patches" if module is attentive else "patch_mean"
    assert str(error.value) == f"--feature {feature}: {SEQUENCE.format(MIXER.name)}; {remedy}"


@pytest.mark.parametrize("config", [BEIT, CAIT, BackboneConfig("efficientnet_b0")])
def test_dinos_feature_is_pooled_unless_class_tokens_can_be_computed(config):
    backbone = backbones.build_on_meta(config, 32)
    name = named_features.published_feature_name("dino", backbone)
    assert name == "pooled"
    assert Feature(backbone, name).feature_dim == backbone.feature_dim


def test_blocks_of_convolutions_are_not_layers_of_patches():
    backbone = backbones.build_on_meta(BackboneConfig("efficientnet_b0"), 32)
    for name in ("last1", "last2"):
        with pytest.raises(ValueError) as error:
            TokenSequence(backbone, name)
        assert str(error.value) == (
            f"--feature {name}: efficientnet_b0 has 0 layers of patches; give patches"
        )


@pytest.mark.parametrize("module", [knn, linear, retrieval, spectrum_module])
def test_every_evaluation_refuses_it(resnet_folder, module):
    with pytest.raises(ValueError) as error:
        module.main([str(resnet_folder), "--device", "cpu", "--feature", "last1"])
    assert str(error.value) == ("--feature last1: ResNet has no class token; give --feature pooled")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("last2", "--feature last2: test_resnet has 0 layers of patches; give patches"),
        (
            "prefix",
            "--feature prefix: ResNet has no class token and no registers; give patches",
        ),
        (
            "pooled",
            "--feature pooled: a probe attends to several tokens; give patches, prefix or last<n>,"
            " such as last4",
        ),
    ],
)
def test_tokens_that_the_backbone_lacks_are_refused(name, message):
    with pytest.raises(ValueError) as error:
        TokenSequence(build(BackboneConfig("test_resnet")), name)
    assert str(error.value) == message


def test_a_misspelled_feature_ends_the_command(run_folder, capsys):
    with pytest.raises(SystemExit):
        knn.main([str(run_folder), "--feature", "patches"])
    assert "'patches' is not a feature; give pooled, prefix" in capsys.readouterr().err
