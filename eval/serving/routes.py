"""Routes of the service: a FastAPI application."""

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Annotated, Any, TypeAlias

import numpy as np

import ssl_pretrain
from ssl_pretrain.eval.html import local_server
from ssl_pretrain.eval.serving import answers, description_page
from ssl_pretrain.eval.serving.refusals import Refusal
from ssl_pretrain.eval.serving.service import Service, cosine_similarity

IMAGE = ("image",)
PAIR = ("image_a", "image_b")
NO_ANSWER = 499  # status in the metrics of a request that was cancelled
DESCRIPTION = """Embeds, compares and finds images with a pretrained network.

Send an image as the file `image` of a form, or as the raw body of the request, and a pair as the
files `image_a` and `image_b` of a form. An error is JSON with `error` and `remedy`."""
_logger = logging.getLogger("ssl_pretrain.serve")
Scope: TypeAlias = dict[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Any]]
Send: TypeAlias = Callable[[Any], Awaitable[None]]


def build_app(service: Service, *, is_local: bool = True) -> Any:
    """Return the application of a service, for an ASGI server.

    Args:
        service: The service, which starts and stops with the application.
        is_local: True to answer only requests that name this machine as their host.
    """
    import fastapi

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.stop()

    app = fastapi.FastAPI(
        title="ssl_pretrain",
        version=ssl_pretrain.__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,  # it loads scripts from another site
        redoc_url=None,
    )
    _add_error_handlers(app)
    _add_state_routes(app, service)
    _add_image_routes(app, service)
    return RequestRecorder(app, service, is_local)


