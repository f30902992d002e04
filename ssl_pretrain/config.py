"""The configuration of a run: dataclasses, read from YAML and `key=value` overrides, and checked."""

from __future__ import annotations

import dataclasses
import typing
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from ssl_pretrain import methods, schema
from ssl_pretrain.checkpoint.checkpoints import CheckpointConfig
from ssl_pretrain.data import sources
from ssl_pretrain.data.sources import DataConfig
from ssl_pretrain.fault_tolerance.nan_guard import GuardConfig
from ssl_pretrain.methods.base import Method, MethodConfig
from ssl_pretrain.models import backbones
from ssl_pretrain.models.backbones import BackboneConfig
from ssl_pretrain.monitoring.collapse import HealthConfig
from ssl_pretrain.monitoring.logger import LogConfig
from ssl_pretrain.monitoring.online_knn import OnlineConfig
from ssl_pretrain.optim import optimizers as optim
from ssl_pretrain.optim.optimizers import OptimConfig
from ssl_pretrain.parallel import parallel_config
from ssl_pretrain.parallel.parallel_config import ParallelConfig
from ssl_pretrain.schema import Scalar, setting
from ssl_pretrain.views import recipe
from ssl_pretrain.views.batch import Batch
from ssl_pretrain.views.recipe import ViewsConfig


class ConfigError(ValueError):
    """A mistake in a configuration. Its message names the file, the key, the value and what is allowed."""


@dataclass
class PlanConfig:
    """Machine for which `--plan` estimates memory and time."""

    gpu: Literal["", "H100", "H200", "A100", "L40S"] = setting(
        "",
        "Type of GPU. The number of GPUs is launch.nodes x launch.gpus_per_node. "
        "Empty: no estimate of memory and time.",
    )
    intra_node_gb_per_second: float = setting(
        0.0,
        "Bandwidth in GB/s, one way, from one GPU to the others of its node. 0: the GPU's data sheet.",
    )
    inter_node_gb_per_second: float = setting(
        0.0,
        "Bandwidth in GB/s, one way, from one node to the others, all ports together. "
        "0: the GPU's data sheet.",
    )
    decoded_per_core: float = setting(
        0.0, "Images per second that one CPU core decodes and crops. 0: the loader is not planned."
    )
    num_images: int = setting(
        0, "Training images of the data set. 0: counted, which needs data that can be read."
    )


@dataclass
class LaunchConfig:
    """Machines and processes of a run, for launch/pretrain.py."""

    cluster: Literal["auto", "slurm", "local"] = setting(
        "auto", "Place where the run starts. auto: SLURM if sbatch is installed, else this machine."
    )
    ranks: int = setting(0, "Processes per machine. 0: one per GPU, or one on CPU.")
    max_restarts: int = setting(
        3,
        "How often torchrun restarts all ranks from the newest checkpoint after losing one. "
        "SLURM requeues the job instead.",
    )
    hosts: str = setting(
        "", "Host names, such as a,b. Print one torchrun command per host without running it."
    )
    port: int = setting(29500, "Port of the first host, at which the ranks of several hosts meet.")
    nodes: int = setting(1, "SLURM: number of nodes.")
    gpus_per_node: int = setting(
        0, "SLURM: GPUs per node. 0: CPU nodes, with `ranks` processes each."
    )
    cpus_per_rank: int = setting(0, "SLURM: CPU cores per rank. 0: as many as data.num_workers.")
    memory_gb: int = setting(0, "SLURM: memory per node in GB. 0: the cluster's default.")
    hours: float = setting(
        24.0,
        "SLURM: time limit of one job. A run that takes longer continues when the job is requeued, "
        "or in the next job of the chain.",
    )
    signal_seconds: int = setting(
        120,
        "SLURM: seconds before the time limit at which the job is signaled. "
        "One step and one checkpoint must fit into them.",
    )
    requeue: bool = setting(
        True, "SLURM: requeue the job after preemption, a time limit or the loss of a node."
    )
    chain: int = setting(
        1, "SLURM: number of jobs that follow each other, for clusters that do not requeue."
    )
    partition: str = setting("", "SLURM: partition. Empty: the cluster's default.")
    account: str = setting("", "SLURM: account. Empty: the user's default.")
    qos: str = setting("", "SLURM: quality of service. Empty: the cluster's default.")
    constraint: str = setting("", "SLURM: required features of the nodes. Empty: none.")


