"""With default settings, a resumed run has exactly the weights of an uninterrupted one."""

import pytest
import torch
from commands import run, write_class_folders, write_config
from safetensors.torch import load_file

pytestmark = [pytest.mark.promise, pytest.mark.full]

CASES = {
    "convolutions": [],
    "patches": [
        "backbone.name=test_vit",
        "backbone.stem=imagenet",
        "optim.name=adamw",
        "optim.base_lr=0.001",
    ],
}


def load_tensors(folder):
    """Return the method's and the optimizer's tensors in the newest checkpoint."""
    checkpoint = max((folder / "checkpoints").glob("step_*"))
    method = load_file(checkpoint / "method.safetensors")
    return method | load_file(checkpoint / "optimizer.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(case, tmp_path):
    """With `parallel.channels_last`, the default, 4-D tensors are not stored in row-major order."""
    write_class_folders(tmp_path / "images", "train", images_per_class=12)
    path = write_config(tmp_path, tmp_path / "images")

    def train(name, steps):
        overrides = [*CASES[case], "epochs=4", f"output={tmp_path / name}"]
        result = run("-m", "ssl_pretrain.train", path, *overrides, "--stop-after", str(steps))
        assert result.status == 0, result.text
        return result.text

    train("uninterrupted", 6)
    train("stopped", 3)
    assert f"resumed {tmp_path / 'stopped'} after step 3" in train("stopped", 3)
    uninterrupted, resumed = (
        load_tensors(tmp_path / "uninterrupted"),
        load_tensors(tmp_path / "stopped"),
    )
    assert uninterrupted.keys() == resumed.keys()
    assert [
        name for name, value in uninterrupted.items() if not torch.equal(resumed[name], value)
    ] == []
