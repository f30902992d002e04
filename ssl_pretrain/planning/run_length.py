"""Choose the network, the number of images and the epochs by the time of a few measured steps."""

import math

import numpy as np

from ssl_pretrain.data.image_source import Source
from ssl_pretrain.planning import recorder, step_time
from ssl_pretrain.planning.suggested_settings import Suggestion, describe_time

IMAGES_SEEN = 40e6  # images seen in all epochs together, as in 800 epochs of CIFAR-10
MAX_EPOCHS, MIN_EPOCHS = 800, 100  # without a limit of time
MIN_CPU_EPOCHS = 20  # a smaller network is chosen rather than fewer epochs
# Networks for a CPU, from the largest to the smallest: timm's name and the stem.
CPU_NETWORKS = (("resnet18", "small"), ("resnet18", "no_pool"), ("test_resnet", "no_pool"))
# Small networks take more time per operation than large ones, so that a prediction from operations
# may be this much too high.
PREDICTION_TOLERANCE = 1.5
EPOCH_KEYS = (  # settings that count epochs of the recipe
    "optim.warmup_epochs",
    "optim.milestones",
    "method.queue_from_epoch",
    "method.teacher_temperature_warmup_epochs",
)
NUM_CHECKPOINTS = 10  # most checkpoints and online measurements in a run


def measure(result: Suggestion, source: Source) -> float:
    """Return the seconds per image of a run with the suggested network."""
    config = result.build()
    reading = step_time.measure_reading(config, source)
    return reading.seconds_per_image(step_time.measure_step(config, reading.batch))


def choose_cpu_network(
    result: Suggestion, source: Source, epochs: int | None, max_seconds: float
) -> float:
    """Choose the largest network that is fast enough, and return its seconds per image.

    The smallest network is measured. The operations of a larger one predict its time, and it is
    measured too unless the prediction is far too high.

    Args:
        result: The suggestion, whose network is set.
        source: Training images.
        epochs: Epochs that the caller wants, if any.
        max_seconds: Longest expected time of the training.
    """
    wanted = min(MIN_CPU_EPOCHS, _wanted_epochs(len(source), epochs))
    limit = max_seconds / (wanted * len(source))
    *larger_networks, smallest = CPU_NETWORKS
    _set_network(result, smallest, "the smallest of the networks for a CPU")
    config = result.build()
    reading = step_time.measure_reading(config, source)
    small_step_seconds = step_time.measure_step(config, reading.batch)
    small_flops = recorder.count_flops_per_image(config)
    for network in larger_networks:
        _set_network(result, network, "the largest network that is fast enough on a CPU")
        config = result.build()
        ratio = recorder.count_flops_per_image(config) / small_flops
        predicted = reading.seconds_per_image(small_step_seconds * ratio)
        if predicted > PREDICTION_TOLERANCE * limit:
            continue
        seconds = reading.seconds_per_image(step_time.measure_step(config, reading.batch))
        if seconds <= limit:
            return seconds
    _set_network(result, smallest, "the smallest of the networks for a CPU")
    return reading.seconds_per_image(small_step_seconds)


def choose_num_images(
    result: Suggestion, num_images: int, min_images: int, seconds: float, max_seconds: float
) -> int:
    """Choose fewer images if one epoch of all takes too long, and return their number.

    Args:
        result: The suggestion, whose key `data.subset` is set.
        num_images: Number of training images.
        min_images: Smallest number of images to train on.
        seconds: Expected seconds per image.
        max_seconds: Longest expected time of the training.
    """
    if num_images * seconds <= max_seconds:
        return num_images
    subset = min(num_images, max(min_images, int(max_seconds / seconds)))
    reason = (
        f"one epoch of all {num_images:,} images takes {describe_time(num_images * seconds)} on "
        "this machine; data.subset=0 uses them all"
    )
    result.set("data.subset", subset, reason)
    return subset


def choose_epochs(
    result: Suggestion, num_images: int, seconds: float, epochs: int | None, max_seconds: float
) -> None:
    """Choose the epochs, and scale the schedule with them.

    Args:
        result: The suggestion, with the recipe's epochs and schedule.
        num_images: Number of training images.
        seconds: Expected seconds per image.
        epochs: Epochs that the caller wants, if any.
        max_seconds: Longest expected time of the training.
    """
    seconds_per_epoch = num_images * seconds
    if epochs is None:
        wanted = _wanted_epochs(num_images, None)
        epochs = max(1, math.floor(min(wanted, max_seconds / seconds_per_epoch)))
    result.expected_seconds = epochs * seconds_per_epoch
    _scale_schedule(result, epochs)
    time, speed = describe_time(result.expected_seconds), _describe_speed(1 / seconds)
    reason = f"{epochs * num_images:,} images seen, {time} at the {speed} measured just now"
    result.set("epochs", epochs, reason)
    interval = math.ceil(epochs / NUM_CHECKPOINTS)
    result.set("checkpoint.every_epochs", interval)
    online = {"knn_every_epochs": interval, "k": min(20, max(1, num_images // 8))}
    result.set("online", online)


def _wanted_epochs(num_images: int, epochs: int | None) -> int:
    """Return the epochs without a limit of time."""
    return epochs or int(np.clip(round(IMAGES_SEEN / num_images, -2), MIN_EPOCHS, MAX_EPOCHS))


def _describe_speed(images_per_second: float) -> str:
    return f"{images_per_second:,.{0 if images_per_second >= 10 else 1}f} images/s"


def _set_network(result: Suggestion, network: tuple[str, str], reason: str) -> None:
    name, stem = network
    result.set("backbone.name", name, reason)
    result.set("backbone.stem", stem)


def _scale_schedule(result: Suggestion, epochs: int) -> None:
    """Scale everything that counts epochs with the length of the run."""
    ratio = min(1.0, epochs / result.get("epochs"))
    reason = f"scaled with the {epochs} epochs"
    for key in EPOCH_KEYS:
        value = result.get(key)
        if isinstance(value, list):
            result.set(key, [round(epoch * ratio, 2) for epoch in value], reason)
        elif value:
            result.set(key, type(value)(round(value * ratio, 2)), reason)
