"""The Python API: pretrain on images, load the backbone, evaluate it and embed other images."""

import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ssl_pretrain import config as configuration
from ssl_pretrain import methods, schema
from ssl_pretrain.checkpoint.folder import is_finished
from ssl_pretrain.config import RunConfig
from ssl_pretrain.data import python_objects
from ssl_pretrain.data.config import locate
from ssl_pretrain.data.image_source import Source
from ssl_pretrain.data.pixels import PixelFormat
from ssl_pretrain.distributed import process_group
from ssl_pretrain.eval import report, runs
from ssl_pretrain.eval.embedding import embedding_network
from ssl_pretrain.eval.embedding.feature_batches import FeatureExtractor
from ssl_pretrain.eval.frozen import named_features
from ssl_pretrain.eval.image_transform import ImageTransform
from ssl_pretrain.eval.named_evaluations import Evaluation, open_and_evaluate
from ssl_pretrain.monitoring import records
from ssl_pretrain.planning import run_settings
from ssl_pretrain.system import allocator, output_streams, stop_signals, user_objects
from ssl_pretrain.train import train_and_report

DATA_OBJECT = "data"  # name of the images that a program passes to `pretrain`


@dataclass(frozen=True)
class Run:
    """A pretraining run in a folder. `pretrain` returns one, and `Run(path)` opens an earlier one.

    Args:
        path: Folder of the run.
        objects: Data sets and networks of this program that the configuration refers to, by name.
            Only `pretrain` passes them.

    Raises:
        ValueError: If the folder contains no run.

    Example:
        >>> ssl_pretrain.Run(run.path).config.method.name
        'simclr'
        >>> len(run.metrics) > 0
        True
    """

    path: Path
    objects: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __init__(self, path: str | Path, objects: Mapping[str, Any] | None = None):
        object.__setattr__(self, "path", Path(path))
        object.__setattr__(self, "objects", dict(objects or {}))
        if not (self.path / "config.yaml").is_file():
            raise ValueError(f"{path}: contains no run; give the output folder of one")

    @property
    def config(self) -> RunConfig:
        """Configuration of the run, with one attribute per key, such as `config.optim.base_lr`."""
        return configuration.load(self.path / "config.yaml")

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """Records of the training, one dict per `log.every_steps` steps, sorted by step."""
        return records.read(self.path / "metrics.jsonl")

    @property
    def is_finished(self) -> bool:
        """True if the run has done all its steps."""
        return is_finished(self.path)

    def backbone(self, device: str = "auto") -> nn.Module:
        """Load the pretrained backbone from the newest checkpoint.

        Args:
            device: A torch device, or auto for cuda if it is available and cpu otherwise.

        Returns:
            The backbone in evaluation mode, which maps normalized images (n, C, height, width) to
            features (n, dim). Its attribute `transform` turns an image into such an input.

        Raises:
            ValueError: If the run has no intact checkpoint.

        Example:
            >>> backbone = run.backbone(device="cpu")
            >>> backbone.transform(np.zeros((8, 8), np.uint8)).shape
            torch.Size([3, ...])
        """
        return load_backbone(self, device=device)[0]

    def evaluate(self, name: str = "knn", **settings: Any) -> Evaluation:
        """Evaluate the newest checkpoint, and for comparison raw pixels and a random backbone.

        Args:
            name: "knn", "linear", "attentive", "fewshot", "semi", "finetune", "retrieval",
                "robustness", "segmentation", "spectrum", "zeroshot" or "captions". For methods of
                sentences, "sts" or "text_pairs".
            settings: Settings of that evaluation, such as `k=20` of "knn".

        Returns:
            The numbers with their protocol. Printing it shows the table.

        Raises:
            ValueError: If there is no such evaluation or setting, or the images have no labels.

        Example:
            >>> evaluation = run.evaluate("knn", k=20)
            >>> evaluation.measure
            'accuracy, %'
            >>> 0 <= evaluation.table["pretrained"]["clean"] <= 100
            True
        """
        with user_objects.provide(self.objects):
            return open_and_evaluate(self.path, name, **settings)

    def report(self) -> Path:
        """Write report.html, a page with the curves, views and neighbors of the run.

        Returns:
            Path of the page.

        Raises:
            ValueError: If the run has no intact checkpoint.
        """
        with user_objects.provide(self.objects):
            return report.write(runs.load_run(self.path))


