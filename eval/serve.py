"""Serve an exported network over HTTP: vectors, similarities and nearest neighbors of images."""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from ssl_pretrain.eval import command_line
from ssl_pretrain.eval.embedding.vector_index import VectorIndex
from ssl_pretrain.eval.serving import http_server, routes
from ssl_pretrain.eval.serving.served_network import FILES, ServedNetwork
from ssl_pretrain.eval.serving.service import Service, ServiceLimits
from ssl_pretrain.schema import NON_NEGATIVE_FLOAT, PORT, POSITIVE_FLOAT, POSITIVE_INT
from ssl_pretrain.schema.argument_parser import ArgumentParser
from ssl_pretrain.system import optional_packages, program

NAME = "ssl_pretrain.eval.serve"
PACKAGES = ("fastapi", "uvicorn", "python-multipart", "prometheus-client", "onnxruntime")
LOCAL_HOST, DEFAULT_PORT = "127.0.0.1", 8000
DESCRIPTION = """Serve an exported network over HTTP: vectors, similarities and nearest neighbors.

    python -m ssl_pretrain.eval.export runs/demo exported/demo --format onnx
    python -m ssl_pretrain.eval.serve exported/demo
    curl -F image=@cat.jpg http://127.0.0.1:8000/embed
    curl -F image_a=@cat.jpg -F image_b=@dog.jpg http://127.0.0.1:8000/similarity
    curl --data-binary @cat.jpg "http://127.0.0.1:8000/neighbors?k=5"    # with --index

Open http://127.0.0.1:8000/docs for all routes. SIGTERM or Ctrl-C finishes running requests."""
_DEFAULTS = ServiceLimits()
OPTIONS: dict[str, dict[str, Any]] = {
    "--index": {"metavar": "INDEX", "help": "folder of an index, for /neighbors"},
    "--host": {
        "default": LOCAL_HOST,
        "help": f"address to listen on (default: {LOCAL_HOST}, which only this machine reaches)",
    },
    "--port": {"type": PORT, "default": DEFAULT_PORT, "help": "port (default: 8000; 0: any free)"},
    "--model": {
        "choices": list(FILES),
        "default": "float",
        "help": "model.onnx or model_int8.onnx of the export (default: float)",
    },
    "--max-bytes": {
        "type": POSITIVE_INT,
        "default": _DEFAULTS.max_bytes,
        "help": f"largest image file in bytes (default: {_DEFAULTS.max_bytes:,})",
    },
    "--max-pixels": {
        "type": POSITIVE_INT,
        "default": _DEFAULTS.max_pixels,
        "help": f"largest image in pixels (default: {_DEFAULTS.max_pixels:,})",
    },
    "--max-batch": {
        "type": POSITIVE_INT,
        "default": _DEFAULTS.max_batch,
        "help": f"images of concurrent requests per batch (default: {_DEFAULTS.max_batch})",
    },
    "--max-queue": {
        "type": POSITIVE_INT,
        "default": _DEFAULTS.max_queue,
        "help": "images that may wait; more requests get status 503"
        f" (default: {_DEFAULTS.max_queue})",
    },
    "--max-wait-ms": {
        "type": NON_NEGATIVE_FLOAT,
        "default": _DEFAULTS.max_wait_ms,
        "help": "longest wait of a batch for images that are being decoded"
        f" (default: {_DEFAULTS.max_wait_ms:g})",
    },
    "--timeout": {
        "type": POSITIVE_FLOAT,
        "default": _DEFAULTS.timeout_seconds,
        "help": "seconds for a request to arrive, and for its answer"
        f" (default: {_DEFAULTS.timeout_seconds:g})",
    },
    "--threads": {
        "type": POSITIVE_INT,
        "help": "threads of the network, and threads that decode (default: one per core)",
    },
}


def main(arguments: list[str]) -> None:
    """Run the command-line interface."""
    options = _build_parser().parse_args(arguments)
    for package in PACKAGES:
        optional_packages.require("serve", package, "serve")
    threads = options.threads or torch.get_num_threads()
    limits = ServiceLimits(
        max_bytes=options.max_bytes,
        max_pixels=options.max_pixels,
        max_batch=options.max_batch,
        max_queue=options.max_queue,
        max_wait_ms=options.max_wait_ms,
        timeout_seconds=options.timeout,
        threads=threads,
    )
    with http_server.bind(options.host, options.port) as bound:
        service = open_service(Path(options.export), options.index, options.model, limits)
        address = http_server.address_of(bound)
        _print_start(service, address, options.host)
        app = routes.build_app(service, is_local=not http_server.is_public(options.host))
        http_server.serve(app, bound, limits.timeout_seconds)
    print("stopped", file=sys.stderr)


def open_service(
    folder: Path, index_folder: str | None, model: Any, limits: ServiceLimits
) -> Service:
    """Open an export, and the index that belongs to it.

    Raises:
        ValueError: If a file is missing or damaged, or the index is of another network.
    """
    torch.set_num_threads(limits.threads)
    network = ServedNetwork.load(folder, model)
    torch.set_num_threads(1)  # each decoding thread resizes on its own
    index = None
    if index_folder is not None:
        index = VectorIndex.load(index_folder)
        index.check_network(network.provenance(), str(folder))
        if index.facts.dim != network.dim:
            raise ValueError(
                f"--index {index_folder}: has vectors of {index.facts.dim} numbers, and the "
                f"network of {folder} computes {network.dim}; embed and index the images with this "
                "network"
            )
    return Service(network, index, limits)


def _print_start(service: Service, address: str, host: str) -> None:
    facts = service.network.facts()
    index = "" if service.index is None else f", index of {len(service.index):,} images"
    print(
        f"{facts['network']} by {facts['method']}, {facts['dimension']} numbers per image, "
        f"{facts['model']}{index}: {address}, described at {address}/docs",
        flush=True,
    )
    if http_server.is_public(host):
        print(
            f"WARNING: --host {host}: other machines can reach this service, and it has no "
            "authentication; put it behind a proxy that authenticates, or drop --host",
            file=sys.stderr,
            flush=True,
        )


def _build_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(program.usage_name(f"python -m {NAME}"), description=DESCRIPTION)
    parser.add_argument("export", metavar="EXPORT", help="folder of an export with ONNX models")
    for flag, arguments in OPTIONS.items():
        parser.add_argument(flag, **arguments)
    return parser


if __name__ == "__main__":
    command_line.execute(main, NAME)
