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
        with suppress(OSError, ValueError, KeyError, TypeError):  # not a whole result
            result = json.loads(path.read_text())
            new_hash = _hash_by_name(result)
            if not new_hash.items() <= hashes.items():
                hashes |= new_hash  # the latest result is stored twice
                yield result


def mark_sent(run: Path, result: dict[str, Any]) -> None:
    """Mark a result as sent."""
    with suppress(OSError):  # then the result is sent again, to the same step
        durable_files.replace(
            run / SENT_FILE, json.dumps(_sent_hashes(run) | _hash_by_name(result))
        )


def _hash_by_name(result: dict[str, Any]) -> dict[str, str]:
    """Return the hash of a result's numbers, by the name of the result."""
    digest = hashlib.sha256(json.dumps(result["rows"]).encode()).hexdigest()[:16]
    return {f"{result['name']} of step {result['step']}": digest}


def _sent_hashes(run: Path) -> dict[str, str]:
    path = run / SENT_FILE
    return json.loads(path.read_text()) if path.exists() else {}
