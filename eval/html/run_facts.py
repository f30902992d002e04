"""Facts about a run for the top of its report: what was trained, on what, and by which code."""

from datetime import UTC, datetime
from typing import Any

from ssl_pretrain.checkpoint.manifest import MANIFEST_FILE, read_manifest
from ssl_pretrain.data.config import short_name
from ssl_pretrain.eval.html import sections
from ssl_pretrain.eval.html.run_files import Record
from ssl_pretrain.eval.runs import Run

Facts = list[tuple[str, str]]
SHOWN_VERSIONS = ("ssl_pretrain", "torch", "timm")


def read_origin(run: Run) -> dict[str, Any]:
    """Return the manifest of the run's checkpoint, or nothing for weights of other origin."""
    if not (run.checkpoint_path / MANIFEST_FILE).is_file():
        return {}
    return read_manifest(run.checkpoint_path)


def main_facts(run: Run, metrics: list[Record], num_images: int) -> Facts:
    """Return the facts in large type: method, backbone, data and amount of training."""
    config = run.config
    last_record = metrics[-1] if metrics else {}
    num_parameters = sum(parameter.numel() for parameter in run.backbone.parameters())
    facts = [
        ("method", config.method.name),
        ("backbone", config.backbone.name),
        ("parameters", _format_count(num_parameters)),
        ("data", short_name(config.data.source, config.data.root)),
        ("training images", f"{num_images:,}"),
        *([("channels", str(config.data.channels))] if config.data.channels != 3 else []),
        ("steps", f"{run.step:,}"),
        ("epochs", f"{last_record.get('epoch', config.epochs):g}"),
        ("global batch", f"{config.global_batch_size:,}"),
        ("seed", str(config.seed)),
    ]
    if len(metrics) > 1 and "time" in metrics[0]:
        seconds = last_record["time"] - metrics[0]["time"]
        facts.append(("wall time", sections.format_duration(seconds)))
    num_replaced = sum(record.get("replaced_images", 0) for record in metrics)
    if num_replaced:
        facts.append(("unreadable images replaced", f"{num_replaced:,}"))
    return facts


def origin_facts(metrics: list[Record], origin: dict[str, Any]) -> Facts:
    """Return the facts in small type: date, revision, versions and machine."""
    facts = []
    if metrics and "time" in metrics[-1]:
        trained = datetime.fromtimestamp(metrics[-1]["time"], UTC)
        facts.append(("trained", f"{trained:%Y-%m-%d %H:%M} UTC"))
    versions = origin.get("versions", {})
    if "revision" in versions:
        facts.append(("revision", str(versions["revision"])))
    names = [f"{name} {versions[name]}" for name in SHOWN_VERSIONS if name in versions]
    if "python" in versions:
        names.append(f"Python {versions['python']}")
    if names:
        facts.append(("versions", ", ".join(names)))
    if machine := origin.get("machine", {}):
        facts.append(("machine", _describe_machine(machine)))
    return facts


def _describe_machine(machine: dict[str, Any]) -> str:
    """Return the processors and the number of ranks. The host's name is not recorded."""
    num_ranks = machine.get("world_size", 1)
    device = machine.get("gpu") or machine.get("cpu") or "unknown processor"
    threads = f"{machine['threads']} thread{'s' if machine['threads'] != 1 else ''} per rank"
    ranks = "1 rank" if num_ranks == 1 else f"{num_ranks} ranks"
    return f"{device}, {ranks}" + ("" if machine.get("gpu") else f", {threads}")


def _format_count(number: int) -> str:
    """Format a count such as 374,000 as "0.37 M"."""
    return f"{number / 1e6:.3g} M" if number >= 1e5 else f"{number:,}"
