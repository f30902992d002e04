"""Load one format of an export in a process of its own, and print how far its features are off.

    python -P reload_script.py FORMAT FOLDER

The process imports the library that the format is for, and nothing of this project. It prints one
line of JSON: `difference` and `largest`, of the features of the reference images; `views`, the
largest difference of the library's own transform of the sample image, if it has one; and
`versions`.
"""

import importlib.metadata
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# timm and transformers would import them if they are installed, which takes seconds.
for package in ("wandb", "tensorflow", "sklearn"):
    sys.modules[package] = None  # type: ignore[assignment]

# Results of a format: features (n, dim), its view of the sample image or None, and its packages.
Outputs = tuple[np.ndarray, np.ndarray | None, tuple[str, ...]]


def load_timm(folder: Path, images: np.ndarray, sample: Any) -> Outputs:
    """Load the folder with timm.create_model."""
    import timm
    import torch

    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    view = None
    if sample is not None:
        data = timm.data.resolve_model_data_config(model)
        view = timm.data.create_transform(**data, is_training=False)(sample).numpy()
    with torch.no_grad():
        return model(torch.from_numpy(images)).numpy(), view, ("timm", "torch")


def load_timm_wrapper(folder: Path, images: np.ndarray, sample: Any) -> Outputs:
    """Load the folder with transformers.AutoModel, which wraps timm's network."""
    import torch
    import transformers

    model = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        features = model(torch.from_numpy(images)).pooler_output.numpy()
    return features, _process(folder, sample), ("transformers", "timm", "torch")


def load_transformers(folder: Path, images: np.ndarray, sample: Any) -> Outputs:
    """Load the subfolder with transformers.AutoModel, which builds its own network."""
    import torch
    import transformers

    code = json.loads((folder / "timm.json").read_text())["transformers_features"]
    model, info = transformers.AutoModel.from_pretrained(
        folder / "transformers", output_loading_info=True
    )
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[key]:
            raise ValueError(f"{key.replace('_', ' ')}: {', '.join(map(str, info[key]))}")
    with torch.no_grad():
        outputs = model.eval()(torch.from_numpy(images), output_hidden_states=True)
        features = eval(code, {"model": model, "outputs": outputs}).numpy()
    has_processor = (folder / "transformers/preprocessor_config.json").exists()
    view = _process(folder / "transformers", sample) if has_processor else None
    return features, view, ("transformers", "torch")


def _process(folder: Path, sample: Any) -> np.ndarray | None:
    import transformers

    if sample is None:
        return None
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    return processor(sample, return_tensors="pt")["pixel_values"][0].numpy()


def load_torchhub(folder: Path, images: np.ndarray, sample: Any) -> Outputs:
    """Load the folder with torch.hub."""
    import torch

    model = torch.hub.load(str(folder), "backbone", source="local")
    view = None
    if sample is not None:
        view = torch.hub.load(str(folder), "transform", source="local")(sample).numpy()
    with torch.no_grad():
        return model(torch.from_numpy(images)).numpy(), view, ("timm", "torch")


def load_torchvision(folder: Path, images: np.ndarray, sample: Any) -> Outputs:
    """Load the weights into torchvision's network of this name."""
    import torch
    import torchvision
    from safetensors.torch import load_file

    name = json.loads((folder / "timm.json").read_text())["architecture"]
    model = torchvision.models.get_model(name, weights=None)
    model.fc = torch.nn.Identity()
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    with torch.no_grad():
        features = model.eval()(torch.from_numpy(images)).numpy()
    return features, None, ("torchvision", "torch")


def load_torch_export(folder: Path, images: np.ndarray, sample: Any) -> Outputs:
    """Load model.pt2 with torch, for three batch sizes."""
    import torch

    model, tensor = torch.export.load(folder / "model.pt2").module(), torch.from_numpy(images)
    with torch.no_grad():
        features = [model(tensor[:1]), model(torch.cat([tensor, tensor]))[1 : len(tensor)]]
    return torch.cat(features).numpy(), None, ("torch",)


def load_onnx(folder: Path, images: np.ndarray, sample: Any) -> Outputs:
    """Load model.onnx with ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    session = onnxruntime.InferenceSession(
        folder / "model.onnx", options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"images": images})[0], None, ("onnxruntime",)


def load_open_clip(folder: Path, images: np.ndarray, sample: Any) -> Outputs:
    """Load the folder with open_clip, and embed the reference images and then the texts."""
    import open_clip
    import torch

    name = f"local-dir:{folder}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    tokenizer = open_clip.get_tokenizer(name)
    model.eval()
    texts = json.loads((folder / "timm.json").read_text(encoding="utf-8"))["texts"]
    view = None if sample is None else preprocess(sample).numpy()
    with torch.no_grad():
        image_vectors = model.encode_image(torch.from_numpy(images), normalize=True)
        text_vectors = model.encode_text(tokenizer(texts), normalize=True)
    vectors = torch.cat([image_vectors, text_vectors]).numpy()
    return vectors, view, ("open_clip_torch", "timm", "torch")


LOADERS: dict[str, Callable[[Path, np.ndarray, Any], Outputs]] = {
    "timm": load_timm,
    "timm_wrapper": load_timm_wrapper,
    "transformers": load_transformers,
    "torchhub": load_torchhub,
    "torchvision": load_torchvision,
    "torch_export": load_torch_export,
    "onnx": load_onnx,
    "open_clip": load_open_clip,
}


def main(name: str, folder: Path) -> None:
    """Load a format and print its differences from the reference."""
    from safetensors.numpy import load_file

    reference = load_file(folder / "reference.safetensors")
    sample_file, sample, expected_view = folder / "sample.safetensors", None, None
    if sample_file.exists():
        from PIL import Image

        tensors = load_file(sample_file)
        sample, expected_view = Image.fromarray(tensors["pixels"]), tensors["view"]
    features, view, packages = LOADERS[name](folder, reference["images"], sample)
    expected = reference["embeddings" if name == "open_clip" else "features"]
    if features.shape != expected.shape:
        shapes = f"{features.shape}, not {expected.shape}"
        raise ValueError(f"the features have the shape {shapes}")
    result = {
        "difference": float(np.abs(features - expected).max()),
        "largest": float(np.abs(expected).max()),
        "views": None if view is None else float(np.abs(view - expected_view).max()),
        "versions": {package: importlib.metadata.version(package) for package in packages},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
