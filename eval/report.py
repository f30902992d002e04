"""One HTML page about a run, with its pictures inside: `python -m eval.report RUN`."""

from __future__ import annotations

import json
import math
from html import escape
from pathlib import Path
from typing import Any

import torch

from eval import charts, features, page, pictures, results, runs
from eval.pictures import Neighbours
from eval.runs import Run

HELP = """Writes RUN/report.html: one page that needs nothing else, neither network nor other files.

It holds the tables of RUN/eval/ with their protocols, the curves of RUN/metrics.jsonl, the training views, the nearest
neighbours of ten queries by pixels and by features, a projection of the features, and the config.

    python -m eval.knn runs/demo && python -m eval.linear runs/demo     # the tables, first
    python -m eval.report runs/demo"""


def main(arguments: list[str]) -> None:
    options = runs.parser("eval.report", HELP).parse_intermixed_args(arguments)
    run = runs.load_run(options.run, options.checkpoint, options.overrides, options.device)
    print(f"report: {write(run)}")


def write(run: Run) -> Path:
    """Makes RUN/report.html and returns its path."""
    records = read_metrics(run.path)
    bank, queries, kind = pictures.open_parts(run)
    results.say(f"report: embedding {len(bank)} training images and {len(queries)} {kind}")
    sections = [
        header(run, records),
        evaluations(run),
        curves(records),
        views(run),
        neighbours(pictures.neighbours(run, bank, queries), bank, kind),
        projection(run, queries, kind),
        page.section("Config", f"<details><summary>Every key of this run</summary><pre>{escape(config_text(run))}</pre></details>"),
    ]
    path = run.path / "report.html"
    path.write_text(page.page(f"{run.path.name} · {run.config.method.name}", sections), encoding="utf-8")
    return path


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl, one a step, in order; a line cut short by a kill is left out, a step written again counts once."""
    path = run / "metrics.jsonl"
    found = {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
            found[record["step"]] = record
        except (ValueError, KeyError, TypeError):
            continue
    return [found[step] for step in sorted(found)]


def curve(records: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """(epoch, value) wherever `key` was recorded and is finite."""
    return [(record["epoch"], record[key]) for record in records if isinstance(record.get(key), int | float) and math.isfinite(record[key])]


def header(run: Run, records: list[dict[str, Any]]) -> str:
    config = run.config
    last = records[-1] if records else {}
    pairs = [
        ("method", config.method.name),
        ("backbone", config.backbone.name),
        ("data", Path(config.data.root).name if config.data.source == "folder" else config.data.source),
        ("steps", f"{run.step:,}"),
        ("epochs", f"{last.get('epoch', config.epochs):g}"),
        ("global batch", f"{config.global_batch_size:,}"),
    ]
    if len(records) > 1 and "time" in records[0]:
        pairs.append(("wall time", duration(records[-1]["time"] - records[0]["time"])))
    command = f"python -m ssl_pretrain.train {run.path / 'config.yaml'} output=<new folder>"
    return (
        f"<header><h1>{escape(run.path.name)}</h1>"
        f'<p class="soft">The {escape(run.network)} of {escape(run.checkpoint_path.name)}. Accuracies are of frozen features.</p>'
        f"{page.facts(pairs)}<pre>{escape(command)}</pre></header>"
    )


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def evaluations(run: Run) -> str:
    found = results.load(run.path)
    if not found:
        return page.section("Evaluation", page.paragraph(f"Nothing measured yet: python -m eval.knn {run.path}, and eval.linear."))
    stale = sorted({result["checkpoint"] for result in found} - {run.checkpoint_path.name})
    note = [page.paragraph(f"Some numbers are of another checkpoint than the pictures: {', '.join(stale)}.")] if stale else []
    return page.section("Evaluation", *note, *(page.result(result) for result in found), *over_steps(run))


def over_steps(run: Run) -> list[str]:
    """The pretrained network's first number of each evaluation over the checkpoints, where it judged more than one."""
    drawn = []
    for name, each in results.history(run.path).items():
        column = results.columns(each[-1])[0]
        points = [(result["step"], row["metrics"][column]) for result in each for row in result["rows"] if row["features"] == "pretrained"]
        if len(points) > 1:
            caption = f"{page.TITLES.get(name, name)}, {column}, of each checkpoint"
            drawn.append(page.figure(charts.line(points, each[-1].get("measure", "accuracy, %"), "step", marked=True), caption))
    return [f'<div class="two">{"".join(drawn)}</div>'] if drawn else []


