"""One HTML page about a run, with its pictures inside: `python -m ssl_pretrain.eval.report RUN`."""

from __future__ import annotations

import shlex
from html import escape
from pathlib import Path
from typing import Any

import torch

from ssl_pretrain.eval import command_line, results
from ssl_pretrain.eval.frozen import features
from ssl_pretrain.eval.frozen.evaluation_split import EvaluationSplit
from ssl_pretrain.eval.html import charts, live, page, pictures, sections
from ssl_pretrain.eval.html.pictures import Neighbours
from ssl_pretrain.eval.runs import Run
from ssl_pretrain.schema import PORT
from ssl_pretrain.system import durable_files

HELP = """Writes RUN/report.html: one page that needs nothing else, neither network nor other files.

It holds what the monitors rang for, the tables of RUN/eval/ with their protocols, the curves of RUN/metrics.jsonl, the
training views, neighbours as they changed, the nearest neighbours of ten queries by pixels and by features, a projection of
the features, and the config.

    python -m ssl_pretrain.eval.knn runs/demo && python -m ssl_pretrain.eval.linear runs/demo     # the tables, first
    python -m ssl_pretrain.eval.report runs/demo
    python -m ssl_pretrain.eval.report runs/demo --follow                            # while it trains: a page on this machine that refreshes"""


def main(arguments: list[str]) -> None:
    parser = command_line.parser("ssl_pretrain.eval.report", HELP, {})
    parser.add_argument(
        "--follow",
        action="store_true",
        help="serve the page of a run that goes on, on this machine alone",
    )
    parser.add_argument(
        "--port", type=PORT, default=0, help="for --follow (default: a free one, which is printed)"
    )
    options = parser.parse_intermixed_args(arguments)
    if options.follow:
        live.follow(Path(options.run), options.port)
        return
    run = command_line.open_run(options)
    print(f"report: {write(run)}")


def write(run: Run) -> Path:
    """Makes RUN/report.html and returns its path."""
    records = sections.read_metrics(run.path)
    bank, queries, kind = pictures.open_parts(run)
    results.print_progress(
        f"report: embedding {len(bank)} training images and {len(queries)} {kind}"
    )
    parts = [
        header(run, records),
        sections.alerts(run.path),
        evaluations(run, labelled=bool((bank.labels >= 0).any())),
        sections.training(run.path, records),
        sections.views(run.path, run.view_size),
        sections.neighbours_over_steps(run.path),
        neighbours(pictures.neighbours(run, bank, queries), bank, kind),
        projection(run, queries, kind),
        page.section(
            "Config",
            f"<details><summary>Every key of this run</summary><pre>{escape(config_text(run))}</pre></details>",
        ),
    ]
    path = run.path / "report.html"
    durable_files.replace(
        path, page.page(f"{run.path.name} · {run.config.method.name}", list(filter(None, parts)))
    )
    return path


def header(run: Run, records: list[dict[str, Any]]) -> str:
    config = run.config
    last = records[-1] if records else {}
    pairs = [
        ("method", config.method.name),
        ("backbone", config.backbone.name),
        (
            "data",
            Path(config.data.root).name if config.data.source == "folder" else config.data.source,
        ),
        ("steps", f"{run.step:,}"),
        ("epochs", f"{last.get('epoch', config.epochs):g}"),
        ("global batch", f"{config.global_batch_size:,}"),
    ]
    if len(records) > 1 and "time" in records[0]:
        pairs.append(("wall time", sections.duration(records[-1]["time"] - records[0]["time"])))
    if any("replaced_images" in record for record in records):
        replaced = sum(record.get("replaced_images", 0) for record in records)
        pairs.append(("unreadable images replaced", f"{replaced:,}"))
    config_path = shlex.quote(str(run.path / "config.yaml"))
    command = f"python -m ssl_pretrain.train {config_path} output=<new folder>"
    return (
        f"<header><h1>{escape(run.path.name)}</h1>"
        f'<p class="soft">The {escape(run.network)} of {escape(run.checkpoint_path.name)}. Accuracies are of frozen features.</p>'
        f"{page.facts(pairs)}<pre>{escape(command)}</pre></header>"
    )