class RequestRecorder:
    """Outermost layer of the application, which measures requests and checks their Host header."""

    def __init__(self, app: Any, service: Service, is_local: bool):
        self.app, self._service, self._is_local = app, service, is_local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), 0

        async def send_and_record(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            answer = self.app if self._is_allowed(scope) else _refuse_host()
            await answer(scope, receive, send_and_record)
        except Exception:  # the client has the answer of `answer_failure`
            _logger.exception("%s %s failed", scope["method"], scope["path"])
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._service.metrics.count_request(
                route, status or NO_ANSWER, time.perf_counter() - start
            )

    def _is_allowed(self, scope: Scope) -> bool:
        """Return False for a page of another site that points its own name to this machine."""
        host = next((value for name, value in scope["headers"] if name == b"host"), b"")
        return not self._is_local or local_server.is_own_host(host.decode("latin-1"))


def _refuse_host() -> Any:
    return _error_response(
        403,
        "This service answers at 127.0.0.1 and localhost only.",
        "Use one of these names, or start the service with --host.",
    )


def _error_response(
    status: int, error: str, remedy: str, headers: dict[str, str] | None = None
) -> Any:
    from starlette.responses import JSONResponse

    return JSONResponse({"error": error, "remedy": remedy}, status, headers)


def _add_error_handlers(app: Any) -> None:
    from fastapi.exceptions import RequestValidationError
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from starlette.responses import Response

    async def answer_refusal(request: Any, error: Any) -> Any:
        return _error_response(error.status, error.error, error.remedy, error.headers)

    async def answer_invalid(request: Any, error: Any) -> Any:
        first = error.errors()[0]
        name = ".".join(str(key) for key in first["loc"][1:])
        return _error_response(
            422, f"{name}: {first['msg']}.", "Correct the parameter; /docs describes it."
        )

    async def answer_http(request: Any, error: Any) -> Any:
        method, path = request.method, request.url.path
        texts = {
            404: (f"There is no route {path}.", "/docs lists the routes."),
            405: (f"{path} does not take {method}.", "/docs lists the method of each route."),
        }
        error_text, remedy = texts.get(error.status_code, (f"{error.detail}.", "See /docs."))
        return _error_response(error.status_code, error_text, remedy, error.headers)

    async def answer_failure(request: Any, error: Any) -> Any:
        remedy = "Report it to the operator of the service, who finds it in the log."
        return _error_response(500, "The service failed.", remedy)

    async def answer_disconnect(request: Any, error: Any) -> Any:
        return Response(status_code=499)  # nobody reads it, but it is counted

    app.exception_handler(Refusal)(answer_refusal)
    app.exception_handler(RequestValidationError)(answer_invalid)
    app.exception_handler(HTTPException)(answer_http)
    app.exception_handler(ClientDisconnect)(answer_disconnect)
    app.exception_handler(Exception)(answer_failure)


def _add_state_routes(app: Any, service: Service) -> None:
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, JSONResponse, Response

    async def show_facts() -> dict[str, Any]:
        return service.facts() | {"docs": "/docs"}

    async def show_description(request: Request) -> Any:
        return HTMLResponse(description_page.render(app.openapi(), str(request.base_url)))

    async def show_life() -> Any:
        return JSONResponse({"state": "live"})

    async def show_readiness() -> Any:
        return JSONResponse({"state": "ready"})  # connections are accepted after the warm-up only

    async def show_metrics() -> Any:
        content, kind = service.metrics.render()
        return Response(content, headers={"content-type": kind})

    add = app.add_api_route
    state = answers.StateAnswer
    add("/", show_facts, summary="Facts about the network and the index")
    add("/healthz", show_life, summary="Is the process alive?", response_model=state)
    add("/readyz", show_readiness, summary="Does it take images?", response_model=state)
    for path, function in (("/", show_facts), ("/healthz", show_life), ("/readyz", show_readiness)):
        add(path, function, methods=["HEAD"], include_in_schema=False)  # for load balancers
    add("/docs", show_description, include_in_schema=False)
    add("/metrics", show_metrics, summary="Metrics for Prometheus", response_class=Response)


def _add_image_routes(app: Any, service: Service) -> None:
    import fastapi
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response

    async def embed(request: Any, names: tuple[str, ...]) -> np.ndarray:
        return await service.embed_upload(request.headers, request.stream(), names)

    async def embed_image(request: Request) -> Any:
        (vector,) = await embed(request, IMAGE)
        return Response(format_vector(vector), media_type="application/json")

    async def compare_images(request: Request) -> Any:
        return JSONResponse({"cosine": cosine_similarity(await embed(request, PAIR))})

    async def find_neighbors(
        request: Request, k: Annotated[int, fastapi.Query(description="Number of neighbors")] = 10
    ) -> Any:
        service.check_k(k)
        (vector,) = await embed(request, IMAGE)
        neighbors = await service.search(vector, k)
        return JSONResponse(
            {"neighbors": [{"id": name, "score": score} for name, score in neighbors]}
        )

    no_index = {404: {"model": answers.ErrorAnswer, "description": "The service has no index."}}
    for path, function, summary, names, example, others in (
        ("/embed", embed_image, "Vector of an image", IMAGE, answers.EMBED, {}),
        ("/similarity", compare_images, "Cosine of two images", PAIR, answers.SIMILARITY, {}),
        ("/neighbors", find_neighbors, "Nearest images", IMAGE, answers.NEIGHBORS, no_index),
    ):
        app.add_api_route(
            path,
            function,
            methods=["POST"],
            summary=summary,
            response_model=type(example),
            responses=_describe_answers(asdict(example)) | others,
            openapi_extra=_describe_body(names),
        )


def format_vector(vector: np.ndarray) -> bytes:
    """Return the JSON of a vector. Nine digits restore each float32 exactly."""
    numbers = ",".join(["%.9g"] * len(vector)) % tuple(vector.tolist())
    return f'{{"vector":[{numbers}],"dimension":{len(vector)}}}'.encode()


def _describe_answers(example: dict[str, Any]) -> dict[int | str, dict[str, Any]]:
    """Return the description of the answers of a route that takes images."""
    described: dict[int | str, dict[str, Any]] = {
        200: {"content": {"application/json": {"example": example}}}
    }
    for status, summary in answers.ERROR_SUMMARIES.items():
        described[status] = {
            "model": answers.ErrorAnswer,
            "description": summary,
            "content": {"application/json": {"example": answers.ERROR_EXAMPLES[status]}},
        }
    return described


def _describe_body(names: tuple[str, ...]) -> dict[str, Any]:
    """Return the description of the body of a route that takes images."""
    file = {"type": "string", "format": "binary"}
    form = {"type": "object", "required": list(names), "properties": dict.fromkeys(names, file)}
    content: dict[str, Any] = {"multipart/form-data": {"schema": form}}
    if len(names) == 1:
        content["application/octet-stream"] = {"schema": file}
    return {"requestBody": {"required": True, "content": content}}
