"""Evaluation results of a run that W&B does not have yet."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ssl_pretrain.system import durable_files

SENT_FILE = "wandb/evaluations_sent.json"


def unsent(run: Path) -> Iterator[dict[str, Any]]:
    """Yield each result that has not been marked as sent, once."""
    hashes = _sent_hashes(run)
    for path in sorted([*run.glob("eval/*.json"), *run.glob("eval/step_*/*.json")]):
        with suppress(OSError, ValueError, KeyError, TypeError):  # not a result, or half written
            result = json.loads(path.read_text())
            identity = _identity(result)
            if not identity.items() <= hashes.items():
                hashes |= identity  # the latest result is stored twice
                yield result


def mark_sent(run: Path, result: dict[str, Any]) -> None:
    """Remember that a result was sent."""
    with suppress(OSError):  # then the result is sent again, to the same step
        durable_files.replace(run / SENT_FILE, json.dumps(_sent_hashes(run) | _identity(result)))


def _identity(result: dict[str, Any]) -> dict[str, str]:
    """Return the name of a result with a hash of its numbers."""
    digest = hashlib.sha256(json.dumps(result["rows"]).encode()).hexdigest()[:16]
    return {f"{result['name']} of step {result['step']}": digest}


def _sent_hashes(run: Path) -> dict[str, str]:
    path = run / SENT_FILE
    return json.loads(path.read_text()) if path.exists() else {}