def evaluations(run: Run, labelled: bool) -> str:
    found = results.load(run.path)
    if not found and not labelled:
        return page.section(
            "Evaluation", page.paragraph("Accuracies need labels, and these images have none.")
        )
    if not found:
        command = f"python -m ssl_pretrain.eval.knn {shlex.quote(str(run.path))}"
        return page.section(
            "Evaluation", page.paragraph(f"Nothing measured yet: {command}, and eval.linear.")
        )
    stale = sorted({result["checkpoint"] for result in found} - {run.checkpoint_path.name})
    note = (
        [
            page.paragraph(
                f"Some numbers are of another checkpoint than the pictures: {', '.join(stale)}."
            )
        ]
        if stale
        else []
    )
    return page.section(
        "Evaluation",
        *note,
        sections.evaluations_over_steps(run.path),
        *(page.result(result) for result in found),
    )


def neighbours(found: list[Neighbours], bank: EvaluationSplit, kind: str) -> str:
    names = [*bank.classes, ""]
    labelled = any(query.label >= 0 for query in found)

    def strip(query: Neighbours, near: list[tuple[Any, int]]) -> str:
        marks = [
            ("" if query.label < 0 else "right" if label == query.label else "wrong")
            for _, label in near
        ]
        score = (
            f'<span class="score">{marks.count("right")}/{len(near)}</span>'
            if query.label >= 0
            else ""
        )
        shown = (
            f'<span class="{mark}">{page.picture(image, names[label])}</span>'
            for (image, label), mark in zip(near, marks)
        )
        return f'<div class="strip">{"".join(shown)}{score}</div>'

    lines = []
    for query in found:
        label = " · ".join(
            filter(None, [names[query.label], query.moved and f"moved {query.moved}"])
        )
        asked = f'<div class="strip">{page.picture(query.query, names[query.label])}<span>{escape(label)}</span></div>'
        lines.append(
            f"<tr><td>{asked}</td><td>{strip(query, query.by_pixels)}</td><td>{strip(query, query.by_features)}</td></tr>"
        )
    about = f"Cosine neighbours of {len(found)} {kind} among {len(bank):,} training images; the pixels are centred on their training mean."
    about += (
        " The queries are moved by 1 or 2 original pixels before they are asked."
        if any(query.moved for query in found)
        else ""
    )
    about += " Underlined green: the query's class; red: another." if labelled else ""
    kind_of_table = "near pixel" if bank.run.image_size <= 64 else "near"
    head = "<tr><th>query</th><th>nearest by pixels</th><th>nearest by features</th></tr>"
    table = (
        f'<div class="scroll"><table class="{kind_of_table}">{head}{"".join(lines)}</table></div>'
    )
    return page.section("Nearest neighbours", page.paragraph(about), table)


def projection(run: Run, queries: EvaluationSplit, kind: str) -> str:
    embedded, labels = features.extract(run.backbone, queries)
    pixels, _ = features.raw_pixels(queries)
    drawn = [
        page.figure(
            charts.scatter(pictures.project(values), labels.cpu().numpy(), queries.classes), caption
        )
        for caption, values in (
            ("Raw pixels, centred", pixels - pixels.mean(dim=0)),
            ("Features", embedded),
        )
    ]
    how = "t-SNE of vectors scaled to length 1 (scikit-learn, perplexity 30, PCA start, fixed seed)"
    labelled = bool(torch.any(labels >= 0))
    about = f"{len(queries):,} {kind}{', one color per class' if labelled else ''}, by {how}."
    shown = queries.classes[:20] if labelled else []
    total = len(queries.classes)
    more = f"<span>and {total - 20} more</span>" if total > 20 and shown else ""
    legend = page.legend([(name, charts.colour(i, total)) for i, name in enumerate(shown)]) + more
    return page.section(
        "Projection", page.paragraph(about), f'<div class="two">{"".join(drawn)}</div>', legend
    )


def config_text(run: Run) -> str:
    path = run.path / "config.yaml"
    return path.read_text(encoding="utf-8") if path.is_file() else repr(run.config)


if __name__ == "__main__":
    command_line.execute(main, "ssl_pretrain.eval.report")
