"""Write RUN/report.html, one page that needs no network and no other files.

The page shows the alerts of the run, the tables of RUN/eval/ with their protocols, the curves of
RUN/metrics.jsonl, the training views, the nearest neighbors of ten queries by pixels and by
features, a projection of the features, and the configuration.

    python -m ssl_pretrain.eval.knn runs/demo && python -m ssl_pretrain.eval.linear runs/demo
    python -m ssl_pretrain.eval.report runs/demo
    python -m ssl_pretrain.eval.report runs/demo --follow     # a live page during training
"""

import shlex
from pathlib import Path
from typing import Any

import numpy as np

from ssl_pretrain.eval import command_line, results
from ssl_pretrain.eval.frozen import features
from ssl_pretrain.eval.frozen.evaluation_split import EvaluationSplit
from ssl_pretrain.eval.html import charts, live, nearest_images, page, sections
from ssl_pretrain.eval.runs import Run
from ssl_pretrain.monitoring import shown_bands
from ssl_pretrain.schema import PORT
from ssl_pretrain.system import durable_files
from ssl_pretrain.views import recipe

MAX_LEGEND_CLASSES = 20  # largest number of classes in the legend of the projection
OPTIONS: dict[str, dict[str, Any]] = {
    "--follow": {"action": "store_true", "help": "serve a live page during training"},
    "--port": {
        "type": PORT,
        "default": 0,
        "help": "port for --follow (default: any free port)",
    },
}


def main(arguments: list[str]) -> None:
    """Run the command-line interface."""
    parser = command_line.build_parser("ssl_pretrain.eval.report", __doc__, OPTIONS)
    options = parser.parse_intermixed_args(arguments)
    if options.follow:
        live.serve(Path(options.run), options.port)
    else:
        print(f"report: {write(command_line.open_run(options))}")


def write(run: Run) -> Path:
    """Write RUN/report.html and return its path."""
    metrics = sections.read_metrics(run.path)
    bank, query_candidates, image_kind = nearest_images.open_bank_and_query_candidates(run)
    results.print_progress(
        f"report: embedding {len(bank)} training images and {len(query_candidates)} {image_kind}"
    )
    # Published weights have no views, and their run no picture of them.
    views = run.config.views
    tile_size = recipe.enclosing_size(views) if views.crops else run.view_size
    config_path = shlex.quote(str(run.path / "config.yaml"))
    text = page.render(
        "report.html.jinja",
        **sections.run_variables(run.path, metrics, tile_size),
        **_evaluation_variables(run, has_labels=bool((bank.labels >= 0).any())),
        title=f"{run.path.name} · {run.config.method.name}",
        name=run.path.name,
        network=run.network,
        checkpoint=run.checkpoint_path.name,
        facts=_facts(run, metrics),
        command=f"python -m ssl_pretrain.train {config_path} output=<new folder>",
        nearest=_neighbor_variables(
            nearest_images.find_neighbors(run, bank, query_candidates), bank, image_kind
        ),
        projection=_projection_variables(run, query_candidates, image_kind),
        config=_config_text(run),
    )
    path = run.path / "report.html"
    durable_files.replace(path, text)
    return path


def _facts(run: Run, metrics: list[sections.Record]) -> list[tuple[str, str]]:
    """Return the name and value of each fact at the top of the page."""
    config = run.config
    root, last_record = Path(config.data.root).name, metrics[-1] if metrics else {}
    facts = [
        ("method", config.method.name),
        ("backbone", config.backbone.name),
        ("data", root if config.data.source == "folder" else config.data.source),
        *([("channels", str(config.data.channels))] if config.data.channels != 3 else []),
        ("steps", f"{run.step:,}"),
        ("epochs", f"{last_record.get('epoch', config.epochs):g}"),
        ("global batch", f"{config.global_batch_size:,}"),
    ]
    if len(metrics) > 1 and "time" in metrics[0]:
        facts.append(
            ("wall time", sections.format_duration(last_record["time"] - metrics[0]["time"]))
        )
    if counts := [record["replaced_images"] for record in metrics if "replaced_images" in record]:
        facts.append(("unreadable images replaced", f"{sum(counts):,}"))
    return facts


