"""A service of a network whose features are known: one convolution over the whole image."""

import asyncio
import io
import json
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import onnx
import torch
from fastapi.testclient import TestClient
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from safetensors.torch import save_file

from ssl_pretrain.eval.embedding.vector_index import IndexFacts
from ssl_pretrain.eval.export import load_transform
from ssl_pretrain.eval.serving import routes
from ssl_pretrain.eval.serving.served_network import ServedNetwork
from ssl_pretrain.eval.serving.service import Service, ServiceLimits
from ssl_pretrain.system.durable_files import sha256

SIDE, DIM = 16, 24
ADDRESS = "http://127.0.0.1"


def write_export(folder: Path, seed: int = 0, channels: int = 3) -> Path:
    """Write an export by hand: its files, and ONNX models of 32 bits and of rounded weights."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(DIM, channels, SIDE, SIDE, generator=generator) / SIDE
    images = torch.randn(2, channels, SIDE, SIDE, generator=generator)
    features = torch.nn.functional.conv2d(images, weight).flatten(1)
    save_file({"weight": weight}, folder / "model.safetensors")
    save_file({"images": images, "features": features}, folder / "reference.safetensors")
    arguments = {
        "architecture": "one_convolution",
        "stem": "imagenet",
        "args": {},
        "facts": {},
        "input": {
            "channels": channels,
            "range": [],
            "size": SIDE,
            "crop_ratio": 0.875,
            "interpolation": "bilinear",
            "mean": [0.5] * channels,
            "std": [0.25] * channels,
        },
        "method": "simclr",
        "checkpoint": "step_00000007",
        "step": 7,
        "network": "student",
        "sha256": sha256(folder / "model.safetensors"),
    }
    (folder / "timm.json").write_text(json.dumps(arguments))
    write_onnx(weight, folder / "model.onnx")
    write_onnx((weight * 1024).round() / 1024, folder / "model_int8.onnx")
    return folder


def write_onnx(weight: torch.Tensor, path: Path) -> None:
    """Write the convolution as an ONNX model for any number of images."""
    shape = ["n", *weight.shape[1:]]
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["images", "weight"], ["maps"]),
            helper.make_node("Flatten", ["maps"], ["features"]),
        ],
        "network",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", DIM])],
        [numpy_helper.from_array(weight.numpy(), "weight")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), path)


class PlainIndex:
    """An exact index by cosine, without faiss."""

    def __init__(self, vectors: np.ndarray, ids: list[str]):
        self.vectors, self.ids = vectors / np.linalg.norm(vectors, axis=1, keepdims=True), ids
        self.facts = IndexFacts("cosine", "flat", vectors.shape[1], len(ids))

    def __len__(self) -> int:
        return len(self.ids)

    def search(self, vectors: np.ndarray, k: int) -> tuple[list[list[str]], list[list[float]]]:
        scores = vectors / np.linalg.norm(vectors, axis=1, keepdims=True) @ self.vectors.T
        order = np.argsort(-scores, axis=1)[:, :k]
        ids = [[self.ids[row] for row in rows] for rows in order]
        return ids, np.take_along_axis(scores, order, 1).tolist()


def open_service(folder: Path, index=None, model="float", **limits) -> Service:
    return Service(ServedNetwork.load(folder, model), index, ServiceLimits(**limits))


@contextmanager
def open_client(service: Service):
    """Yield a client of a running service."""
    with TestClient(routes.build_app(service), ADDRESS, raise_server_exceptions=False) as client:
        yield client


def run_concurrently(service: Service, send):
    """Run `send(client)`, a coroutine function, while the service runs in the same event loop."""

    async def run():
        app = routes.build_app(service)
        await service.start()
        try:
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url=ADDRESS) as client:
                return await send(client)
        finally:
            await service.stop()

    return asyncio.run(run())


def random_pixels(seed: int, shape=(40, 60, 3)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encode(pixels: np.ndarray, kind: str = "png", **options) -> bytes:
    """Return an image file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def offline_vector(folder: Path, content: bytes) -> np.ndarray:
    """Return the vector that torch computes from an image file without the service."""
    from safetensors.torch import load_file

    image = load_transform(folder)(content)[None]
    weight = load_file(folder / "model.safetensors")["weight"]
    return torch.nn.functional.conv2d(image, weight).flatten().numpy()
