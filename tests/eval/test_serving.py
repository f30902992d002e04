"""Answers of the service are those of the network offline, for any form of request."""

import asyncio
import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

from small_service import (
    DIM,
    SIDE,
    PlainIndex,
    encode,
    offline_vector,
    open_client,
    open_service,
    random_pixels,
    run_concurrently,
    write_export,
)

from ssl_pretrain.eval import serve
from ssl_pretrain.eval.embedding.vector_index import build_index
from ssl_pretrain.eval.serving import routes
from ssl_pretrain.eval.serving.served_network import ServedNetwork
from ssl_pretrain.eval.serving.service import ServiceLimits


@pytest.fixture(scope="module")
def export_folder(tmp_path_factory):
    return write_export(tmp_path_factory.mktemp("exports") / "export")


@pytest.fixture(scope="module")
def client(export_folder):
    vectors = np.stack(
        [offline_vector(export_folder, encode(random_pixels(seed))) for seed in range(20)]
    )
    index = PlainIndex(vectors, [f"image_{seed}.png" for seed in range(20)])
    with open_client(open_service(export_folder, index)) as client:
        yield client


def vector_of(answer) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    assert answer.json()["dimension"] == DIM
    return np.array(answer.json()["vector"], np.float32)


def cosine(first: np.ndarray, second: np.ndarray) -> float:
    return float(first @ second / np.linalg.norm(first) / np.linalg.norm(second))


def test_a_form_and_a_raw_body_give_the_vector_of_the_network_offline(client, export_folder):
    content = encode(random_pixels(0))
    expected = offline_vector(export_folder, content)
    for answer in (
        client.post("/embed", files={"image": content}),
        client.post("/embed", content=content),
        client.post("/embed", content=content, headers={"content-type": "image/png"}),
        client.post("/embed", content=iter([content[:50], content[50:]])),  # chunked
    ):
        np.testing.assert_allclose(vector_of(answer), expected, rtol=0, atol=1e-4)


def test_the_text_of_a_vector_restores_every_float(export_folder):
    vector = np.random.default_rng(0).standard_normal(4096).astype(np.float32)
    vector[:3] = 0.1, 1e-30, -3.4e38
    restored = np.array(json.loads(routes.format_vector(vector))["vector"], np.float32)
    np.testing.assert_array_equal(restored, vector)


def test_similarity_is_the_cosine_of_the_vectors_offline(client, export_folder):
    contents = [encode(random_pixels(seed)) for seed in (1, 2)]
    answer = client.post("/similarity", files={"image_a": contents[0], "image_b": contents[1]})
    vectors = [offline_vector(export_folder, content) for content in contents]
    assert answer.json()["cosine"] == pytest.approx(cosine(*vectors), abs=1e-4)


def test_neighbors_are_those_of_the_index(client, export_folder):
    answer = client.post("/neighbors?k=3", content=encode(random_pixels(7)))
    neighbors = answer.json()["neighbors"]
    assert len(neighbors) == 3
    assert neighbors[0]["id"] == "image_7.png"
    assert neighbors[0]["score"] == pytest.approx(1, abs=1e-5)
    scores = [neighbor["score"] for neighbor in neighbors]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize(("k", "text"), [(0, "k: 0"), (21, "k: 21"), (-1, "k: -1")])
def test_a_k_out_of_range_is_refused(client, k, text):
    answer = client.post(f"/neighbors?k={k}", content=encode(random_pixels(7)))
    assert answer.status_code == 422
    assert answer.json() == {
        "error": f"{text} is out of range.",
        "remedy": "Give a whole number from 1 to 20; the index has 20 vectors.",
    }


def test_a_k_that_is_no_number_is_refused(client):
    answer = client.post("/neighbors?k=many", content=encode(random_pixels(7)))
    assert answer.status_code == 422
    assert answer.json()["error"].startswith("k: Input should be a valid integer")


