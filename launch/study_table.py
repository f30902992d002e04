"""Table of a study, with the mean and standard deviation of each variant over seeds."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path

from ssl_pretrain.config import RunConfig
from ssl_pretrain.eval import table_text
from ssl_pretrain.launch.study_columns import COLUMNS, RANDOM_BACKBONE, RAW_PIXELS, RunResults
from ssl_pretrain.system import durable_files

# Part of the page that is written by hand. A new table keeps it.
KEPT_PART = re.compile(r"<!-- kept -->.*<!-- end of kept -->", re.DOTALL)
NOT_RUN = "not run"


@dataclass
class Comparison:
    """The runs of a study, with the numbers of those that are finished."""

    title: str
    columns: list[str]
    runs: list[tuple[str, RunConfig]]  # variant and configuration of each finished run
    plot_against: str = ""  # numeric key on the x-axis, or empty for one row per variant
    missing: list[tuple[str, RunConfig]] = field(default_factory=list)  # runs without results
    variants: Sequence[str] = ()  # in the order of the table, by default that of the runs

    def __post_init__(self) -> None:
        assert self.runs, "a comparison needs a finished run"
        self.results = [RunResults(Path(config.output)) for _, config in self.runs]
        planned = [*self.runs, *self.missing]
        self.variants = list(dict.fromkeys([*self.variants, *(variant for variant, _ in planned)]))
        if self.plot_against:
            read_x = attrgetter(self.plot_against)
            # The value of `plot_against`, by variant
            self.x = {variant: float(read_x(config)) for variant, config in planned}
            self.variants.sort(key=self.x.__getitem__)

    def results_of(self, variant: str) -> list[RunResults]:
        """Return the results of a variant's finished runs."""
        return [run for run, (name, _) in zip(self.results, self.runs) if name == variant]

    def values(self, variant: str, column: str) -> list[float]:
        """Return a column's number for each finished run of a variant."""
        return [COLUMNS[column].value(run) for run in self.results_of(variant)]

    def references(self, column: str) -> dict[str, list[float]]:
        """Return the numbers of raw pixels and of the random backbone, one per seed.

        They are those of the backbone and the data that most variants share. There are none if
        every variant has its own, or if the column has nothing to compare with.
        """
        variants_by_settings: dict[str, set[str]] = {}
        for variant, config in self.runs:
            variants_by_settings.setdefault(_network_and_data(config), set()).add(variant)
        shared = max(variants_by_settings, key=lambda key: len(variants_by_settings[key]))
        if len(variants_by_settings) > 1 and len(variants_by_settings[shared]) == 1:
            return {}
        references: dict[str, dict[int, float]] = {}
        for (_, config), run in zip(self.runs, self.results):
            for name in (RAW_PIXELS, RANDOM_BACKBONE):
                value = COLUMNS[column].reference(run, name)
                if value is not None and _network_and_data(config) == shared:
                    references.setdefault(name, {}).setdefault(config.seed, value)
        return {name: list(values.values()) for name, values in sorted(references.items())}

    def families(self) -> dict[str, list[str]]:
        """Return the variants with finished runs in groups that are drawn in one panel.

        A group has the variants whose names are the same up to a comma, such as "SimSiam" and
        "SimSiam, no predictor". With `plot_against` all variants are one group, whose name is "".
        """
        groups: dict[str, list[str]] = {}
        for variant in self.variants:
            if self.results_of(variant):
                name = "" if self.plot_against else variant.partition(",")[0]
                groups.setdefault(name, []).append(variant)
        return groups

    def num_seeds(self) -> list[int]:
        """Return the different numbers of finished seeds of the variants that have any."""
        counts = {len(self.results_of(variant)) for variant in self.variants}
        return sorted(counts - {0})


def measure_table(comparison: Comparison) -> table_text.MeasureTable:
    """Return the table of a study, which ends with the reference rows."""
    columns = comparison.columns
    rows = [
        table_text.TableRow(
            variant,
            [comparison.values(variant, column) for column in columns],
            missing=table_text.MISSING if comparison.results_of(variant) else NOT_RUN,
        )
        for variant in comparison.variants
    ]
    references = {column: comparison.references(column) for column in columns}
    for name in (RANDOM_BACKBONE, RAW_PIXELS):
        cells = [references[column].get(name, []) for column in columns]
        if any(cells):
            rows.append(table_text.TableRow(name, cells, is_reference=True))
    titles = [table_text.TableColumn(column, best=COLUMNS[column].best) for column in columns]
    return table_text.MeasureTable(titles, rows)


