"""What a ViT attends to, and the main directions of its patches as colours: the pictures of DINO's paper, of any run and images."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image
from timm.models.vision_transformer import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_pretrain.data.images import decode
from ssl_pretrain.eval import results, runs
from ssl_pretrain.eval.frozen import features
from ssl_pretrain.eval.runs import Run
from ssl_pretrain.schema import FROM_ZERO
from ssl_pretrain.views import crops

MASS = 0.6  # of a head's attention that its mask keeps, as in the paper's figure 1
HELP = """Writes PNGs for each image: what the class token attends to in each head of the last block, alone and over the image,
the part that holds 60 % of it (DINO, arXiv:2104.14294, figures 1, 3 and 8), and the first three principal components of all
images' patch features as red, green and blue (as in DINOv2, arXiv:2304.07193, figure 1). A ResNet has only the last: of
the positions of its last feature map.

    python -m ssl_pretrain.eval.attention runs/dino cat.jpg dog.jpg --size 480 --output attention
    python -m ssl_pretrain.eval.attention dino.pth cat.jpg backbone.name=vit_small_patch16_224"""


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m ssl_pretrain.eval.attention",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help=runs.RUN_HELP)
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="image files, and key=value as of the other evaluations",
    )
    parser.add_argument(
        "--size",
        type=FROM_ZERO,
        default=0,
        help="of the images, in pixels (default: the run's evaluation size)",
    )
    parser.add_argument("--output", type=Path, help="folder (default: RUN/attention)")
    parser.add_argument(
        "--checkpoint", metavar="FOLDER", help="look at this one (default: the newest whole one)"
    )
    parser.add_argument(
        "--device", default="auto", help="cpu or cuda (default: cuda where there is one)"
    )
    options = parser.parse_intermixed_args(arguments)
    overrides = [text for text in options.images if "=" in text and not Path(text).exists()]
    files = [Path(text) for text in options.images if text not in overrides]
    run = runs.load_run(options.run, options.checkpoint, overrides, options.device)
    for path in write(run, files, options.output or run.path / "attention", options.size):
        print(path)


def write(run: Run, files: list[Path], folder: Path, size: int = 0) -> list[Path]:
    """Makes the pictures and returns their paths.

    Raises:
        ValueError: a file is not an image, or the size is not a multiple of the patches'.
    """
    size = size or run.image_size
    images = torch.stack([_read(file, size) for file in files])
    found = look(run, images)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for number, file in enumerate(files):
        name = f"{number + 1:02d}_{file.stem}"
        if found.attention is not None:
            written.append(
                _save(
                    _attention_picture(images[number], found.attention[number]),
                    folder / f"{name}_attention.png",
                )
            )
        both = torch.cat(
            [images[number].float() / 255, _enlarged(found.components[number], size)], dim=2
        )
        written.append(_save(both, folder / f"{name}_components.png"))
    return written


class Look:
    """attention: (images, heads, rows, columns), each head summing to 1 over the patches, or None; components: (images, 3,
    rows, columns) in [0, 1]."""

    def __init__(self, attention: Tensor | None, components: Tensor):
        self.attention, self.components = attention, components


@torch.no_grad()
def look(run: Run, images: Tensor) -> Look:
    """What the backbone makes of `images`, uint8 (num, 3, size, size).

    Raises:
        ValueError: the size is not one that the network takes.
    """
    model: Any = run.backbone.get_submodule("model")
    normalized = features.normalize(run, images)
    blocks = getattr(model, "blocks", None)
    if blocks is None or not isinstance(getattr(blocks[-1], "attn", None), Attention):
        return Look(None, components(_feature_map(model, normalized)))
    patch = model.patch_embed.patch_size[0]
    if images.shape[-1] % patch or (
        images.shape[-1] != run.view_size and not getattr(model, "dynamic_img_size", False)
    ):
        raise ValueError(
            f"--size: {images.shape[-1]} pixels do not fit patches of {patch}; give a multiple of {patch}"
        )
    seen: list[Tensor] = []
    hook = blocks[-1].attn.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        tokens = model.forward_features(normalized)
    finally:
        hook.remove()
    first, rows = model.num_prefix_tokens, images.shape[-1] // patch
    weights = attention(blocks[-1].attn, seen[0])[:, :, 0, first:]
    grid = (
        weights.unflatten(2, (rows, rows)) if first else None
    )  # without a class token nobody asks for the image
    return Look(grid, components(tokens[:, first:].transpose(1, 2).unflatten(2, (rows, rows))))


def _feature_map(model: Any, images: Tensor) -> Tensor:
    """The last feature map of a network, (images, dim, rows, columns).

    Raises:
        ValueError: The network does not take the size, or gives no map.
    """
    try:
        outputs = model.forward_features(images)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f"--size: the network cannot take {images.shape[-1]} pixels: {str(error).splitlines()[0]}"
        ) from None
    if not isinstance(outputs, Tensor) or outputs.ndim != 4:
        raise ValueError(
            "the network's features are no map of the image, whose main directions this shows; give a ViT or a CNN"
        )
    return (
        outputs.permute(0, 3, 1, 2) if getattr(model, "output_fmt", "NCHW") == "NHWC" else outputs
    )


def attention(layer: nn.Module, tokens: Tensor) -> Tensor:
    """The weights of timm's attention `layer` for its input `tokens`, (images, heads, tokens, tokens), rows summing to 1."""
    found: Any = layer
    count, length, _ = tokens.shape
    queries, keys, _ = (
        found.qkv(tokens)
        .reshape(count, length, 3, found.num_heads, -1)
        .permute(2, 0, 3, 1, 4)
        .unbind(0)
    )
    queries, keys = found.q_norm(queries), found.k_norm(keys)
    return (queries * found.scale @ keys.transpose(-2, -1)).softmax(dim=-1)