@dataclass
class EvaluationConfig:
    """Evaluations after a run, and the settings they share."""

    at_end: list[str] = setting(
        ["knn", "linear", "report"],
        "Evaluation commands that launch/pretrain.py runs after training.",
    )
    image_size: int = setting(
        0, "Height and width of the images in pixels. 0: the size of the first crop in views.crops."
    )
    crop_ratio: float = setting(
        0.875,
        "Side of the center crop divided by the side of the resized image.",
        above=0,
        maximum=1,
    )
    interpolation: Literal["bilinear", "bicubic"] = setting(
        "bilinear", "Interpolation when images are resized."
    )
    k: int = setting(20, "Number of nearest neighbors that vote.")
    temperature: float = setting(0.07, "Divisor of the neighbors' cosine similarities.")


@dataclass
class RunConfig:
    """Everything about one pretraining run."""

    method: MethodConfig = setting(MethodConfig(), "The self-supervised method and its loss.")
    backbone: BackboneConfig = setting(
        BackboneConfig(), "The network that is pretrained and its initial weights."
    )
    data: DataConfig = setting(DataConfig(), "The images and how they are read.")
    views: ViewsConfig = setting(ViewsConfig(), "Crops and augmentations.")
    optim: OptimConfig = setting(OptimConfig(), "The optimizer and its schedule.")
    parallel: ParallelConfig = setting(ParallelConfig(), "How the ranks share the computation.")
    checkpoint: CheckpointConfig = setting(
        CheckpointConfig(), "When checkpoints are saved, and which ones stay.", on_resume="free"
    )
    log: LogConfig = setting(LogConfig(), "Metrics and Weights & Biases.", on_resume="free")
    online: OnlineConfig = setting(
        OnlineConfig(), "Accuracies measured during the run.", on_resume="free"
    )
    health: HealthConfig = setting(HealthConfig(), "Detection of collapse.", on_resume="free")
    guard: GuardConfig = setting(
        GuardConfig(), "Recovery from gradients that are not finite.", on_resume="free"
    )
    launch: LaunchConfig = setting(
        LaunchConfig(), "Machines and processes, for launch/pretrain.py.", on_resume="free"
    )
    evaluation: EvaluationConfig = setting(
        EvaluationConfig(), "Evaluations after the run.", on_resume="free"
    )
    plan: PlanConfig = setting(
        PlanConfig(), "Machine for which `--plan` estimates memory and time.", on_resume="free"
    )
    seed: int = setting(0, "Seed of every random number of the run.", minimum=0, maximum=2**63 - 1)
    epochs: int = setting(100, "Passes over the training images.", on_resume="warn", minimum=1)
    global_batch_size: int = setting(
        4096, "Images per optimizer step, over all ranks and micro-batches.", minimum=1
    )
    micro_batch_size: int | str = setting(
        0,
        "Images per forward pass on one rank. 0: the rank's whole share of the global batch. "
        "auto: the largest micro-batch that fits in memory, found by trial.",
        on_resume="free",
    )
    output: str = setting(
        "", "Folder of the run. Empty: runs/<name of the YAML>.", on_resume="free"
    )


# Keys of `launch` that only a submission to SLURM uses.
SLURM_KEYS = (
    "nodes",
    "gpus_per_node",
    "cpus_per_rank",
    "memory_gb",
    "hours",
    "signal_seconds",
    "requeue",
    "chain",
    "partition",
    "account",
    "qos",
    "constraint",
)
NO_METHOD = "none"  # method.name of weights that were not trained by this project
NOTHING_INTERPOLATED = (
    "nothing is interpolated, so that no secret of the environment enters a logged config"
)


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read the configuration of a YAML file with `key=value` overrides.

    Raises:
        ConfigError: A key or a value is not allowed. The message names the file, both, and what is.
    """
    tree = override(read_yaml(Path(path)), overrides, str(path))
    if not schema.at(tree, "output") or schema.at(tree, "output") == Scalar(""):
        tree["output"] = f"runs/{Path(path).stem}"
    return _build(tree, str(path))


def from_dict(values: dict[str, Any], source: str = "the checkpoint's config") -> RunConfig:
    """Build a configuration from the plain values of a checkpoint's manifest."""
    return _build(values, source)


