"""Draw a network's attention and the principal components of its features as PNGs.

The first picture of an image shows the class token's attention in each head of the last block: the
attention map, its overlay on the image, and the patches that receive 60 % of it (DINO,
arXiv:2104.14294, figures 1, 3 and 8). The second picture shows the first three principal components
of the patch features as red, green and blue (as in DINOv2, arXiv:2304.07193, figure 1). They are
computed over all images. A ResNet gets only the second picture, from its last feature map.

    python -m ssl_pretrain.eval.attention runs/dino cat.jpg dog.jpg --size 480 --output attention
    python -m ssl_pretrain.eval.attention dino.pth cat.jpg backbone.name=vit_small_patch16_224
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from ssl_pretrain.data.config import pixel_format
from ssl_pretrain.data.images import decode
from ssl_pretrain.eval import command_line
from ssl_pretrain.eval.frozen import features
from ssl_pretrain.eval.runs import Run
from ssl_pretrain.monitoring.shown_bands import to_rgb
from ssl_pretrain.schema import NON_NEGATIVE_INT
from ssl_pretrain.schema.image_sizes import ImageSize, describe, height_and_width, simplify
from ssl_pretrain.views import crops

TOP_SHARE = 0.6  # share of a head's attention that its mask contains, as in DINO's figure 1
OPTIONS: dict[str, dict[str, Any]] = {
    "--size": {
        "type": NON_NEGATIVE_INT,
        "default": 0,
        "help": "side of the images in pixels (default: the run's evaluation size)",
    },
    "--output": {
        "type": Path,
        "help": "folder of the pictures (default: RUN/attention)",
    },
}


def main(arguments: list[str]) -> None:
    """Run the command-line interface."""
    parser = command_line.build_parser(
        "ssl_pretrain.eval.attention",
        __doc__,
        OPTIONS,
        positionals_metavar="IMAGE",
        positionals_help="image files, and key=value settings as in the other evaluations",
    )
    options = parser.parse_intermixed_args(arguments)
    positionals = options.overrides
    options.overrides = [text for text in positionals if "=" in text and not Path(text).exists()]
    files = [Path(text) for text in positionals if text not in options.overrides]
    if not files:
        raise ValueError("IMAGE: no image file was given; give at least one")
    run = command_line.open_run(options)
    for path in write_pictures(run, files, options.output or run.path / "attention", options.size):
        print(path)


def write_pictures(run: Run, files: list[Path], folder: Path, size: ImageSize = 0) -> list[Path]:
    """Write the pictures and return their paths.

    Args:
        run: Run to evaluate.
        files: Image files.
        folder: Folder to write the pictures to.
        size: Side of the images in pixels, or their height and width. 0 stands for the run's
            evaluation size.

    Raises:
        ValueError: If a file is not an image, or the size is not a multiple of the patch size.
    """
    size = size or run.image_size
    images = torch.stack([_read_image(run, file, size) for file in files])
    maps = compute_maps(run, images)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    pictures = to_rgb(images, run.config.log.bands)
    for index, (file, image) in enumerate(zip(files, pictures)):
        prefix = f"{index + 1:02d}_{file.stem}"
        if maps.attention is not None:
            picture = _attention_picture(image, maps.attention[index])
            paths.append(_save_picture(picture, folder / f"{prefix}_attention.png"))
        picture = torch.cat([image.float() / 255, _enlarge(maps.components[index], size)], dim=2)
        paths.append(_save_picture(picture, folder / f"{prefix}_components.png"))
    return paths


@dataclass
class Maps:
    """Attention and principal components of a batch of images."""

    attention: Tensor | None  # (images, heads, rows, columns); None without a class token
    components: Tensor  # (images, 3, rows, columns) in [0, 1]


@torch.no_grad()
def compute_maps(run: Run, images: Tensor) -> Maps:
    """Return the attention and principal components of uint8 images (n, C, height, width).

    Raises:
        ValueError: If the network does not accept images of this size.
    """
    model: Any = run.backbone.get_submodule("model")
    normalized = features.normalize(run, images)
    blocks = getattr(model, "blocks", None)
    if blocks is None or not isinstance(getattr(blocks[-1], "attn", None), Attention):
        feature_map = _feature_map(model, normalized, run.config.backbone.name)
        return Maps(None, principal_components(feature_map))
    patch_size, shape = model.patch_embed.patch_size[0], tuple(images.shape[-2:])
    is_built_for = shape == height_and_width(run.view_size)
    accepts_size = is_built_for or getattr(model, "dynamic_img_size", False)
    if any(side % patch_size for side in shape) or not accepts_size:
        raise ValueError(
            f"--size: {describe(simplify(shape))} pixels do not fit patches of {patch_size} pixels;"
            f" give a multiple of {patch_size}"
        )
    inputs: list[Tensor] = []
    layer = blocks[-1].attn
    with layer.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0])):
        tokens = model.forward_features(normalized)
    num_prefix, grid = model.num_prefix_tokens, (shape[0] // patch_size, shape[1] // patch_size)
    attention = None
    if num_prefix:
        attention = attention_weights(layer, inputs[0])[:, :, 0, num_prefix:].unflatten(2, grid)
    patches = tokens[:, num_prefix:].transpose(1, 2).unflatten(2, grid)
    return Maps(attention, principal_components(patches))


def _feature_map(model: Any, images: Tensor, name: str) -> Tensor:
    """Return a network's last feature map, (images, dim, rows, columns).

    Raises:
        ValueError: If the network does not accept images of this size, or has no feature map.
    """
    try:
        outputs = model.forward_features(images)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f"--size: {name} does not accept images of {describe(simplify(images.shape[-2:]))}"
            f" pixels: {str(error).splitlines()[0]}; give another size"
        ) from None
    if not isinstance(outputs, Tensor) or outputs.ndim != 4:
        raise ValueError(f"backbone.name: {name} has no feature map to draw; give a ViT or a CNN")
    is_channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
    return outputs.permute(0, 3, 1, 2) if is_channels_last else outputs


def attention_weights(layer: Attention, tokens: Tensor) -> Tensor:
    """Return a layer's attention for its input tokens, (images, heads, tokens, tokens).

    Each row sums to 1.
    """
    qkv = layer.qkv(tokens).unflatten(2, (3, layer.num_heads, -1))
    queries, keys, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    queries, keys = layer.q_norm(queries), layer.k_norm(keys)
    return (queries * layer.scale @ keys.transpose(-2, -1)).softmax(dim=-1)


def principal_components(patches: Tensor) -> Tensor:
    """Return the first three principal components of patch features, computed over all images.

    The sign of a component makes its largest loading positive. Its values are scaled so that their
    1st and 99th percentiles become 0 and 1, and clipped to [0, 1].

    Args:
        patches: Patch features, (images, dim, rows, columns).

    Returns:
        Tensor of shape (images, 3, rows, columns).
    """
    num_images, dim, rows, columns = patches.shape
    flat = patches.permute(0, 2, 3, 1).reshape(-1, dim).double()
    flat = flat - flat.mean(0)
    directions = torch.linalg.svd(flat, full_matrices=False).Vh
    directions = nn.functional.pad(directions, (0, 0, 0, max(0, 3 - len(directions))))[:3]
    largest_loading = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    values = flat @ (directions * torch.where(largest_loading < 0, -1.0, 1.0)).T
    low, high = values.quantile(torch.tensor([0.01, 0.99], dtype=values.dtype), dim=0)
    colors = ((values - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return colors.reshape(num_images, rows, columns, 3).permute(0, 3, 1, 2).float().cpu()


def top_patches_mask(weights: Tensor, share: float = TOP_SHARE) -> Tensor:
    """Return, for each head, a mask of the fewest patches that receive `share` of its attention.

    Args:
        weights: Attention, (heads, rows, columns).
        share: Share of each head's attention, in [0, 1].
    """
    flat = weights.flatten(1)
    shares, order = (flat / flat.sum(1, keepdim=True)).sort(dim=1, descending=True)
    is_top = shares.cumsum(1) - shares < share
    return torch.empty_like(is_top).scatter_(1, order, is_top).view_as(weights)


def _attention_picture(image: Tensor, weights: Tensor) -> Tensor:
    """Draw the attention in three rows, with one column for the mean and one per head.

    The rows show the attention map, its overlay on the image, and the patches that receive 60 % of
    the attention.

    Returns:
        The picture, (3, height, width) in [0, 1].
    """
    shape, pixels = image.shape[-2:], image.float() / 255
    heads = torch.cat([weights.mean(0, keepdim=True), weights]).cpu()
    maps, overlays, masked_images = [torch.ones_like(pixels)], [pixels], [torch.ones_like(pixels)]
    for head, mask in zip(heads, top_patches_mask(heads)):
        enlarged = _enlarge((head / head.max().clamp(min=1e-12))[None], shape)[0]
        colors = colormaps["inferno"](enlarged.numpy())[..., :3].astype(np.float32)
        colored = torch.from_numpy(colors).permute(2, 0, 1)
        maps.append(colored)
        overlays.append(0.45 * pixels + 0.55 * colored)
        masked_images.append(pixels * (0.2 + 0.8 * _enlarge(mask[None].float(), shape)))
    return torch.cat([torch.cat(row, dim=2) for row in (maps, overlays, masked_images)], dim=1)


def _enlarge(values: Tensor, size: ImageSize) -> Tensor:
    """Enlarge (channels, rows, columns) to (channels, *size) without interpolation."""
    return nn.functional.interpolate(values[None], size=height_and_width(size), mode="nearest")[0]


def _read_image(run: Run, file: Path, size: ImageSize) -> Tensor:
    """Return an image in the run's channels, uint8 (C, height, width)."""
    if not file.is_file():
        raise ValueError(f"{file}: no such file; give the path of an image")
    pixels = torch.from_numpy(decode(file.read_bytes(), str(file), pixel_format(run.config.data)))
    return crops.evaluation_view(pixels.permute(2, 0, 1), size, 1.0, "bicubic")


def _save_picture(picture: Tensor, path: Path) -> Path:
    pixels = (picture.clamp(0, 1) * 255).round().byte()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path)
    return path


if __name__ == "__main__":
    command_line.execute(main, "ssl_pretrain.eval.attention")
