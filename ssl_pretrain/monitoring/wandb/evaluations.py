"""Find the evaluation results of a run that have not been sent to W&B yet."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ssl_pretrain.system import durable_files

SENT_FILE = "wandb/evaluations_sent.json"


def unsent_results(run: Path) -> Iterator[dict[str, Any]]:
    """Yield each result that is not marked as sent, without duplicates."""
    hashes = _sent_hashes(run)
    for path in sorted([*run.glob("eval/*.json"), *run.glob("eval/step_*/*.json")]):
        with suppress(OSError, ValueError, KeyError, TypeError):  # skips incomplete files
            result = json.loads(path.read_text())
            new_hash = _hash_by_name(result)
            if not new_hash.items() <= hashes.items():
                hashes |= new_hash  # two files contain the latest result
                yield result


def mark_sent(run: Path, result: dict[str, Any]) -> None:
    """Record that a result has been sent."""
    with suppress(OSError):  # without the record, the result is sent to the same step again
        durable_files.replace(
            run / SENT_FILE, json.dumps(_sent_hashes(run) | _hash_by_name(result))
        )


def _hash_by_name(result: dict[str, Any]) -> dict[str, str]:
    """Return the hash of a result's numbers, with the result's name and step as the key."""
    digest = hashlib.sha256(json.dumps(result["rows"]).encode()).hexdigest()[:16]
    return {f"{result['name']} of step {result['step']}": digest}


def _sent_hashes(run: Path) -> dict[str, str]:
    path = run / SENT_FILE
    return json.loads(path.read_text()) if path.exists() else {}