def pretrain(
    data: Any,
    method: str | None = None,
    backbone: str | nn.Module | None = None,
    output: str | Path | None = None,
    *,
    val: Any = None,
    config: str | Path | None = None,
    **overrides: Any,
) -> Run:
    """Pretrain a backbone on images without labels, in this process, and write a report.

    Settings that are not given are chosen for the images and this machine. They are printed with
    the reasons and the expected time. The same call resumes a run that was stopped.

    Args:
        data: Path of a folder, a zip, a list of files, an .npz or a Parquet file, or of any other
            kind that `data.root` takes; a torch `Dataset`, a Hugging Face dataset,
            or an array (n, height, width, C) of images; or "digits" for the built-in data set.
            Labels are only used by evaluations.
        method: Name of the method, by default SimCLR, or `package.module` of your own.
        backbone: timm's name of a network, `package.module:function`, or a module that maps images
            (n, C, height, width) to features (n, dim). The module itself is not changed.
        output: Folder of the run, by default runs/METHOD_DATA.
        val: Images for evaluations, a path if `data` is one, or else an object.
        config: Name of a preset, such as "simclr_cifar10", or path of a YAML, whose settings
            replace the chosen ones.
        overrides: Other settings, such as `epochs=100`, `optim={"base_lr": 0.3}` or
            `optim__base_lr=0.3`. They take precedence.

    Returns:
        The finished run.

    Raises:
        ValueError: If the data or a setting is wrong. The message names it and the remedy.
        KeyboardInterrupt: If the run was asked to stop, after it has saved a checkpoint.

    Example:
        >>> run = ssl_pretrain.pretrain("digits", backbone="test_resnet", epochs=1, output=folder)
        settings for these 1,297 images and this machine:
        ...
        report: ...report.html
        >>> run.is_finished
        True
    """
    overrides = run_settings.build_tree(overrides)
    data_values, objects = _describe_data(data, val, overrides.get("data", {}))
    _require_text("method", method, "the name of one, or package.module of your own")
    method = run_settings.choose_method(method, overrides)
    if isinstance(backbone, nn.Module):
        objects[type(backbone).__name__] = backbone
        backbone = f"{user_objects.OBJECT_PREFIX}{type(backbone).__name__}"
    _require_text(
        "backbone",
        backbone,
        "timm's name of a network, a torch module, or a function as package.module:function",
    )
    if backbone is not None:
        overrides = schema.merge({"backbone": {"name": backbone}}, overrides)
    with user_objects.provide(objects), _restored_torch_settings():
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            process_group.start()  # the ranks of torchrun agree on the settings
        folder = Path(output or run_settings.default_folder(method, config, _name_of(data)))
        _train(run_settings.choose(folder, config, method, data_values, overrides))
    run = Run(folder, objects)
    if process_group.world_size() == 1:
        print(f"report: {run.report()}", flush=True)
    return run


def load_backbone(
    run: Run | str | Path, *, device: str = "auto", **overrides: Any
) -> tuple[nn.Module, ImageTransform]:
    """Load a pretrained backbone and the transform of its images.

    Args:
        run: A run, its folder, the folder of an export, a file of weights, or `timm:TAG` for
            weights that timm publishes.
        device: A torch device, or auto for cuda if it is available and cpu otherwise.
        overrides: For a file of weights, `backbone="resnet50"` and other settings.

    Returns:
        The backbone in evaluation mode, which maps (n, C, height, width) to features (n, dim), and
        the transform from an image to (C, height, width).

    Raises:
        ValueError: If there is no such run or file, or the weights do not fit the network.

    Example:
        >>> backbone, transform = ssl_pretrain.load_backbone(run, device="cpu")
        >>> image = np.zeros((8, 8), np.uint8)  # or a PIL image, or a path
        >>> backbone(transform(image)[None]).shape
        torch.Size([1, ...])
    """
    if isinstance(overrides.get("backbone"), str):
        overrides["backbone"] = {"name": overrides["backbone"]}
    arguments = [
        f"{key}={value}"
        for key, value in schema.flatten(run_settings.build_tree(overrides)).items()
    ]
    if not isinstance(run, (Run, str, Path)):
        raise ValueError(
            f"load_backbone: an object of type {type(run).__name__} is no run; give a run, its "
            "folder, or a file of weights"
        )
    objects, path = (run.objects, run.path) if isinstance(run, Run) else ({}, run)
    with user_objects.provide(objects):
        network = embedding_network.open_network(path, arguments, device)
    network.backbone.transform = network.transform  # type: ignore[assignment]
    network.backbone.parallel = network.parallel  # type: ignore[assignment]
    return network.backbone, network.transform