def _evaluation_variables(run: Run, has_labels: bool) -> dict[str, Any]:
    """Return the template variables of the evaluations and of the note above them."""
    evaluations = results.load_newest(run.path)
    other_checkpoints = sorted(
        {result["checkpoint"] for result in evaluations} - {run.checkpoint_path.name}
    )
    note = ""
    if other_checkpoints:
        names = ", ".join(other_checkpoints)
        note = f"Some numbers are from a different checkpoint than the pictures: {names}."
    elif not evaluations and not has_labels:
        note = "Accuracies need labels, and these images have none."
    elif not evaluations:
        command = f"python -m ssl_pretrain.eval.knn {shlex.quote(str(run.path))}"
        note = f"There are no evaluations yet. Run {command} and ssl_pretrain.eval.linear."
    return {
        "note": note,
        "evaluations": [sections.evaluation_variables(result) for result in evaluations],
    }


def _neighbor_variables(
    queries: list[nearest_images.Query], bank: EvaluationSplit, image_kind: str
) -> dict[str, Any]:
    """Return the template variables of the table of queries and their neighbors."""
    description = (
        f"Nearest neighbors of {len(queries)} {image_kind} among {len(bank):,} training images, by"
        " cosine similarity. The training mean is subtracted from the pixels."
    )
    config = bank.run.config
    if bands := shown_bands.describe(config.log.bands, config.data.channels):
        description += f" The pictures show {bands}."
    if any(query.shift for query in queries):
        description += " The queries are shifted by 1 or 2 original pixels before the search."
    if any(query.label >= 0 for query in queries):
        description += " Neighbors of the query's class are underlined in green, others in red."
    names = [*bank.classes, ""]  # the label -1 of unlabeled images selects the empty name

    def neighbor_cells(
        query: nearest_images.Query, neighbors: list[nearest_images.LabeledImage]
    ) -> tuple[list[dict[str, str]], str]:
        """Return the neighbors' cells and how many of them have the query's class, as text."""
        marks = ["right" if label == query.label else "wrong" for _, label in neighbors]
        score = f"{marks.count('right')}/{len(marks)}"
        if query.label < 0:
            marks, score = [""] * len(marks), ""
        return [
            _cell(image, names[label], mark) for (image, label), mark in zip(neighbors, marks)
        ], score

    rows = []
    for query in queries:
        pixel_neighbors, pixel_score = neighbor_cells(query, query.pixel_neighbors)
        feature_neighbors, feature_score = neighbor_cells(query, query.feature_neighbors)
        shift = query.shift and f"moved {query.shift}"
        rows.append(
            {
                "query": _cell(query.image, names[query.label], ""),
                "label": " · ".join(filter(None, [names[query.label], shift])),
                "pixel_neighbors": pixel_neighbors,
                "pixel_score": pixel_score,
                "feature_neighbors": feature_neighbors,
                "feature_score": feature_score,
            }
        )
    return {"description": description, "rows": rows}


def _cell(pixels: np.ndarray, label: str, mark: str) -> dict[str, str]:
    return {"src": page.pixels_data_url(pixels), "label": label, "mark": mark}


def _projection_variables(run: Run, split: EvaluationSplit, image_kind: str) -> dict[str, Any]:
    """Return the template variables of the charts of pixels and features in two dimensions."""
    backbone_features, labels = features.extract(run.backbone, split)
    pixels, _ = features.raw_pixels(split)
    num_classes, label_array = len(split.classes), labels.cpu().numpy()
    figures = [
        page.Figure(
            charts.scatter_plot(nearest_images.project_by_tsne(vectors), label_array, num_classes),
            caption,
        )
        for caption, vectors in (
            ("Raw pixels, centered", pixels - pixels.mean(dim=0)),
            ("Features", backbone_features),
        )
    ]
    has_labels = bool((label_array >= 0).any())
    description = (
        f"{len(split):,} {image_kind}{', one color per class' if has_labels else ''}, projected"
        " by t-SNE of vectors scaled to length 1 (scikit-learn, perplexity"
        f" {nearest_images.tsne_perplexity(len(split)):.3g}, initialized by PCA, fixed seed)."
    )
    names = split.classes[:MAX_LEGEND_CLASSES] if has_labels else []
    legend = [(name, charts.color(i, num_classes)) for i, name in enumerate(names)]
    if has_labels and num_classes > MAX_LEGEND_CLASSES:
        legend.append((f"and {num_classes - MAX_LEGEND_CLASSES} more", "transparent"))
    return {"description": description, "figures": figures, "legend": legend}


def _config_text(run: Run) -> str:
    path = run.path / "config.yaml"
    return path.read_text(encoding="utf-8") if path.is_file() else repr(run.config)


if __name__ == "__main__":
    command_line.execute(main, "ssl_pretrain.eval.report")