def components(patches: Tensor) -> Tensor:
    """First three principal components over all images' patches (images, dim, rows, columns), each stretched to [0, 1] between
    its 1st and 99th percentile; its sign is the one that makes its largest loading positive."""
    count, dim, rows, columns = patches.shape
    flat = patches.permute(0, 2, 3, 1).reshape(-1, dim).double()
    flat = flat - flat.mean(0)
    _, _, directions = torch.linalg.svd(flat, full_matrices=False)
    directions = F.pad(directions, (0, 0, 0, max(0, 3 - len(directions))))[:3]
    signs = directions.gather(1, directions.abs().argmax(1, keepdim=True)).sign()
    found = flat @ (directions * torch.where(signs == 0, torch.ones_like(signs), signs)).T
    low, high = found.quantile(0.01, dim=0), found.quantile(0.99, dim=0)
    stretched = ((found - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return stretched.reshape(count, rows, columns, 3).permute(0, 3, 1, 2).float().cpu()


def mass_mask(weights: Tensor, mass: float = MASS) -> Tensor:
    """True on the fewest patches of (heads, rows, columns) that hold `mass` of each head's attention."""
    flat = weights.flatten(1)
    ordered, order = (flat / flat.sum(1, keepdim=True)).sort(dim=1, descending=True)
    before = ordered.cumsum(1) - ordered
    return (
        torch.zeros_like(flat, dtype=torch.bool).scatter_(1, order, before < mass).view_as(weights)
    )


def _attention_picture(image: Tensor, weights: Tensor) -> Tensor:
    """Three rows: the image and its mean attention, then each head; over the image; the part that holds 60 %: (3, height, width)."""
    size = image.shape[-1]
    pixels = image.float() / 255
    shown = torch.cat([weights.mean(0, keepdim=True), weights]).cpu()
    maps, over, masked = [torch.ones_like(pixels)], [pixels], [torch.ones_like(pixels)]
    for one, kept in zip(shown, mass_mask(shown)):
        coloured = _coloured(_enlarged((one / one.max().clamp(min=1e-12))[None], size)[0])
        mask = _enlarged(kept[None].float(), size)
        maps.append(coloured)
        over.append(0.45 * pixels + 0.55 * coloured)
        masked.append(pixels * (0.2 + 0.8 * mask))
    return torch.cat([torch.cat(row, dim=2) for row in (maps, over, masked)], dim=1)


def _coloured(values: Tensor) -> Tensor:
    return torch.from_numpy(
        colormaps["inferno"](values.numpy())[..., :3].astype(np.float32)
    ).permute(2, 0, 1)


def _enlarged(values: Tensor, size: int) -> Tensor:
    """(channels, rows, columns) to (channels, size, size), each patch a square."""
    return F.interpolate(values[None], size=(size, size), mode="nearest")[0]


def _read(file: Path, size: int) -> Tensor:
    if not file.is_file():
        raise ValueError(f"{file}: there is no such image")
    pixels = torch.from_numpy(decode(file.read_bytes(), str(file))).permute(2, 0, 1)
    return crops.evaluate(pixels, size, 1.0, "bicubic")


def _save(picture: Tensor, path: Path) -> Path:
    Image.fromarray((picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()).save(path)
    return path


if __name__ == "__main__":
    results.command(main, "ssl_pretrain.eval.attention")