def without_method(overrides: Sequence[str], source: str) -> RunConfig:
    """The configuration for evaluating weights that were not trained by this project.

    Raises:
        ConfigError: As in `load`.
    """
    tree = override({"method": {"name": NO_METHOD}}, overrides, source)
    return _build(tree, source)


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The configuration as the plain values of a manifest."""
    return dataclasses.asdict(config)


def to_yaml(config: RunConfig) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def override(values: dict[str, Any], overrides: Sequence[str], source: str) -> dict[str, Any]:
    """Set `key=value` overrides in the values of a YAML file or a manifest.

    Raises:
        ConfigError: An override is not key=value, or its key does not exist.
    """
    values, pairs = schema.rename_keys(values, source), []
    for text in overrides:
        key, equals, value = text.partition("=")
        if key in schema.REMOVED and schema.REMOVED[key] in (None, value):
            warnings.warn(f"command line: {text} is ignored", stacklevel=2)
            continue
        if key in schema.RENAMED:
            warnings.warn(f"command line: {key} is now {schema.RENAMED[key]}", stacklevel=2)
            key = schema.RENAMED[key]
        if not equals:
            raise ConfigError(f"{text!r}: an override is key=value, such as optim.base_lr=0.3")
        if "${" in text:
            raise ConfigError(f"{key}: '${{' is not allowed: {NOTHING_INTERPOLATED}")
        pairs.append((key, value))
    try:
        chosen = schema.merge(values, {})
        for (
            key,
            value,
        ) in pairs:  # the method's name comes first, since it decides the types of its keys
            if key in ("method", "method.name"):
                chosen = schema.merge(
                    chosen, schema.override(RunConfig, key, value, {"method": dict[str, str]})
                )
        instead = _types(chosen, source)
        for key, value in pairs:
            values = schema.merge(values, schema.override(RunConfig, key, value, instead))
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from None
    return values


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file. Its scalars stay text until the types of their keys are known.

    Raises:
        ConfigError: There is no such file, or it is not a YAML mapping in UTF-8.
    """
    if not path.is_file():
        known = (
            sorted(str(found) for found in path.parent.glob("*.yaml"))
            if path.parent.is_dir()
            else []
        )
        raise ConfigError(
            f"{path}: no such file. "
            + (
                f"There are: {', '.join(known)}"
                if known
                else "Give the path of a YAML, such as configs/simclr_digits.yaml"
            )
        )
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path}: not UTF-8 text: byte 0x{content[error.start]:02x} at line {line}. Save the file as UTF-8"
        ) from None
    if "${" in text:
        raise ConfigError(f"{path}: '${{' is not allowed: {NOTHING_INTERPOLATED}")
    try:
        tree = schema.parse_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{path}: not valid YAML{_yaml_problem(error, text)}. Write each key once, as 'key: value'"
        ) from None
    if tree == Scalar(""):
        return {}
    if not isinstance(tree, dict):
        found = "a list" if isinstance(tree, list) else f"the text {tree.text!r}"
        raise ConfigError(f"{path}: a configuration is a mapping of keys, got {found}")
    return tree


def _yaml_problem(error: yaml.YAMLError, text: str) -> str:
    """Format an error of PyYAML as ` at line N: PROBLEM`."""
    if isinstance(error, yaml.reader.ReaderError):
        character = (
            text.find(chr(error.character))
            if isinstance(error.character, int)
            else text.find(str(error.character))
        )
        return f" at line {text.count(chr(10), 0, max(0, character)) + 1}: {error.reason}"
    mark = getattr(error, "problem_mark", None)
    where = f" at line {mark.line + 1}" if mark else ""
    return f"{where}: {getattr(error, 'problem', None) or error}"


def _types(tree: dict[str, Any], source: str) -> dict[str, Any]:
    """The type of the key `method`: the Config of the method that `method.name` names."""
    name = schema.at(tree, "method.name")
    name = name.text if isinstance(name, Scalar) else name
    if not name or name == "???":
        raise ConfigError(
            f"{source}: method.name is missing; choose one of: {', '.join(methods.names())}"
        )
    return {"method": MethodConfig if name == NO_METHOD else methods.find(str(name)).Config}