def test_neighbors_without_an_index_are_refused(export_folder):
    with open_client(open_service(export_folder)) as client:
        answer = client.post("/neighbors", content=encode(random_pixels(0)))
    assert answer.status_code == 404
    assert answer.json() == {
        "error": "This service has no index.",
        "remedy": "Start it with --index INDEX, which `ssl-pretrain index` writes.",
    }


@pytest.mark.parametrize(
    ("path", "fields", "error", "remedy"),
    [
        (
            "/embed",
            ["file"],
            "The form has the field file, but this route takes the field image.",
            "Send one file as image.",
        ),
        (
            "/embed",
            ["image", "mask"],
            "The form has the fields image, mask, but this route takes the field image.",
            "Send one file as image.",
        ),
        (
            "/similarity",
            ["image_a"],
            "The form has the field image_a, but this route takes the fields image_a, image_b.",
            "Send one file each as image_a and image_b.",
        ),
    ],
)
def test_wrong_fields_are_named(client, path, fields, error, remedy):
    content = encode(random_pixels(0))
    answer = client.post(path, files=dict.fromkeys(fields, content))
    assert answer.status_code == 422
    assert answer.json() == {"error": error, "remedy": remedy}


def test_a_damaged_form_is_named(client):
    headers = {"content-type": "multipart/form-data; boundary=x"}
    for content, start in (
        (b"no boundary", "The form is damaged: "),
        (b'--x\r\nContent-Disposition: form-data; name="image"\r\n\r\nabc', "The form is cut off."),
    ):
        answer = client.post("/embed", content=content, headers=headers)
        assert answer.status_code == 422
        assert answer.json()["error"].startswith(start)
    answer = client.post("/embed", content=b"", headers={"content-type": "multipart/form-data"})
    assert answer.json()["error"] == "The form has no boundary in its Content-Type."
    headers = {"content-type": f"multipart/form-data; boundary={'x' * 300}"}
    answer = client.post("/embed", content=b"--x", headers=headers)
    assert answer.status_code == 422
    assert answer.json()["error"].startswith("The form is damaged: ")


def test_a_pair_needs_a_form(client):
    answer = client.post(
        "/similarity", content=encode(random_pixels(0)), headers={"content-type": "image/png"}
    )
    assert answer.status_code == 422
    assert answer.json() == {
        "error": "The body is image/png, but this route takes two images.",
        "remedy": "Send a form (multipart/form-data) with the files image_a and image_b.",
    }


def test_unknown_routes_and_methods_are_json(client):
    assert client.get("/embeds").json()["error"] == "There is no route /embeds."
    answer = client.get("/embed")
    assert (answer.status_code, answer.json()["error"]) == (405, "/embed does not take GET.")


@pytest.mark.parametrize("path", ["/", "/healthz", "/readyz"])
def test_load_balancers_may_ask_for_the_head_of_a_state(client, path):
    answer = client.head(path)
    assert (answer.status_code, answer.text) == (200, "")


