"""Crops -> augmented views: the colours of every sample, drawn one by one, applied in batches on any device.

`draw` chooses every number on the host; `apply` computes, in this order: colour jitter (its
four operations in an order of its own per sample), grayscale, blur, solarize, then
(x - mean) / std. An operation touches only the samples it was drawn for; which ones they
are is known on the host, so a GPU is never waited for.

The arithmetic is torchvision's (`transforms.v2.functional`), on float32 in [0, 1], unless the
recipe asks for that of SimCLR's and BYOL's code (TensorFlow and JAX): contrast around the mean
of each channel instead of the mean gray (contrast_mean: channel), saturation scaled in HSV at
constant value instead of blended with gray (saturation_mode: hsv), a blur that pads with zeros
instead of a reflection (blur_border: zero), and brightness that is added (brightness_mode: add).
Hue, grayscale and solarize are the same in both.
"""

from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from ssl_pretrain import rng
from ssl_pretrain.rng import Purpose
from ssl_pretrain.views import color_cpu
from ssl_pretrain.views.recipe import Crop, blur_taps
from ssl_pretrain.views.upload import upload

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(
    4
)  # the operations of colour jitter, numbered as torchvision does
FUSED_ON = ("cuda",)  # devices whose colors are the kernels of color_triton
LUMA = (0.2989, 0.587, 0.114)  # torchvision's weights of red, green and blue (ITU-R BT.601)


@dataclass(frozen=True)
class Parameters:
    """Everything drawn for one view of n samples: row i belongs to `indices[i]` of `draw`."""

    jitter: np.ndarray  # (n,) bool: which samples are jittered
    order: np.ndarray  # (n, 4) int64: the operation of each of the four stages
    factors: np.ndarray  # (n, 4) float32: by operation; brightness (added if so configured), contrast, saturation, hue shift
    grayscale: np.ndarray  # (n,) bool
    blur: np.ndarray  # (n,) bool
    sigma: np.ndarray  # (n,) float32, in pixels
    solarize: np.ndarray  # (n,) bool


def draw(crop: Crop, seed: int, epoch: int, indices: np.ndarray, view: int) -> Parameters:
    """The parameters of one view of n samples, in torchvision's ranges; row i depends on `indices[i]` alone.

    Args:
        crop: the view's recipe.
        seed: of the run.
        epoch: passes over the data before this one.
        indices: of the samples in the data set, (n,) integers.
        view: number of the view, as `recipe.expand_counts` orders them.
    """

    def uniform(purpose: Purpose, count: int) -> np.ndarray:
        return rng.uniform(seed, epoch, indices, view, purpose, count)

    strengths = _strengths(crop)
    low, high = np.maximum(0.0, 1.0 - strengths), 1.0 + strengths
    low[HUE], high[HUE] = -crop.hue, crop.hue
    if crop.brightness_mode == "add":
        low[BRIGHTNESS], high[BRIGHTNESS] = -crop.brightness, crop.brightness

    jitter_draws, blur_draws = uniform(Purpose.JITTER, 5), uniform(Purpose.BLUR, 2)
    jitter = jitter_draws[:, 0] < crop.jitter
    order = np.argsort(uniform(Purpose.JITTER_ORDER, 4), axis=1, kind="stable")
    factors = (low + (high - low) * jitter_draws[:, 1:]).astype(np.float32)
    grayscale = uniform(Purpose.GRAYSCALE, 1)[:, 0] < crop.grayscale
    blur = blur_draws[:, 0] < crop.blur
    sigma = (
        crop.blur_sigma[0] + (crop.blur_sigma[1] - crop.blur_sigma[0]) * blur_draws[:, 1]
    ).astype(np.float32)
    solarize = uniform(Purpose.SOLARIZE, 1)[:, 0] < crop.solarize

    return Parameters(jitter, order, factors, grayscale, blur, sigma, solarize)


def _strengths(crop: Crop) -> np.ndarray:
    """Strength of each operation of the color jitter, (4,), 0 for one that is off."""
    return np.array([crop.brightness, crop.contrast, crop.saturation, crop.hue])


def apply(
    pixels: Tensor, parameters: Parameters, crop: Crop, mean: list[float], std: list[float]
) -> Tensor:
    """The finished views: float32 (n, 3, size, size), augmented and normalized, on the device of `pixels`.

    Args:
        pixels: crops, uint8 (n, 3, size, size).
        parameters: drawn for these n samples.
        crop: the recipe they were drawn with.
        mean: of red, green and blue in [0, 1].
        std: likewise.

    Raises:
        ValueError: `pixels` is not uint8 (n, 3, height, width) with the parameters' n.
    """
    _check(pixels, len(parameters.jitter))
    if pixels.device.type == "cpu":
        return _on_cpu(pixels, parameters, crop, mean, std)
    return apply_in_batches(pixels, parameters, crop, mean, std)


