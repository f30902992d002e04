"""Write the model card of an exported backbone: how to load it, its results and its checksum."""

from importlib.metadata import version
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import yaml

from ssl_pretrain import config as configuration
from ssl_pretrain.eval import results
from ssl_pretrain.eval.exporting import loading_section
from ssl_pretrain.eval.runs import Run
from ssl_pretrain.schema.image_sizes import height_and_width
from ssl_pretrain.system import markdown

PRIVATE_SECTIONS = ("launch", "log")  # machines, accounts and trackers of the training
HIDDEN = "***"  # stands for the values of data.args, which may be tokens


def render(run: Run, arguments: dict[str, Any], problems: list[str], onnx_section: str = "") -> str:
    """Return the card as Markdown.

    Args:
        run: Exported run.
        arguments: Content of timm.json.
        problems: Reasons why the weights are worthless.
        onnx_section: Section about the ONNX models, if there are any.
    """
    is_published = arguments["method"] == configuration.NO_METHOD
    origin = f"of {arguments['checkpoint']}" if is_published else f"by {arguments['method']}"
    sections = [
        f"# {arguments['architecture']} {origin}",
        *(f"> **WARNING: exported with --force.** {problem}" for problem in problems),
        _description(run, arguments, is_published),
        loading_section.render(arguments),
        _results(run),
        onnx_section,
        _checks(arguments),
        _config(run),
    ]
    return _front_matter(arguments) + "\n\n".join(filter(None, sections)) + "\n"


def _front_matter(arguments: dict[str, Any]) -> str:
    """Return the metadata that the Hugging Face Hub reads from a card. No license is claimed."""
    formats = set(arguments["formats"])
    tags = ["image-feature-extraction", "self-supervised-learning", arguments["architecture"]]
    if arguments["method"] != configuration.NO_METHOD:
        tags.append(arguments["method"])
    tags += [name for name in ("timm", "transformers", "onnx") if name in formats]
    is_for_timm = bool(formats & {"timm", "timm_wrapper"})
    library, task = "timm" if is_for_timm else "pytorch", "image-feature-extraction"
    if "open_clip" in formats:
        library, task = "open_clip", "zero-shot-image-classification"
        tags.append(task)
    values = {"library_name": library, "pipeline_tag": task, "tags": tags}
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}---\n\n"


def _description(run: Run, arguments: dict[str, Any], is_published: bool) -> str:
    view, source = arguments["input"], run.config.data.source
    height, width = height_and_width(view["size"])
    covered = [round(side / view["crop_ratio"]) for side in (height, width)]
    resize = (
        f"Resize the shorter side to {covered[0]} pixels"
        if height == width
        else f"Resize the image to cover {covered[0]} x {covered[1]} pixels"
    )
    center = "square" if height == width else f"{height} x {width}"
    trained = (
        f"of the {arguments['network']} at step {arguments['step']:,}, pretrained with"
        f" {arguments['method']} on {source}."
    )
    origin = f"Backbone {trained} The projector is not included."
    if configuration.pairs_images_with_texts(run.config):
        origin = _describe_towers(run, arguments, trained)
    if is_published:
        origin = "Weights that were not trained by this project. Their classifier is not included."
    return (
        f"{origin}\n"
        f"Input: float32 (n, {view['channels']}, {height}, {width}). {_pixel_values(view)}{resize}"
        f" ({view['interpolation']}), crop the central"
        f" {center}, subtract {view['mean']} from pixels in [0, 1], and divide by {view['std']}.\n"
        f"Output: features (n, {arguments['facts']['feature_dim']})."
    )


def _describe_towers(run: Run, arguments: dict[str, Any], trained: str) -> str:
    """Return which of the towers of a method of images and texts the export has."""
    if "open_clip" not in arguments["formats"]:
        return (
            f"Backbone of the image tower {trained} The text tower and the projections are not"
            " included. `--format open_clip` exports them."
        )
    method: Any = run.config.method
    return (
        f"Image tower and text tower {trained} open_clip loads both, and maps images and"
        f" texts of at most {run.config.text.length} tokens to vectors of {method.dim} numbers in"
        " the same space. All other formats have the backbone of the image tower alone, without its"
        " projection."
    )


def _pixel_values(view: dict[str, Any]) -> str:
    """Return a sentence about the stored values that become 0 and 1, if `data.range` was set."""
    if not view["range"]:
        return ""
    pairs = zip(view["range"][::2], view["range"][1::2])
    ranges = ", ".join(f"{low:g} to {high:g}" for low, high in pairs)
    kind = "of each channel in turn" if len(view["range"]) > 2 else "of all channels"
    return f"Scale the values {kind} from {ranges} to 0 to 1, and clip them. "


def _results(run: Run) -> str:
    """Return the section with this checkpoint's results and their protocols."""
    all_results, checkpoint = results.load_newest(run.path), run.checkpoint_path.name
    sections = ["## Results"]
    for result in all_results:
        if result.get("checkpoint") == checkpoint and "rows" in result:
            protocol = "; ".join(f"{key}: {value}" for key, value in result["protocol"].items())
            table = markdown.table(*results.table_cells(result))
            sections += [f"### {result['name']}", table, protocol]
    if len(sections) == 1:
        others = f" ({len(all_results)} for other checkpoints)" if all_results else ""
        sections.append(
            f"There are no results for this checkpoint{others}. Evaluate it with"
            " `python -m ssl_pretrain.eval.knn` or `python -m ssl_pretrain.eval.linear`."
        )
    return "\n\n".join(sections)


def _checks(arguments: dict[str, Any]) -> str:
    return "\n\n".join(
        [
            "## Checks",
            f"SHA-256 of model.safetensors: `{arguments['sha256']}`",
            markdown.table(
                ["property not stored in the weights", "value"], arguments["facts"].items()
            ),
            f"Written with timm {version('timm')}, torch {version('torch')}.",
        ]
    )


def _config(run: Run) -> str:
    """Return the section with the configuration, without what belongs to the training machine."""
    values = configuration.to_dict(run.config) | {"output": ""}
    for section in PRIVATE_SECTIONS:
        values.pop(section, None)
    values["data"]["args"] = dict.fromkeys(values["data"]["args"], HIDDEN)
    text = yaml.safe_dump(_without_paths(values), sort_keys=False).strip()
    return f"## Configuration\n\n```yaml\n{text}\n```"


def _without_paths(value: Any) -> Any:
    """Return a value of the configuration in which the paths of the machine are empty texts."""
    if isinstance(value, dict):
        return {key: _without_paths(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_without_paths(entry) for entry in value]
    return "" if isinstance(value, str) and _is_path(value) else value


def _is_path(text: str) -> bool:
    """Return True for an absolute path, an address, or a relative path that exists.

    Names on the Hugging Face Hub such as uoft-cs/cifar10 and names of columns are none.
    """
    if PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute():
        return True
    has_separator = "/" in text or "\\" in text
    return has_separator and (text.startswith("~") or "://" in text or Path(text).exists())