def test_a_name_of_another_site_is_refused(client):
    answer = client.get("/", headers={"host": "rebound.example"})
    assert answer.status_code == 403
    assert answer.json()["error"] == "This service answers at 127.0.0.1 and localhost only."


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "127.0.0.2:8000", "LOCALHOST", "localhost:", "localhost:80", "[::1]:80", "::1"],
)
def test_names_of_this_machine_are_answered(client, host):
    assert client.get("/healthz", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("host", ["", "192.168.1.5", "127.0.0.1.example", "localhost:80:80", "::2"])
def test_other_names_are_refused(client, host):
    assert client.get("/healthz", headers={"host": host}).status_code == 403


def test_state_and_facts(client):
    assert client.get("/healthz").json() == {"state": "live"}
    assert client.get("/readyz").json() == {"state": "ready"}
    facts = client.get("/").json()
    assert facts["network"] == "one_convolution"
    assert facts["dimension"] == DIM
    assert len(facts["weights_sha256"]) == 64
    assert facts["index"] == {"count": 20, "metric": "cosine", "kind": "flat", "recall": 1.0}


def test_the_metrics_count_requests_by_route_and_status(client):
    def value(text, name):
        lines = (line for line in text.splitlines() if line.startswith(name))
        return next((float(line.split()[-1]) for line in lines), 0.0)

    refused = 'ssl_pretrain_requests_total{route="/embed",status="415"}'
    before = client.get("/metrics").text
    client.post("/embed", content=b"%PDF-1.7")
    client.post("/embed", content=encode(random_pixels(0)))
    after = client.get("/metrics").text
    assert value(after, refused) == value(before, refused) + 1
    batches = "ssl_pretrain_batch_images_count"
    assert value(after, batches) == value(before, batches) + 1
    assert value(after, "ssl_pretrain_queue_images ") == 0
    for stage in ("read", "decode", "wait", "network"):
        assert value(after, f'ssl_pretrain_stage_seconds_count{{stage="{stage}"}}') > 0


def test_the_page_and_the_schema_describe_every_route(client):
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/", "/embed", "/similarity", "/neighbors", "/healthz", "/readyz", "/metrics"} == {
        *paths
    }
    for path in ("/embed", "/similarity", "/neighbors"):
        answers = paths[path]["post"]["responses"]
        assert {"200", "408", "413", "415", "422", "503"} <= {*answers}
        for answer in answers.values():
            assert "example" in answer["content"]["application/json"] or answer == answers["404"]
    page = client.get("/docs").text
    assert (
        "curl -F image_a=@image_a.jpg -F image_b=@image_b.jpg http://127.0.0.1/similarity" in page
    )
    assert "https://" not in page  # it needs no other site


def test_concurrent_requests_share_batches_and_keep_their_vectors(export_folder):
    service = open_service(export_folder, max_batch=4, max_wait_ms=200)
    contents = [encode(random_pixels(seed, (20, 20 + seed, 3))) for seed in range(24)]
    sizes = []
    embed = service.network.embed
    service._batcher._embed = lambda images: (sizes.append(len(images)), embed(images))[1]

    async def send(client):
        return await asyncio.gather(
            *(client.post("/embed", content=content) for content in contents)
        )

    for content, answer in zip(contents, run_concurrently(service, send)):
        expected = offline_vector(export_folder, content)
        np.testing.assert_allclose(vector_of(answer), expected, rtol=0, atol=1e-4)
    assert max(sizes) == 4
    assert sum(sizes) == 25  # with the first image of the service itself


def test_a_network_whose_vectors_depend_on_the_batch_gets_one_image_at_a_time(export_folder):
    network = ServedNetwork.load(export_folder, "float")
    assert network.takes_batches
    sizes = []

    def session(images):
        sizes.append(len(images))
        return network._session(images)

    alone = replace(network, takes_batches=False, _session=session)
    import torch

    alone.embed([torch.zeros(3, SIDE, SIDE)] * 3)
    assert sizes == [1, 1, 1]


def test_more_images_than_the_queue_holds_are_refused_with_retry_after(export_folder):
    service = open_service(export_folder, max_queue=2, max_batch=1)
    contents = [encode(random_pixels(seed)) for seed in range(12)]

    async def send(client):
        return await asyncio.gather(
            *(client.post("/embed", content=content) for content in contents)
        )

    answers = run_concurrently(service, send)
    refused = [answer for answer in answers if answer.status_code == 503]
    assert refused
    assert len(refused) + sum(answer.status_code == 200 for answer in answers) == 12
    assert refused[0].headers["retry-after"] == "1"
    assert refused[0].json() == {
        "error": "2 images wait already, which is the limit.",
        "remedy": "Try again in a second.",
    }


def test_a_vector_that_is_not_finite_is_an_error_and_not_an_answer(export_folder):
    service = open_service(export_folder)
    with open_client(service) as client:
        service._batcher._embed = lambda images: np.full((len(images), DIM), np.nan, np.float32)
        answer = client.post("/embed", content=encode(random_pixels(0)))
    assert answer.status_code == 500
    assert answer.json()["error"] == (
        "image: the network computed a vector with a value that is not finite."
    )


