"""Floating-point operations of a training step."""

import tiny
import torch

from ssl_pretrain import config
from ssl_pretrain.planning import hardware, recorder


def test_flops_of_a_vit_equal_those_counted_by_hand(tmp_path):
    run = config.load(
        tiny.write_config(tmp_path),
        [
            "backbone.name=vit_tiny_patch16_224",
            "backbone.stem=imagenet",
            "views.crops.global.size=32",
        ],
    )
    tokens, width, depth = 5, 192, 12  # 2 x 2 patches and the class token
    projections = 2 * tokens * width * width * (3 + 1 + 4 + 4)
    attention = 2 * 2 * tokens * tokens * width  # scores, and weighted sums of values
    patches = 2 * 4 * (3 * 16 * 16) * width
    head = 2 * (width * 16 + 16 * 8)
    forward = depth * (projections + attention) + patches + head
    assert (
        recorder.count_flops_per_image(run) == 3 * 2 * forward
    )  # forward and backward of two views
    assert config.build_method_on_meta(run).backbone.feature_dim == width
    assert hardware.peak_tflops(torch.device("cpu")) == 0


def test_the_bias_of_siglip_costs_nothing(tmp_path):
    clip, siglip = (
        recorder.count_flops_per_image(config.load(tiny.write_text_config(tmp_path, name)))
        for name in ("clip", "siglip")
    )
    assert siglip == clip > 0