def _build(tree: dict[str, Any], source: str) -> RunConfig:
    if "${" in str(tree):
        raise ConfigError(f"{source}: '${{' is not allowed: {NOTHING_INTERPOLATED}")
    tree = schema.rename_keys(tree, source)
    try:
        config = schema.build(RunConfig, tree, _types(tree, source))
        schema.check(config)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from None
    assert isinstance(config, RunConfig), "the schema is RunConfig"
    return config


def check(config: RunConfig, world_size: int) -> None:
    """Check that the keys fit together and that the first step can run on this many ranks.

    Raises:
        ConfigError: Names the keys, their values and what would do.
    """
    try:
        schema.check(config)
        recipe.check(config.views)
        sources.check(config.data)
        group = parallel_config.bn_group_images(config.parallel, config.global_batch_size)
        parallel_config.check(config.parallel)
        optim.check(config.optim)
        backbones.check(config.backbone, _image_sizes(config))
        config.method.check(config, world_size)
        _try_method(config)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if config.global_batch_size < 1 or config.global_batch_size % world_size:
        raise ConfigError(_does_not_divide(config.global_batch_size, world_size))
    share = config.global_batch_size // world_size
    part = part_size(config, world_size)
    if part is not None and (part < 1 or share % part):
        raise ConfigError(
            f"micro_batch_size: {part} does not divide this rank's share of {share} "
            f"(global_batch_size {config.global_batch_size} / {world_size} ranks)"
        )
    if part is not None and part < share and group > part:
        raise ConfigError(
            f"micro_batch_size: {part} splits batch norm's groups of {group} images, which cannot be accumulated exactly; "
            f"set micro_batch_size={share}, or parallel.bn_group_images={part}, "
            f"which departs from the recipe's {config.parallel.bn_group_images}"
        )


def method_on_meta(config: RunConfig) -> Method:
    """Build the run's method on the meta device, to try it, to count its parameters and to see their names."""
    with torch.device("meta"):
        return config.method.build(
            backbones.on_meta(config.backbone, recipe.expand_counts(config.views)[0].size)
        )