def test_a_failing_network_answers_500_and_the_service_goes_on(export_folder, caplog):
    service = open_service(export_folder)
    embed = service.network.embed

    def fail(images):
        raise RuntimeError("out of memory")

    with open_client(service) as client:
        service._batcher._embed = fail
        answer = client.post("/embed", content=encode(random_pixels(0)))
        assert answer.status_code == 500
        assert answer.json()["error"] == "The service failed."
        service._batcher._embed = embed
        assert client.post("/embed", content=encode(random_pixels(0))).status_code == 200
    assert "out of memory" in caplog.text


def test_an_answer_that_takes_too_long_is_refused(export_folder):
    import time

    service = open_service(export_folder, timeout_seconds=0.2)
    with open_client(service) as client:
        service._batcher._embed = lambda images: time.sleep(0.6)
        answer = client.post("/embed", content=encode(random_pixels(0)))
    assert answer.status_code == 503
    assert answer.json()["error"] == "The answer was not computed within 0.2 seconds."


def error_of(function, *arguments) -> str:
    with pytest.raises(ValueError) as error:
        function(*arguments)
    return str(error.value)


def test_an_export_without_the_model_is_refused(export_folder, tmp_path):
    folder = shutil.copytree(export_folder, tmp_path / "export")
    (folder / "model_int8.onnx").unlink()
    remedy = "write it with `ssl-pretrain export RUN OUT --format onnx`"
    assert error_of(ServedNetwork.load, folder, "int8") == (
        f"{folder}: model_int8.onnx is missing, which --model int8 needs; {remedy}"
    )
    (folder / "model.onnx").write_bytes(b"damaged")
    message = error_of(ServedNetwork.load, folder, "float")
    assert message.startswith(f"{folder / 'model.onnx'}: cannot be loaded: ")
    assert message.endswith(remedy)


def test_models_of_another_network_are_refused(export_folder, tmp_path):
    folder = shutil.copytree(export_folder, tmp_path / "export")
    other = write_export(tmp_path / "other", seed=1)
    for name in ("model.onnx", "model_int8.onnx"):
        shutil.copy(other / name, folder / name)
    message = error_of(ServedNetwork.load, folder, "float")
    assert "the features of the reference images differ from the exported ones by" in message
    message = error_of(ServedNetwork.load, folder, "int8")
    assert "have a cosine of" in message
    assert "start with --model float" in message


def test_an_index_of_another_network_is_refused(export_folder, tmp_path):
    pytest.importorskip("faiss")
    provenance = ServedNetwork.load(export_folder, "float").provenance()
    vectors = np.random.default_rng(0).standard_normal((5, DIM))
    folder, ids = tmp_path / "index", list("abcde")
    build_index(vectors, ids, provenance=provenance).save(folder)
    service = serve.open_service(export_folder, str(folder), "float", ServiceLimits())
    assert len(service.index) == 5
    other = {"network": "resnet50", "origin": "runs/other", "weights_sha256": "0" * 64}
    build_index(vectors, ids, provenance=provenance | other).save(folder)
    arguments = (export_folder, str(folder), "float", ServiceLimits())
    assert error_of(serve.open_service, *arguments) == (
        f"{export_folder}: has the weights {provenance['weights_sha256'][:12]}, and the index was "
        "made with 000000000000 (resnet50 of runs/other); give that network, or index the images "
        "again with this one"
    )
    build_index(vectors[:, :-1], ids).save(folder)
    assert error_of(serve.open_service, *arguments) == (
        f"--index {folder}: has vectors of {DIM - 1} numbers, and the network of {export_folder} "
        f"computes {DIM}; embed and index the images with this network"
    )


def test_a_missing_package_is_named(export_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.setattr(
        "ssl_pretrain.system.optional_packages.is_installed", lambda name: name != "uvicorn"
    )
    assert error_of(serve.main, [str(export_folder)]).startswith(
        "serve: uvicorn is not installed; install it with `pip install '.[serve]'`"
    )
