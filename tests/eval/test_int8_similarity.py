"""An 8-bit model ranks the similarities of photographs as the network in 32 bits does."""

import zipfile
from pathlib import Path

import pytest
import torch
from scipy.stats import spearmanr

from ssl_pretrain import train
from ssl_pretrain.eval import export, runs
from ssl_pretrain.eval.exporting import onnx

CONFIG = Path(__file__).parents[2] / "configs/methods_cifar10_cpu.yaml"
NUM_PHOTOS = 200


def similarities(vectors):
    """Return the cosines of all pairs."""
    directions = torch.nn.functional.normalize(vectors)
    rows, columns = torch.triu_indices(len(vectors), len(vectors), 1)
    return (directions @ directions.T)[rows, columns]


@pytest.mark.full
@pytest.mark.parametrize("network", ["test_resnet", "test_vit"])
def test_similarities_in_8_bits_rank_like_those_in_32(network, shared_data, tmp_path):
    pytest.importorskip("onnxruntime")
    photos = shared_data("imagenet_sample.zip")
    overrides = ["data.source=folder", f"data.root={photos}", "data.subset=0"]
    overrides += ["global_batch_size=100", "epochs=5", "parallel.threads=1"]
    overrides += [f"backbone.name={network}", "evaluation.at_end=[]", "online.knn_every_epochs=0"]
    overrides += ["backbone.stem=imagenet"] if network == "test_vit" else []
    assert train.main([str(CONFIG), *overrides, f"output={tmp_path / 'run'}"]) == 0
    run = runs.load_run(tmp_path / "run", device="cpu")
    folder = export.export(run, tmp_path / "exported", ["onnx"])
    transform = export.load_transform(folder)
    with zipfile.ZipFile(photos) as archive:
        names = [name for name in archive.namelist() if name.lower().endswith((".jpeg", ".jpg"))]
        images = torch.stack([transform(archive.read(name)) for name in names[:NUM_PHOTOS]])
    in_8_bits, in_32_bits = (
        similarities(torch.cat([embed(image[None]) for image in images]))
        for embed in (
            onnx.open_session(folder / onnx.INT8_MODEL),
            onnx.open_session(folder / onnx.FLOAT_MODEL),
        )
    )
    assert spearmanr(in_8_bits, in_32_bits).statistic > 0.99