def embed(
    backbone: nn.Module | Run | str | Path,
    images: Any,
    *,
    transform: ImageTransform | None = None,
    feature: str = named_features.POOLED,
    batch_size: int = 64,
    num_workers: int = 0,
) -> np.ndarray:
    """Compute the features of images, in the run's precision (`parallel.precision`).

    Args:
        backbone: A backbone of `load_backbone`, a run, or the folder of one.
        images: Path of a folder, zip or list of files, a data set, an array, or a list of images.
        transform: Transform of the images, by default the backbone's own.
        feature: "pooled", the backbone's output; "prefix", "patch_mean", "cls_mean" or "last4" of
            its tokens; or "patches", one vector per patch.
        batch_size: Images per forward pass.
        num_workers: Processes that read the images. With 0, this process reads them.

    Returns:
        Features, float32 (n, dim) or for patches (n, patches, dim), in the order of the images. The
        features of an unreadable image are NaN, and a warning names it.

    Raises:
        ValueError: If there is no image, too many are unreadable, the transform is missing, or the
            backbone does not have the feature.

    Example:
        >>> ssl_pretrain.embed(run, np.zeros((2, 8, 8), np.uint8)).shape
        (2, ...)
    """
    network = backbone if isinstance(backbone, nn.Module) else load_backbone(backbone)[0]
    transform = transform or getattr(network, "transform", None)
    if transform is None:
        raise ValueError(
            "embed: this backbone has no transform; give the one that load_backbone returned with "
            "it, as transform="
        )
    if not isinstance(transform, ImageTransform):
        raise ValueError(
            "embed: transform is not one of load_backbone; give that one, or leave it out"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size: {batch_size} is out of range; give a whole number >= 1")
    source = open_images(images, transform.pixel_format)
    parallel = getattr(network, "parallel", None)
    extractor = FeatureExtractor(network, transform, feature, parallel)
    features = []
    for batch in extractor.extract(source, batch_size=batch_size, num_workers=num_workers):
        for reason in batch.unreadable.values():
            warnings.warn(f"{reason}; its features are NaN", stacklevel=2)
        features.append(batch.features)
    return torch.cat(features).numpy()


def list_methods() -> list[str]:
    """List the methods that `pretrain` accepts, besides your own.

    Returns:
        Names of the methods, sorted.

    Example:
        >>> "dino" in ssl_pretrain.list_methods()
        True
    """
    return methods.names()


def _require_text(name: str, value: Any, allowed: str) -> None:
    """Raise ValueError unless an argument is text or None."""
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{name}: {value!r} is of type {type(value).__name__}; give {allowed}")


def _describe_data(
    data: Any, val: Any, settings: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Describe the images in the terms of a configuration.

    Args:
        data: Training images.
        val: Images for evaluations, or None.
        settings: The user's settings of the section `data`.

    Returns:
        The values of the section `data`, and the objects by name that they refer to.

    Raises:
        ValueError: If the data is not a data set of images.
    """
    if isinstance(data, (str, Path)):
        if val is not None and not isinstance(val, (str, Path)):
            raise ValueError("val: is an object, but data is a path; give both in the same way")
        return dict(locate(data)) | ({} if val is None else {"val": os.path.abspath(val)}), {}
    num_channels, value_range = settings.get("channels"), settings.get("range")
    train = python_objects.open_object(data, "data", num_channels, value_range)
    splits = {"train": train, "val": None}
    if isinstance(val, (str, Path)):
        raise ValueError("val: is a path, but data is an object; give both in the same way")
    if val is not None:
        splits["val"] = python_objects.open_object(val, "val", train.num_channels, value_range)
    reference = f"{user_objects.OBJECT_PREFIX}{DATA_OBJECT}"
    values = {"source": reference, "channels": train.num_channels}
    return values, {DATA_OBJECT: splits.get}  # a function of the split's name


def _name_of(data: Any) -> str:
    """Return a short name of the data for the run's folder."""
    if isinstance(data, (str, Path)):
        return Path(data).resolve().stem
    return "images"


def open_images(images: Any, pixel_format: PixelFormat) -> Source:
    """Open the images that `embed` takes in any of its forms.

    Raises:
        ValueError: If they are no images, or most have other channels (`WrongChannels`).
    """
    if isinstance(images, Source):
        return images
    if isinstance(images, (str, Path)):
        return embedding_network.open_images(images, pixel_format)[0]
    return python_objects.open_object(
        images, "images", pixel_format.num_channels, pixel_format.value_range
    )


def _train(config: RunConfig) -> None:
    """Train in this process, on one device.

    Raises:
        KeyboardInterrupt: If the run was asked to stop before its end.
    """
    settings = config.parallel
    with stop_signals.temporary_signal_handlers(), output_streams.tolerate_lost_output():
        device = process_group.start(
            settings.threads, settings.deterministic, settings.timeout_seconds
        )
        num_gpus = torch.cuda.device_count()
        if num_gpus > 1 and process_group.world_size() == 1:
            process_group.print_once(
                f"this process uses one of {num_gpus} GPUs. To use them all, run: "
                f"torchrun --nproc-per-node {num_gpus} {sys.argv[0] or 'SCRIPT.py'}"
            )
        outcome = train_and_report(config, device, stop_after=None, preempt_at=None)
    if outcome.step < outcome.num_steps:
        raise KeyboardInterrupt(
            f"stopped after step {outcome.step} of {outcome.num_steps}; the same call resumes it"
        )


@contextmanager
def _restored_torch_settings() -> Iterator[None]:
    """Restore what a run changes: torch's threads and determinism, and the memory allocator."""
    num_threads = torch.get_num_threads()
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
        torch.use_deterministic_algorithms(is_deterministic)
        allocator.release_freed_memory()
