"""Errors about the initial weights of a backbone."""

import pytest

from ssl_pretrain.checkpoint.initial_weights import read_initial_weights


@pytest.mark.parametrize(
    ("init", "message"),
    [
        (
            "nowhere.pth",
            "backbone.init: 'nowhere.pth' does not exist; give random, timm:<tag>, a weights file "
            "or the folder of a run",
        ),
        (
            "{tmp}/text.pth",
            "backbone.init: '{tmp}/text.pth' is not a safetensors or torch file: it begins with "
            "b'hello'; download it again",
        ),
        (
            "{tmp}/text.safetensors",
            "backbone.init: '{tmp}/text.safetensors' is not a safetensors or torch file: it "
            "begins "
            "with b'hello",
        ),
    ],
)
def test_an_error_names_the_value_of_backbone_init(tmp_path, init, message):
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello, this is text and not tensors")
    with pytest.raises(ValueError) as error:
        read_initial_weights(init.format(tmp=tmp_path))
    assert str(error.value).startswith(message.format(tmp=tmp_path))
