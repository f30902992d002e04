"""Networks of other channels than the images are refused before the run, or take them."""

import pytest
import tiny
import torch
from torch import nn

from ssl_pretrain import config as configuration
from ssl_pretrain.checkpoint.initial_weights import initialize
from ssl_pretrain.config import ConfigError
from ssl_pretrain.models import backbones, image_size_check
from ssl_pretrain.models.timm_networks import BackboneConfig, timm
from ssl_pretrain.planning import plan
from ssl_pretrain.system import user_objects

MODULE = "test_network_channels"


class Pooled(nn.Module):
    def __init__(self, in_chans: int = 3):
        super().__init__()
        self.layer = nn.Conv2d(in_chans, 8, 3, 2)

    def forward(self, images):
        return self.layer(images).mean((2, 3))


def fixed_network(num_channels: int = 3):
    return Pooled(num_channels)


class AnyChannels(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 8)

    def forward(self, images):
        return self.layer(images.mean((1, 2, 3))[:, None])


def load(tmp_path, *overrides):
    return configuration.load(tiny.write_config(tmp_path), ["backbone.stem=imagenet", *overrides])


def error_of(run):
    with pytest.raises(ConfigError) as error:
        configuration.check(run, world_size=1)
    with pytest.raises(ConfigError) as error_of_plan:
        plan.describe(run)
    assert str(error.value) == str(error_of_plan.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            [f"backbone.name={MODULE}:fixed_network", "data.channels=4"],
            f"backbone.name: {MODULE}:fixed_network takes images of 3 channels, not of "
            "data.channels 4; change its first layer (a function with a parameter in_chans "
            "receives data.channels), or set data.channels=3",
        ),
        (
            [f"backbone.name={MODULE}:fixed_network", "backbone.args.num_channels=13"],
            f"backbone.name: {MODULE}:fixed_network takes images of 13 channels, not of "
            "data.channels 3; change its first layer (a function with a parameter in_chans "
            "receives data.channels), or set data.channels=13",
        ),
        (
            ["backbone.args.pretrained_cfg_overlay={input_size: [4, 32, 32]}"],
            "backbone.args: test_resnet with {'pretrained_cfg_overlay': {'input_size': [4, 32, "
            "32]}} takes images of 4 channels, not of data.channels 3; change backbone.args, or "
            "set data.channels=4",
        ),
        pytest.param(
            ["backbone.name=csatv2", "data.channels=5", "views.crops.global.size=64"],
            "backbone.name: csatv2 takes images of 3 channels, not of data.channels 5; choose "
            "another network, or set data.channels=3",
            marks=pytest.mark.full,
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:CSATv2 is designed for 3-channel")
def test_a_network_for_other_channels_is_refused(overrides, message, tmp_path):
    assert error_of(load(tmp_path, *overrides)) == message


def test_a_module_for_other_channels_is_refused(tmp_path):
    run = load(tmp_path, "backbone.name=object:Pooled", "data.channels=2")
    with user_objects.provide({"Pooled": Pooled()}):
        assert error_of(run) == (
            "backbone.name: object:Pooled takes images of 3 channels, not of data.channels 2; "
            "change its first layer (a function with a parameter in_chans receives "
            "data.channels), or set data.channels=3"
        )


@pytest.mark.parametrize("channels", [1, 3, 13])
@pytest.mark.parametrize("name", ["Pooled", "AnyChannels"])
def test_a_function_that_takes_the_channels_is_accepted(name, channels, tmp_path):
    run = load(tmp_path, f"backbone.name={MODULE}:{name}", f"data.channels={channels}")
    configuration.check(run, world_size=1)
    backbone = backbones.build(run.backbone, 16)
    assert backbone.num_channels == channels
    assert backbone(torch.zeros(2, channels, 16, 16)).shape == (2, 8)
    if name == "Pooled":
        assert backbone.model.layer.in_channels == channels


@pytest.mark.parametrize("value", ["4", "0", "null", "4.0", "'4'", "true", "[4]", "40"])
def test_in_chans_that_contradicts_the_images_is_refused(value, tmp_path):
    with pytest.raises(ConfigError) as error:
        load(tmp_path, f"backbone.args.in_chans={value}", "data.channels=1")
    assert "backbone.args.in_chans: " in str(error.value)
    assert "is not data.channels 1, the number of channels of the images; leave it out" in str(
        error.value
    )
    assert ("set data.channels=4" in str(error.value)) == (value == "4")


@pytest.mark.full
def test_weights_of_timm_are_adapted_and_the_notes_say_how():
    def notes(name, channels, **settings):
        config = BackboneConfig(name, args={"in_chans": channels}, **settings)
        image_size_check.check(config, {"views.crops": 224})
        return initialize(backbones.build_on_meta(config, 224), config)  # downloads nothing

    dino = {"init": "timm:dino"}
    assert notes("vit_small_patch16_224", 3, **dino) == []
    assert notes("vit_small_patch16_224", 1, **dino) == [
        "input channels of patch_embed.proj.weight summed"
    ]
    assert notes("vit_small_patch16_224", 13, **dino) == [
        "input channels of patch_embed.proj.weight repeated from 3 to 13"
    ]
    assert notes("resnet18", 4, init="timm:a1_in1k", stem="no_pool") == [
        "input channels of conv1.weight repeated from 3 to 4"
    ]


def test_weights_that_timm_cannot_adapt_are_refused():
    config = BackboneConfig(
        "naflexvit_base_patch16_gap", init="timm:e300_s576_in1k", args={"in_chans": 4}
    )
    with pytest.raises(ValueError) as error:
        image_size_check.check(config, {"views.crops": 224})
    assert str(error.value) == (
        "backbone.init: timm cannot adapt timm:e300_s576_in1k of naflexvit_base_patch16_gap from "
        "images of 3 channels to data.channels 4, because of embeds.proj.weight; set "
        "backbone.init=random, or choose another network"
    )


@pytest.mark.parametrize("channels", [1, 4])
def test_timm_adapts_weights_as_the_notes_say(channels):
    color = timm.create_model("resnet18", num_classes=0)
    overlay = {"state_dict": color.state_dict()}
    adapted = timm.create_model(
        "resnet18",
        pretrained=True,
        num_classes=0,
        in_chans=channels,
        pretrained_cfg_overlay=overlay,
    )
    weight = color.conv1.weight
    expected = weight.sum(1, keepdim=True) if channels == 1 else weight[:, [0, 1, 2, 0]] * 3 / 4
    torch.testing.assert_close(adapted.conv1.weight, expected)
    assert torch.equal(adapted.layer1[0].conv1.weight, color.layer1[0].conv1.weight)


def test_weights_in_a_file_are_not_adapted(tmp_path):
    source = backbones.build(BackboneConfig("test_resnet"), 32)
    torch.save(source.model.state_dict(), tmp_path / "weights.pth")
    init = str(tmp_path / "weights.pth")
    config = BackboneConfig("test_resnet", init=init, args={"in_chans": 4})
    with pytest.raises(ValueError) as error:
        initialize(backbones.build_on_meta(config, 32), config)
    assert str(error.value) == (
        f"backbone.init: {init!r}: not the weights of this backbone: 1 of another shape "
        "(conv1.0.weight (16, 3, 3, 3) for (16, 4, 3, 3)). Nothing was loaded; set backbone.name, "
        "backbone.stem and backbone.args as in the run that trained them, or "
        "backbone.init=random, as data.channels is 4"
    )


def test_the_plan_says_what_other_channels_change(tmp_path):
    lines = plan.describe(load(tmp_path, "data.channels=1")).splitlines()
    assert lines[lines.index("# plan") + 1] == (
        "data.channels: 1, so the views have no saturation, hue or grayscale, and the network "
        "takes 1 channel"
    )
    assert not any(
        line.startswith("data.channels") for line in plan.describe(load(tmp_path)).splitlines()
    )
