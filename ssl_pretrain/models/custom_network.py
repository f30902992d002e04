"""Create a network of the user's, from a function or from an object of the program."""

import copy
import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from ssl_pretrain.schema.image_sizes import ImageSize
from ssl_pretrain.system import user_objects

KEY = "backbone.name"


def is_custom(name: str) -> bool:
    """Return True if `backbone.name` is `package.module:function` or `object:NAME`."""
    return ":" in name


def create(name: str, arguments: Mapping[str, Any], image_size: ImageSize) -> nn.Module:
    """Create the network that `backbone.name` refers to.

    Args:
        name: `package.module:function`, where the function or class returns the network, or
            `object:NAME`, a module of the program, which is copied with its weights.
        arguments: Value of `backbone.args`. Its `in_chans` is the number of channels of the images,
            3 if it is missing. A function with a parameter of this name receives it.
        image_size: Side of the largest view in pixels, or its height and width. A function with a
            parameter of this name receives it.

    Raises:
        ValueError: If there is no such function, it fails, or it does not return a module.
    """
    target = user_objects.find_object(name, KEY)
    arguments = dict(arguments)
    num_channels = arguments.pop("in_chans", 3)
    if isinstance(target, nn.Module):
        if arguments:
            raise ValueError(
                f"backbone.args: {name} is a network already and takes no arguments; leave it out"
            )
        return copy.deepcopy(target)
    if not callable(target):
        raise ValueError(
            f"{KEY}: {name} is a {type(target).__name__}; give a function or class that returns a "
            "torch.nn.Module"
        )
    parameters = inspect.signature(target).parameters
    if "in_chans" in parameters:
        arguments["in_chans"] = num_channels
    if "image_size" in parameters:
        arguments.setdefault("image_size", image_size)
    try:
        network = target(**arguments)
    except NotImplementedError:
        raise  # the meta device may lack an operation of the constructor
    except Exception as error:  # a user's function can raise anything
        if isinstance(error, RuntimeError) and "meta" in str(error).lower():
            raise
        raise ValueError(f"{KEY}: {name} fails: {type(error).__name__}: {error}") from error
    if not isinstance(network, nn.Module):
        raise ValueError(
            f"{KEY}: {name} returns a {type(network).__name__}; return a torch.nn.Module that maps "
            f"images (batch, {num_channels}, height, width) to features (batch, dim)"
        )
    return network
