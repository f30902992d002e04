"""Evaluation results of a run that W&B does not have yet."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ssl_pretrain.system import durable_files

SENT = "wandb/evaluations_sent.json"


def unsent(run: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield a key, a hash and the content of each result that `mark_sent` was not called with."""
    sent = _sent(run)
    for path in sorted([*run.glob("eval/*.json"), *run.glob("eval/step_*/*.json")]):
        with suppress(OSError, ValueError, KeyError, TypeError):  # perhaps half written by another
            result = json.loads(path.read_text())
            key = f"{result['name']} of step {result['step']}"
            content = hashlib.sha256(json.dumps(result["rows"]).encode()).hexdigest()[:16]
            if sent.get(key) != content:
                sent[key] = content  # the latest result is stored twice
                yield key, content, result


def mark_sent(run: Path, key: str, content: str) -> None:
    """Remember that a result was sent."""
    with suppress(OSError):  # the result is sent again, to the same step
        durable_files.replace(run / SENT, json.dumps(_sent(run) | {key: content}))


def _sent(run: Path) -> dict[str, str]:
    return json.loads((run / SENT).read_text()) if (run / SENT).exists() else {}
