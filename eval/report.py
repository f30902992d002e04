"""Write RUN/report.html, one page that needs no network and no other files.

The page begins with the alerts of the run and a sentence that compares its accuracy with the
baselines. It shows the tables of RUN/eval/ with their protocols, the curves of RUN/metrics.jsonl,
the training views, the nearest neighbors of ten queries by pixels and by features, a map of the
images, and the configuration.

    python -m ssl_pretrain.eval.knn runs/demo && python -m ssl_pretrain.eval.linear runs/demo
    python -m ssl_pretrain.eval.report runs/demo
    python -m ssl_pretrain.eval.report runs/demo --follow     # a live page during training
"""

import shlex
from pathlib import Path
from typing import Any

from ssl_pretrain.eval import command_line, results
from ssl_pretrain.eval.html import (
    headline,
    image_sections,
    live,
    nearest_images,
    page,
    run_facts,
    run_files,
    sections,
)
from ssl_pretrain.eval.run_state import RunStateReader
from ssl_pretrain.eval.runs import Run
from ssl_pretrain.schema import PORT
from ssl_pretrain.system import durable_files

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
    metrics = run_files.read_metrics(run.path)
    bank, query_candidates, image_kind = nearest_images.open_bank_and_query_candidates(run)
    results.print_progress(
        f"report: embedding {len(bank)} training images and {len(query_candidates)} {image_kind}"
    )
    has_labels = bool((bank.labels >= 0).any())
    origin = run_facts.read_origin(run)
    config_path = shlex.quote(str(run.path / "config.yaml"))
    # Without labels, the map shows the training images. The few queries would be a poor sample.
    mapped, mapped_kind = (
        (query_candidates, image_kind) if has_labels else (bank, "training images")
    )
    num_train, name = len(bank.source), run.path.resolve().name
    variables = sections.run_variables(run.path, metrics)
    text = page.render(
        "report.html.jinja",
        **variables,
        contents=_contents(bool(variables["neighbors_over_time"])),
        **_evaluation_variables(run, has_labels),
        title=f"{name} · {run.config.method.name}",
        name=name,
        progress=headline.describe_state(RunStateReader(run.path).read(), run.step),
        network=run.network,
        checkpoint=run.checkpoint_path.name,
        facts=run_facts.main_facts(run, metrics, num_train),
        origin=run_facts.origin_facts(metrics, origin),
        command=f"python -m ssl_pretrain.train {config_path} output=<new folder>",
        nearest=image_sections.neighbor_variables(
            nearest_images.find_neighbors(run, bank, query_candidates), bank, image_kind
        ),
        map=image_sections.map_variables(run, mapped, mapped_kind),
        config=_config_text(run),
    )
    path = run.path / "report.html"
    durable_files.replace(path, text)
    return path


def _contents(has_neighbors_over_time: bool) -> list[tuple[str, str]]:
    """Return the anchor and the title of each section."""
    titles = ["Evaluation", "Training", "Views", "Neighbors over time", "Nearest neighbors"]
    if not has_neighbors_over_time:
        titles.remove("Neighbors over time")
    return [(title.lower().replace(" ", "-"), title) for title in (*titles, "Map", "Config")]


def _evaluation_variables(run: Run, has_labels: bool) -> dict[str, Any]:
    """Return the template variables of the evaluations, the headline and the note below it."""
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
        "headline": headline.describe_results(evaluations),
        "note": note,
        "evaluations": sections.evaluation_variables(evaluations),
    }


def _config_text(run: Run) -> str:
    path = run.path / "config.yaml"
    return path.read_text(encoding="utf-8") if path.is_file() else repr(run.config)


if __name__ == "__main__":
    command_line.execute(main, "ssl_pretrain.eval.report")