def _try_method(config: RunConfig) -> None:
    """Run the method's forward pass on the run's views, on the meta device.

    Raises:
        ValueError: The method takes other views or more images, or cannot run on the backbone.
    """
    sizes = [crop.size for crop in recipe.expand_counts(config.views)]
    num_images = min(2, parallel_config.bn_group_images(config.parallel, config.global_batch_size))
    untrained = dataclasses.replace(
        config, backbone=dataclasses.replace(config.backbone, init="random")
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        method = method_on_meta(untrained)
        with torch.device("meta"):
            numbers = torch.zeros(num_images, dtype=torch.int64)
            images = [torch.zeros(num_images, 3, size, size) for size in sizes]
            if method.couples != "nothing" and config.global_batch_size < 2:
                raise ValueError(
                    f"global_batch_size: {config.global_batch_size} leaves {config.method.name} no other image "
                    "to compare with; give 2 or more"
                )
            try:
                method(Batch(images, numbers, numbers))
            except (IndexError, RuntimeError, TypeError, ValueError) as error:
                if backbones.lacks_meta(error):
                    return
                if "more than 1 value per channel" in str(error):
                    raise ValueError(
                        "parallel.bn_group_images: batch norm cannot take its statistics from one image of one position; "
                        f"give groups and a global_batch_size ({config.global_batch_size}) of 2 images or more"
                    ) from None
                if isinstance(error, ValueError):
                    raise
                raise ValueError(
                    f"method.name: {config.method.name} cannot run on backbone.name {config.backbone.name} "
                    f"with views of {', '.join(map(str, sizes))} pixels: {str(error).splitlines()[0]}"
                ) from None


def check_slurm_keys(
    config: RunConfig, overrides: Sequence[str], reason: str, remedy: str, *, typed_only: bool
) -> None:
    """Refuse the keys of SLURM where nothing is submitted to it.

    Args:
        reason: Why nothing is submitted, for the message.
        remedy: What to do instead.
        typed_only: Refuse them on the command line only. A YAML made for a cluster may have them.

    Raises:
        ConfigError: Names each such key and its value.
    """
    default, typed = LaunchConfig(), {override.partition("=")[0] for override in overrides}
    given = [key for key in SLURM_KEYS if getattr(config.launch, key) != getattr(default, key)]
    if typed_only:
        given = [key for key in given if f"launch.{key}" in typed]
    if given:
        named = ", ".join(f"launch.{key}: {getattr(config.launch, key)}" for key in given)
        raise ConfigError(
            f"{named}: {'this is' if len(given) == 1 else 'these are'} for SLURM, and {reason}; {remedy}"
        )


def _image_sizes(config: RunConfig) -> dict[str, int]:
    """Sizes in pixels of the images that the backbone sees, by the keys that set them."""
    sizes = {f"views.crops.{name}.size": crop.size for name, crop in config.views.crops.items()}
    return sizes | (
        {"evaluation.image_size": config.evaluation.image_size}
        if config.evaluation.image_size
        else {}
    )


def _does_not_divide(batch: int, ranks: int) -> str:
    below = batch // ranks * ranks
    near = (
        f"the nearest that do are {below} and {below + ranks}"
        if below
        else f"the nearest that does is {ranks}"
    )
    return f"global_batch_size: {batch} does not divide over {ranks} ranks; {near}"


def part_size(config: RunConfig, world_size: int) -> int | None:
    """Images per forward pass on one rank, or None for `auto`, which is measured at the start of a run.

    Raises:
        ConfigError: `micro_batch_size` is neither a number nor auto.
    """
    written = str(config.micro_batch_size)
    if written == "auto":
        return None
    if not written.lstrip("-").isdecimal():
        raise ConfigError(
            f"micro_batch_size: {written!r}; choose a number of images, 0 for a rank's whole share, or auto"
        )
    return int(written) or config.global_batch_size // world_size


def compare_for_resume(saved: dict[str, Any], config: RunConfig, path: str) -> None:
    """Refuse to resume a checkpoint with a configuration that computes something else.

    The `on_resume` policy of a key says if it may differ. A key that the saving version did not
    have counts as its default.

    Args:
        saved: The configuration in the checkpoint's manifest.
        config: The configuration to resume with.
        path: Folder of the checkpoint, for the message.

    Raises:
        ConfigError: Lists the keys that differ, and two remedies.
    """
    old, new = schema.flatten(schema.rename_keys(saved, path)), schema.flatten(to_dict(config))
    old = _defaults(config, old, new) | old
    differing = {
        key: f"{key}: {old.get(key)!r} then, {new.get(key)!r} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    }
    policies = {key: _resume_policy(key, config) for key in differing}
    refused = [text for key, text in differing.items() if policies[key] == "same"]
    if refused:
        raise ConfigError(
            f"{path} was made by another configuration: {'; '.join(refused)}. "
            "Give a new output, or start a new run from its weights with "
            f"backbone.init={Path(path).parent.parent}"
        )
    for key, text in differing.items():
        if policies[key] == "warn":
            warnings.warn(f"{text}: the schedule changes from here on", stacklevel=2)


def _defaults(config: RunConfig, old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Return the defaults of the keys that only the new configuration has.

    The options of a crop have defaults, but a crop that the saved run did not have is a difference.
    """
    defaults = schema.flatten(to_dict(from_dict({"method": {"name": config.method.name}})))
    defaults = {key: value for key, value in defaults.items() if key in new}
    for name in config.views.crops:
        options = schema.flatten(dataclasses.asdict(recipe.Crop()), f"views.crops.{name}.")
        if options.keys() & old.keys():
            defaults |= options
    return defaults


def _resume_policy(key: str, config: RunConfig) -> schema.Policy:
    """Return what the first of the key's sections, or the key itself, says about a resume."""
    kind: Any = RunConfig
    for name in key.split("."):
        if not dataclasses.is_dataclass(kind):
            break
        kind = typing.cast(type, kind)
        policy = schema.metadata(kind, name).get("on_resume", "same")
        if policy != "same":
            return typing.cast(schema.Policy, policy)
        kind = type(config.method) if name == "method" else schema.hints(kind).get(name)
    return "same"