def write(comparison: Comparison, command: str, path: Path, plots: Sequence[Path]) -> list[Path]:
    """Write the table as Markdown with the plots, as CSV and as LaTeX, and return the paths.

    If the Markdown file exists, its part between the comments `kept` and `end of kept` is kept.

    Args:
        comparison: The runs of the study.
        command: The study's command, shown above the table.
        path: Path of the Markdown file.
        plots: Images in the same folder, each with an .svg beside it.
    """
    table = measure_table(comparison)
    conclusions = KEPT_PART.search(path.read_text(encoding="utf-8")) if path.is_file() else None
    csv_path, latex_path = table_text.write_csv_and_latex(table, path)
    files = [(csv_path, "CSV"), (latex_path, "LaTeX")]
    files += [(plot.with_suffix(".svg"), f"{_plot_name(path, plot)} as SVG") for plot in plots]
    missing = describe_missing(comparison)
    blocks = [
        f"# {comparison.title}",
        *([conclusions[0]] if conclusions else []),
        f"Command: `{command}`",
        table.markdown(),
        *([missing] if missing else []),
        *(f"![{comparison.title}, {_plot_name(path, plot)}]({plot.name})" for plot in plots),
        describe(comparison),
        f"Files: {', '.join(f'[{title}]({file.name})' for file, title in files)}.",
    ]
    durable_files.replace(path, "\n\n".join(blocks) + "\n")
    return [path, csv_path, latex_path]


def _plot_name(table: Path, plot: Path) -> str:
    """Return what a plot shows, from its file name."""
    return plot.stem.removeprefix(table.stem).strip("_") or "results"


def describe_missing(comparison: Comparison) -> str:
    """Return a sentence that names the runs without results, or ""."""
    seeds_by_variant: dict[str, list[str]] = {}
    for variant, config in comparison.missing:
        seeds_by_variant.setdefault(variant, []).append(str(config.seed))
    names = [
        variant
        if not comparison.results_of(variant)
        else f"{variant} (seed{'s' * (len(seeds) > 1)} {' and '.join(seeds)})"
        for variant, seeds in seeds_by_variant.items()
    ]
    return f"Not run: {', '.join(names)}." if names else ""


def describe(comparison: Comparison) -> str:
    """Describe the runs, the deviation and each column."""
    variants_by_settings: dict[str, list[str]] = {}
    for variant in comparison.variants:
        configs = [config for name, config in comparison.runs if name == variant]
        if configs:
            variants_by_settings.setdefault(_describe_settings(configs[0]), []).append(variant)
    shared = max(variants_by_settings, key=lambda text: len(variants_by_settings[text]))
    has_shared = len(variants_by_settings) == 1 or len(variants_by_settings[shared]) > 1
    sentences = [
        f"{shared}." if has_shared else "",
        *(
            f"{', '.join(variants)}: {text}."
            for text, variants in variants_by_settings.items()
            if not has_shared or text != shared
        ),
        describe_deviation(comparison, "±"),
    ]
    columns = [f"- {name}: {COLUMNS[name].help}" for name in comparison.columns]
    return "\n".join([" ".join(filter(None, sentences)), "", *columns])


def describe_deviation(comparison: Comparison, mark: str) -> str:
    """Say over how many seeds the deviation is taken, and whether there is none.

    Args:
        comparison: The runs of the study.
        mark: What shows the deviation, such as "±" or "Error bars".
    """
    counts = comparison.num_seeds()
    if counts == [1]:
        return "One seed per row, so there is no deviation."
    text = f"{mark}: standard deviation over {' or '.join(map(str, counts))} seeds"
    return f"{text} (none with one seed)." if counts[0] == 1 else f"{text}."


def _network_and_data(config: RunConfig) -> str:
    """Return the settings that decide what raw pixels and a random backbone reach."""
    return f"{config.backbone} {config.data}"


def _describe_settings(config: RunConfig) -> str:
    subset = f"{config.data.subset:,} images of " if config.data.subset else ""
    return (
        f"{config.backbone.name}, {subset}{config.data.source}, batch {config.global_batch_size}, "
        f"{config.epochs} epochs, {config.optim.name}"
    )
