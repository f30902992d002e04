"""README.md of an exported backbone: how to load it, what it is, what was measured, and its checksum."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import yaml

from ssl_pretrain import config as configuration
from ssl_pretrain.eval import results
from ssl_pretrain.eval.runs import Run

PRIVATE = (
    ("data", "root"),
    ("data", "cache_dir"),
    ("backbone", "init"),
)  # where things lay on the machine that trained it


def text(
    run: Run, written: dict[str, Any], doubts: list[str], measured: dict[str, Any] | None
) -> str:
    """The whole card, Markdown. `measured`: what `onnx_model.write` returns."""
    published = written["method"] == configuration.NO_METHOD
    title = f"# {written['architecture']} {'of ' + written['checkpoint'] if published else 'by ' + written['method']}"
    parts = [title, *warnings(doubts), what(run, written), loading(written), numbers(run)]
    parts += [onnx(measured)] if measured else []
    return "\n\n".join([*parts, checks(written), config_text(run)]) + "\n"


def warnings(doubts: list[str]) -> list[str]:
    return [f"> **WARNING: exported with --force.** {doubt}" for doubt in doubts]


def what(run: Run, written: dict[str, Any]) -> str:
    data, source = run.config.data, written["input"]
    trained = f"The {written['network']}'s backbone of step {written['step']:,}, pretrained by {written['method']} on {data.source}, "
    lines = [
        "Weights that were not trained by this project, without their classifier."
        if written["method"] == configuration.NO_METHOD
        else f"{trained}without its projector.",
        f"Input: float32 (n, 3, {source['size']}, {source['size']}), pixels in [0, 1] minus {source['mean']}, divided by {source['std']};"
        f" shorter side to {round(source['size'] / source['crop_ratio'])} pixels ({source['interpolation']}), central square.",
        f"Output: features (n, {written['facts']['feature_dim']}).",
    ]
    return "\n".join(lines)


def loading(written: dict[str, Any]) -> str:
    call = ", ".join(f"{key}={value!r}" for key, value in written["create_model"].items())
    ours = 'from eval import export\n\nbackbone = export.load("this folder")    # strict, and its features are compared with the reference'
    text = ["## Loading", f"```python\n{ours}\n```"]
    if written["stem"] != "imagenet":
        text.append(
            f"timm and torchvision have no `{written['stem']}` stem: their {written['architecture']} is another network."
        )
        return "\n\n".join(text)
    timm = f'timm.create_model("{written["architecture"]}", {call}, checkpoint_path="model.safetensors")'
    text.append(f"```python\nimport timm\n\nbackbone = {timm}\n```")
    text.append(
        "Then `export.check(backbone, folder)` compares its features with the reference; `timm.json` has all arguments."
    )
    if "torchvision" in written["formats"]:
        imports = "import torch, torchvision\nfrom safetensors.torch import load_file"
        model = f"model = torchvision.models.{written['architecture']}()\nmodel.fc = torch.nn.Identity()"
        text.append(
            f'```python\n{imports}\n\n{model}\nmodel.load_state_dict(load_file("model.safetensors"))\n```'
        )
    return "\n\n".join(text)


def numbers(run: Run) -> str:
    """Every table of RUN/eval that is of this checkpoint, with its protocol."""
    found = results.load(run.path)
    own = [
        result
        for result in found
        if result.get("checkpoint") == run.checkpoint_path.name and "rows" in result
    ]
    if not own:
        other = f"; {len(found)} of other checkpoints" if found else ""
        return f"## Numbers\n\nNone of this checkpoint{other}: `python -m ssl_pretrain.eval.knn`, `eval.linear` measure it."
    return "\n\n".join(["## Numbers", *(_table(result) for result in own)])


def _table(result: dict[str, Any]) -> str:
    names = results.columns(result)
    lines = [f"| accuracy, % | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    lines += [
        f"| {row['features']} | {' | '.join(results.number(row, name) for name in names)} |"
        for row in result["rows"]
    ]
    protocol = "; ".join(f"{key}: {value}" for key, value in result["protocol"].items())
    return f"### {result['name']}\n\n" + "\n".join(lines) + f"\n\n{protocol}"


def onnx(measured: dict[str, Any]) -> str:
    rows = [
        f"| {row['name']} | {row['accuracy']} | {row['latency']} | {row['megabytes']} |"
        for row in measured["rows"]
    ]
    head = ["| | k-NN, % | ms an image, median | MB |", "|---|---|---|---|"]
    return "\n".join(["## ONNX", "", *head, *rows, "", *measured["notes"]])


def checks(written: dict[str, Any]) -> str:
    facts = "\n".join(f"| {key} | {value} |" for key, value in written["facts"].items())
    made = f"Written with timm {version('timm')}, torch {version('torch')}."
    table = f"| what the weights do not tell | |\n|---|---|\n{facts}"
    return f"## Checks\n\nSHA-256 of model.safetensors: `{written['sha256']}`\n\n{table}\n\n{made}"


def config_text(run: Run) -> str:
    """The configuration, without the paths of the machine that trained it."""
    values = configuration.to_dict(run.config) | {"output": ""}
    for section, key in PRIVATE:
        if "/" in str(values[section][key]):
            values[section][key] = ""
    return f"## Configuration\n\n```yaml\n{yaml.safe_dump(values, sort_keys=False).strip()}\n```"