def curves(records: list[dict[str, Any]]) -> str:
    knn = [(epoch, 100 * value) for epoch, value in curve(records, "knn")]
    probe = [(epoch, 100 * value) for epoch, value in curve(records, "probe")]
    drawn = [
        page.figure(charts.line(curve(records, "loss"), "loss"), "Loss"),
        page.figure(charts.line(knn, "k-NN, %", marked=True), "k-NN accuracy in %, on held-out training images"),
        *([page.figure(charts.line(probe, "linear, %", marked=True), "Linear accuracy in %, on the same images")] if probe else []),
        page.figure(charts.line(curve(records, "lr"), "learning rate"), "Learning rate"),
        page.figure(charts.line(curve(records, "images_per_second"), "images per second"), "Throughput, images per second"),
    ]
    return page.section("Training", f'<div class="two">{"".join(drawn)}</div>')


def views(run: Run) -> str:
    path = run.path / "views.png"
    if not path.is_file():
        return page.section("Views", page.paragraph("The trainer left no views.png."))
    about = "What the network is trained on: the views of an image side by side, as they enter it."
    return page.section("Views", page.paragraph(about), page.views(path, run.view_size))


def neighbours(found: list[Neighbours], bank: pictures.Part, kind: str) -> str:
    names = [*bank.classes, ""]
    labelled = any(query.label >= 0 for query in found)

    def strip(query: Neighbours, near: list[tuple[Any, int]]) -> str:
        marks = [("" if query.label < 0 else "right" if label == query.label else "wrong") for _, label in near]
        score = f'<span class="score">{marks.count("right")}/{len(near)}</span>' if query.label >= 0 else ""
        shown = (f'<span class="{mark}">{page.picture(image, names[label])}</span>' for (image, label), mark in zip(near, marks))
        return f'<div class="strip">{"".join(shown)}{score}</div>'

    lines = []
    for query in found:
        label = " · ".join(filter(None, [names[query.label], query.moved and f"moved {query.moved}"]))
        asked = f'<div class="strip">{page.picture(query.query, names[query.label])}<span>{escape(label)}</span></div>'
        lines.append(f"<tr><td>{asked}</td><td>{strip(query, query.by_pixels)}</td><td>{strip(query, query.by_features)}</td></tr>")
    about = f"Cosine neighbours of {len(found)} {kind} among {len(bank):,} training images; the pixels are centred on their training mean."
    about += " The queries are moved by 1 or 2 original pixels before they are asked." if any(query.moved for query in found) else ""
    about += " Underlined green: the query's class; red: another." if labelled else ""
    kind_of_table = "near pixel" if bank.run.image_size <= 64 else "near"
    head = "<tr><th>query</th><th>nearest by pixels</th><th>nearest by features</th></tr>"
    table = f'<div class="scroll"><table class="{kind_of_table}">{head}{"".join(lines)}</table></div>'
    return page.section("Nearest neighbours", page.paragraph(about), table)


def projection(run: Run, queries: pictures.Part, kind: str) -> str:
    embedded, labels = features.extract(run.backbone, queries)
    pixels, _ = features.raw_pixels(queries)
    drawn = [
        page.figure(charts.scatter(pictures.project(values), labels.cpu().numpy(), queries.classes), caption)
        for caption, values in (("Raw pixels, centred", pixels - pixels.mean(dim=0)), ("Features", embedded))
    ]
    how = "t-SNE of vectors scaled to length 1 (scikit-learn, perplexity 30, PCA start, fixed seed)"
    about = f"{len(queries):,} {kind}, a colour a class, by {how}."
    shown = queries.classes[:20] if bool(torch.any(labels >= 0)) else []
    total = len(queries.classes)
    keys = (f'<span><i style="background:{charts.colour(i, total)}"></i>{escape(name)}</span>' for i, name in enumerate(shown))
    more = f"<span>and {total - 20} more</span>" if total > 20 and shown else ""
    legend = f'<div class="legend">{"".join(keys)}{more}</div>'
    return page.section("Projection", page.paragraph(about), f'<div class="two">{"".join(drawn)}</div>', legend)


def config_text(run: Run) -> str:
    path = run.path / "config.yaml"
    return path.read_text(encoding="utf-8") if path.is_file() else repr(run.config)


if __name__ == "__main__":
    results.command(main, "eval.report")
