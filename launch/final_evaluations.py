"""Evaluations after training: their names, and those that the last checkpoint still needs."""

import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ssl_pretrain import config as configuration
from ssl_pretrain.checkpoint.folder import newest_checkpoint
from ssl_pretrain.config import ConfigError, RunConfig

EVALUATIONS = (
    "knn",
    "linear",
    "spectrum",
    "retrieval",
    "robustness",
    "semi",
    "finetune",
    "export",
    "report",
)


def check_evaluations(config: RunConfig) -> None:
    """Raise ConfigError for a name in `evaluation.at_end` that is no evaluation."""
    check_names(config.evaluation.at_end, "evaluation.at_end")


def check_names(names: list[str], option: str) -> None:
    """Raise ConfigError, which names the option, unless all names are those of evaluations."""
    unknown = [name for name in names if name not in EVALUATIONS]
    if unknown:
        raise ConfigError(
            f"{option}: {unknown[0]!r} is not an evaluation; choose among: {', '.join(EVALUATIONS)}"
        )


def command(name: str, run: str | Path, *arguments: str) -> list[str]:
    """Return the command of an evaluation."""
    return [sys.executable, "-m", f"ssl_pretrain.eval.{name}", str(run), *arguments]


@dataclass
class FinalEvaluation:
    """An evaluation of the last checkpoint.

    After it has succeeded, the file `note` holds its settings, so that it is repeated only with
    others.
    """

    name: str
    command: list[str]
    note: Path
    settings: str

    def is_done(self) -> bool:
        """Return True if the evaluation has succeeded with these settings."""
        with suppress(OSError):
            return self.note.read_text() == self.settings
        return False

    def write_note(self) -> None:
        """Record that the evaluation has succeeded with these settings."""
        self.note.parent.mkdir(parents=True, exist_ok=True)
        self.note.write_text(self.settings)


def due_evaluations(config: RunConfig, options: dict[str, list[str]]) -> Iterator[FinalEvaluation]:
    """Yield the evaluations that the last checkpoint does not have with these settings.

    The report is due again after any other evaluation has succeeded.

    Args:
        config: The run's configuration.
        options: Further options by name of the evaluation.
    """
    values = configuration.to_dict(config)
    folder = Path(config.output) / "eval" / newest_checkpoint(config.output).name
    report_is_outdated = False
    for name in config.evaluation.at_end:
        arguments = options.get(name, [])
        settings = {
            "data": values["data"],
            "evaluation": values["evaluation"],
            "arguments": arguments,
        }
        evaluation = FinalEvaluation(
            name,
            command(name, config.output, "--skip-unlabeled", *arguments),
            folder / f".{name}.done",
            json.dumps(settings, indent=1),
        )
        if evaluation.is_done() and not (report_is_outdated and name == "report"):
            print(
                f"--- {name}: done before; "
                f"python -m ssl_pretrain.eval.{name} {config.output} does it again",
                flush=True,
            )
            continue
        yield evaluation
        report_is_outdated = report_is_outdated or evaluation.is_done()
