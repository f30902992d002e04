"""Settings of a run that a program starts."""

from pathlib import Path

import pytest

from ssl_pretrain.planning import run_settings


@pytest.mark.parametrize(
    ("method", "config", "folder"),
    [
        (None, None, "runs/simclr_photos"),
        ("dino", None, "runs/dino_photos"),
        (None, "dino_cifar10", "runs/dino_photos"),
    ],
)
def test_the_default_folder_has_the_name_of_the_method(method, config, folder):
    assert run_settings.default_folder(method, config, "photos") == Path(folder)
