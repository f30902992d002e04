"""The page /docs, which describes the routes and sends images to them.

FastAPI's own page loads its scripts from another site. This one needs none, so that it also works
on a machine without a connection.
"""

import json
from typing import Any

from ssl_pretrain.eval.html import page


def render(schema: dict[str, Any], address: str) -> str:
    """Return the page.

    Args:
        schema: OpenAPI description of the routes.
        address: Address at which the client reached the service, for the example commands.
    """
    routes = [
        _describe_route(path, method, entry, address.rstrip("/"))
        for path, methods in schema["paths"].items()
        for method, entry in methods.items()
    ]
    return page.render(
        "service.html.jinja",
        title="Image vectors over HTTP",
        description=schema["info"]["description"].split("\n\n"),
        routes=sorted(routes, key=lambda route: route["method"] != "POST"),
    )


def _describe_route(path: str, method: str, entry: dict[str, Any], address: str) -> dict[str, Any]:
    answers = entry["responses"]
    content = entry.get("requestBody", {}).get("content", {})
    files = list(content.get("multipart/form-data", {}).get("schema", {}).get("properties", ()))
    example = answers["200"].get("content", {}).get("application/json", {}).get("example")
    forms = " ".join(f"-F {name}=@{name}.jpg" for name in files)
    return {
        "path": path,
        "method": method.upper(),
        "summary": entry["summary"],
        "files": files,
        "command": f"curl {forms} {address}{path}" if files else f"curl {address}{path}",
        "parameters": [
            {
                "name": parameter["name"],
                "default": parameter["schema"].get("default", ""),
                "description": parameter.get("description", ""),
            }
            for parameter in entry.get("parameters", [])
        ],
        "example": json.dumps(example),
        "errors": sorted(
            (status, answer["description"]) for status, answer in answers.items() if status != "200"
        ),
    }