def apply_to_group(
    pixels: list[Tensor],
    parameters: list[Parameters],
    crop: Crop,
    mean: list[float],
    std: list[float],
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Return the finished views of one kind of crop: on CUDA in a handful of launches for all of them, else view by view.

    Args:
        pixels: Crops of each view, uint8 (n, 3, size, size).
        parameters: Drawn for each view.
        crop: The recipe that all of them were drawn with.
        mean: Of red, green and blue in [0, 1].
        std: Likewise.
        dtype: Of the views on CUDA, which are channels_last; float32 elsewhere.
    """
    if not _fused(pixels[0]):
        return [apply(view, drawn, crop, mean, std) for view, drawn in zip(pixels, parameters)]
    for view, drawn in zip(pixels, parameters):
        _check(view, len(drawn.jitter))
    from ssl_pretrain.views import color_triton

    strengths = _strengths(crop)
    order = np.concatenate([drawn.order for drawn in parameters])
    jitter = np.concatenate([drawn.jitter for drawn in parameters])
    codes = np.where(jitter[:, None] & (strengths[order] > 0), order, -1)
    factors = np.take_along_axis(
        np.concatenate([drawn.factors for drawn in parameters]), order, axis=1
    )
    sigma, grayscale, blur, solarize = (
        np.concatenate([getattr(drawn, name) for drawn in parameters])
        for name in ("sigma", "grayscale", "blur", "solarize")
    )
    views = color_triton.apply(
        torch.cat(pixels) if len(pixels) > 1 else pixels[0],
        color_triton.pack(codes, factors, sigma, grayscale, blur, solarize),
        int(blur.sum()),
        taps=blur_taps(crop), threshold=crop.solarize_threshold, mean=mean, std=std, adds=crop.brightness_mode == "add", dtype=dtype,
        hsv=crop.saturation_mode == "hsv", channel_mean=crop.contrast_mean == "channel", zero_border=crop.blur_border == "zero",
    )  # fmt: skip
    return list(views.chunk(len(pixels)))


def _fused(pixels: Tensor) -> bool:
    return pixels.device.type in FUSED_ON and find_spec("triton") is not None


def _on_cpu(
    pixels: Tensor, parameters: Parameters, crop: Crop, mean: list[float], std: list[float]
) -> Tensor:
    views = torch.empty(pixels.shape)
    strengths = _strengths(crop)
    modes = (
        crop.brightness_mode == "add",
        crop.contrast_mean == "channel",
        crop.saturation_mode == "hsv",
        crop.blur_border == "zero",
    )
    color_cpu.apply(
        pixels.contiguous().numpy(),
        parameters.jitter,
        parameters.order,
        parameters.factors,
        modes,
        strengths,
        parameters.grayscale,
        parameters.blur,
        parameters.sigma,
        blur_taps(crop),
        parameters.solarize,
        crop.solarize_threshold,
        mean,
        std,
        torch.get_num_threads(),
        views.numpy(),
    )
    return views


def apply_in_batches(
    pixels: Tensor, parameters: Parameters, crop: Crop, mean: list[float], std: list[float]
) -> Tensor:
    """`apply` in torch's own operations, on any device: each touches at once all samples it was drawn for."""
    images = pixels.to(torch.float32).div_(255)
    rows, values = _uploaded(parameters, crop, pixels.device)
    brighten = _add if crop.brightness_mode == "add" else _brightness
    contrast = _contrast_by_channel if crop.contrast_mean == "channel" else _contrast
    saturate = _saturation_in_hsv if crop.saturation_mode == "hsv" else _saturation

    for stage in range(4):
        for operation, adjust in enumerate((brighten, contrast, saturate, _hue)):
            chosen = rows[4 * stage + operation]
            if len(chosen):
                factor = values[:, operation].index_select(0, chosen).view(-1, 1, 1, 1)
                images.index_copy_(0, chosen, adjust(images.index_select(0, chosen), factor))
    grayscale, blur, solarize = rows[16:]
    if len(grayscale):
        images.index_copy_(
            0, grayscale, _grey(images.index_select(0, grayscale)).expand(-1, 3, -1, -1)
        )
    if len(blur):
        sigma = values[:, 4].index_select(0, blur)
        images.index_copy_(
            0, blur, _blur(images.index_select(0, blur), sigma, blur_taps(crop), crop.blur_border)
        )
    if len(solarize):
        images.index_copy_(
            0, solarize, _solarize(images.index_select(0, solarize), crop.solarize_threshold)
        )
    return _standardize(images, mean, std)


def _uploaded(
    parameters: Parameters, crop: Crop, device: torch.device
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return on the device: the rows that each operation touches, and the factors and sigma of every row.

    The 19 lists of rows, int64, are stage 0's brightness, its contrast and so on, then grayscale, blur and solarize.
    The values are float32 (n, 5).
    """
    jitter, order, on = parameters.jitter, parameters.order, _strengths(crop) > 0
    chosen = [
        jitter & (order[:, stage] == operation) & on[operation]
        for stage in range(4)
        for operation in range(4)
    ]
    lists = [
        np.flatnonzero(mask)
        for mask in (*chosen, parameters.grayscale, parameters.blur, parameters.solarize)
    ]
    rows = upload(torch.from_numpy(np.concatenate(lists)), device)
    values = upload(
        torch.from_numpy(np.column_stack([parameters.factors, parameters.sigma])), device
    )
    return rows.split([len(each) for each in lists]), values


def normalize(pixels: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """Views without augmentation: (pixels / 255 - mean) / std, float32 of the shape of `pixels`, uint8 (n, 3, height, width)."""
    _check(pixels, len(pixels))
    return _standardize(pixels.to(torch.float32).div_(255), mean, std)


def _check(pixels: Tensor, n: int) -> None:
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[:2] != (n, 3):
        raise ValueError(
            f"colour: pixels must be uint8 ({n}, 3, height, width), got {pixels.dtype} {tuple(pixels.shape)}"
        )


# Each operation owns `images`, float32 (m, 3, height, width) in [0, 1], and may overwrite it.
# `factor` is (m, 1, 1, 1).


def _brightness(images: Tensor, factor: Tensor) -> Tensor:
    return images.mul_(factor).clamp_(0, 1)


def _add(images: Tensor, delta: Tensor) -> Tensor:
    return images.add_(delta).clamp_(0, 1)


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    mean = _grey(images).mean(dim=(1, 2, 3), keepdim=True)
    return images.mul_(factor).add_(mean * (1 - factor)).clamp_(0, 1)


def _contrast_by_channel(images: Tensor, factor: Tensor) -> Tensor:
    mean = images.mean(dim=(2, 3), keepdim=True)
    return images.mul_(factor).add_(mean * (1 - factor)).clamp_(0, 1)


def _saturation(images: Tensor, factor: Tensor) -> Tensor:
    grey = _grey(images).mul_(1 - factor)
    return images.mul_(factor).add_(grey).clamp_(0, 1)


def _saturation_in_hsv(images: Tensor, factor: Tensor) -> Tensor:
    """Multiply HSV's saturation at constant hue and value, and cut it at 1.

    Saturation is chroma / value. Hue and value stay when the distance of every channel to the
    largest one is multiplied by the same number, here the factor, or what makes the smallest channel 0.
    """
    low, high = images.amin(dim=1, keepdim=True), images.amax(dim=1, keepdim=True)
    chroma = (high - low).clamp_min_(torch.finfo(torch.float32).tiny)
    scale = torch.minimum(factor, high / chroma)
    return torch.sub(high, (high - images).mul_(scale)).clamp_(0, 1)


def _hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turns the colour circle by `shift` turns: HSV's hexagon, one sixth a corner, with value and chroma kept."""
    red, green, blue = images.split(1, dim=1)
    low, high = (
        torch.minimum(torch.minimum(red, green), blue),
        torch.maximum(torch.maximum(red, green), blue),
    )
    chroma = high - low
    safe = chroma.clamp_min(
        torch.finfo(torch.float32).tiny
    )  # grey has no hue: 0 / tiny, and chroma 0 hides it
    sixths = torch.where(
        high == red,
        (green - blue).div_(safe),
        torch.where(
            high == green, (blue - red).div_(safe).add_(2), (red - green).div_(safe).add_(4)
        ),
    )
    sixths = sixths.add_(6 * shift).remainder_(6)
    turned = torch.cat(
        [
            (sixths - 3).abs_().sub_(1),
            (sixths - 2).abs_().neg_().add_(2),
            (sixths - 4).abs_().neg_().add_(2),
        ],
        dim=1,
    )
    return turned.clamp_(0, 1).mul_(chroma).add_(low)


def _grey(images: Tensor) -> Tensor:
    red, green, blue = images.split(1, dim=1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def _solarize(images: Tensor, threshold: float) -> Tensor:
    return torch.where(images >= threshold, 1 - images, images)


def _blur(images: Tensor, sigma: Tensor, taps: int, border: str = "reflect") -> Tensor:
    """Gaussian blur with a sigma (m,) per image; the border is reflected, or black for "zero".

    Every channel of every image is a channel of one depthwise convolution, along the rows and
    then along the columns: 2 * taps products a pixel where torchvision's square kernel has taps^2.
    """
    m, channels, height, width = images.shape
    radius = taps // 2
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float32, device=images.device)
    kernel = torch.softmax(-0.5 * (offsets / sigma[:, None]) ** 2, dim=1).repeat_interleave(
        channels, dim=0
    )  # (3m, taps)
    padded = torch.nn.functional.pad(
        images, (radius, radius, radius, radius), mode="constant" if border == "zero" else "reflect"
    )
    stack = padded.reshape(1, m * channels, height + 2 * radius, width + 2 * radius)
    stack = torch.nn.functional.conv2d(stack, kernel[:, None, None, :], groups=m * channels)
    stack = torch.nn.functional.conv2d(stack, kernel[:, None, :, None], groups=m * channels)
    return stack.view(m, channels, height, width)


def _standardize(images: Tensor, mean: list[float], std: list[float]) -> Tensor:
    constants = _constants(tuple(mean), tuple(std), images.device)
    return images.sub_(constants[0]).div_(constants[1])


@lru_cache(maxsize=16)
def _constants(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> Tensor:
    """(2, 3, 1, 1) on the device: kept, because each copy of a list to a GPU waits for it."""
    return torch.tensor([mean, std], device=device)[:, :, None, None]
