"""A run trains on the views of SimCLR's and BYOL's code and describes each of them."""

import json

import pytest
from commands import CONFIG, run_modules, write_class_folders, write_config

OPTIONS = (
    "jitter: 1.0, brightness: 0.4, contrast: 0.4, saturation: 0.4, blur: 1.0, "
    "contrast_mean: channel, saturation_mode: hsv, blur_border: zero, antialias: false"
)


@pytest.mark.full
def test_a_run_trains_on_both_kinds_of_views_and_describes_them(tmp_path):
    root = write_class_folders(tmp_path / "data", "train", images_per_class=4)
    write_class_folders(tmp_path / "data", "val", images_per_class=4)
    crops = (
        f"crops: {{first: {{count: 1, size: 16, crop_sampler: tensorflow, {OPTIONS}}}, "
        f"second: {{count: 1, size: 16, crop_sampler: clipped, {OPTIONS}}}}}"
    )
    text = CONFIG.replace("crops: {global: {count: 2, size: 16, scale: [0.3, 1.0]}}", crops)
    assert text != CONFIG
    config = write_config(tmp_path, root, text)
    ((status, _, err),) = run_modules([["ssl_pretrain.train", str(config)]])
    assert status == 0, err
    descriptions = json.loads((tmp_path / "run" / "views.json").read_text())
    assert len(descriptions) == 8
    for views in descriptions:
        assert len(views) == 2
        for view in views:
            assert " by channel" in view
            assert " in HSV" in view
            assert "black outside" in view


def test_an_unknown_option_is_refused(tmp_path):
    text = CONFIG.replace("size: 16,", "size: 16, crop_sampler: inception,")
    config = write_config(tmp_path, write_class_folders(tmp_path / "data", "train"), text)
    ((status, _, err),) = run_modules([["ssl_pretrain.train", str(config)]])
    assert status == 2
    assert err.endswith(
        "views.crops.global.crop_sampler: 'inception' is not known; choose one of: torchvision, "
        "tensorflow, clipped\n"
    )
