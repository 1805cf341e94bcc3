"""Scores and rankings are the cosines of the vectors that /v1/embeddings has."""

from itertools import pairwise

import httpx
import numpy as np
import pytest

from tests.support.over_http import assert_error
from tests.support.servers.adapter_server import KnownModel
from tests.support.servers.server_process import REAL, ServerProcess, running

TEXTS = ["The cat sleeps.", "A cat is asleep.", "Interest rates rose again.", "x"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory):
    known = KnownModel.make(tmp_path_factory.mktemp("ranked"))
    with running(REAL, "--model", str(known.folder)) as server:
        yield server


def ask(server: ServerProcess, path: str, **fields: object) -> httpx.Response:
    return httpx.post(server.url + path, json={"model": "tiny", **fields}, timeout=60)


def cosines(server: ServerProcess, one: str, others: list[str], **fields: object) -> list[float]:
    data = ask(server, "/v1/embeddings", input=[one, *others], **fields).json()["data"]
    first, *rest = (np.array(item["embedding"], np.float64) for item in data)
    return [float(first @ other / np.linalg.norm(first) / np.linalg.norm(other)) for other in rest]


@pytest.mark.parametrize("path", ["/v1/score", "/score"])
def test_one_text_is_compared_with_each_other(server: ServerProcess, path: str) -> None:
    answer = ask(server, path, text_1=TEXTS[0], text_2=TEXTS).json()
    assert [item["score"] for item in answer["data"]] == pytest.approx(cosines(server, TEXTS[0], TEXTS), abs=1e-4)
    assert answer["data"][0]["score"] == pytest.approx(1, abs=1e-4)
    assert [(item["index"], item["object"]) for item in answer["data"]] == [(i, "score") for i in range(len(TEXTS))]
    counted = ask(server, "/v1/embeddings", input=[TEXTS[0], *TEXTS]).json()["usage"]
    assert answer["usage"] == counted


def test_lists_of_one_length_are_compared_in_pairs(server: ServerProcess) -> None:
    scores = ask(server, "/v1/score", text_1=TEXTS[:2], text_2=TEXTS[1:3], pooling="mean").json()["data"]
    pairs = [cosines(server, one, [other], pooling="mean") for one, other in pairwise(TEXTS[:3])]
    assert [item["score"] for item in scores] == pytest.approx([score for (score,) in pairs], abs=1e-4)
    assert len(ask(server, "/v1/score", text_1=TEXTS[0], text_2=TEXTS[1]).json()["data"]) == 1


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank", "/rerank"])
def test_documents_come_in_the_order_of_their_cosines(server: ServerProcess, path: str) -> None:
    wanted = cosines(server, "sleeping cats", TEXTS)
    documents = [TEXTS[0], {"text": TEXTS[1]}, *TEXTS[2:]]
    results = ask(server, path, query="sleeping cats", documents=documents).json()["results"]
    assert [result["index"] for result in results] == sorted(range(len(TEXTS)), key=lambda index: -wanted[index])
    for result in results:
        assert result["relevance_score"] == pytest.approx(wanted[result["index"]], abs=1e-4)
        assert result["document"] == {"text": TEXTS[result["index"]]}
    best = ask(server, path, query="sleeping cats", documents=documents, top_n=2, return_documents=False).json()
    assert [result["index"] for result in best["results"]] == [result["index"] for result in results[:2]]
    assert all(result.keys() == {"index", "relevance_score"} for result in best["results"])


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_1"),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": "a"}, "text_1"),
        ("/v1/score", {"text_1": "a"}, "text_2"),
        ("/v1/score", {"text_1": ["a"] * 1100, "text_2": ["a"] * 1100}, "text_2"),
        ("/v1/score", {"text_1": "a", "text_2": "b", "truncate_prompt_tokens": 1}, "truncate_prompt_tokens"),
        ("/v1/score", {"text_1": "a", "text_2": "word " * 5000}, "text_2"),
        ("/v1/rerank", {"query": "a", "documents": []}, "documents"),
        ("/v1/rerank", {"query": "a", "documents": ["a"] * 2049}, "documents"),
        ("/v1/rerank", {"query": "a", "documents": ["a"], "top_n": 0}, "top_n"),
        ("/v1/rerank", {"query": "", "documents": ["a"]}, "query"),
        ("/v1/rerank", {"documents": ["a"]}, "query"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value,
)
def test_what_cannot_be_compared_is_refused_by_name(
    server: ServerProcess, path: str, fields: dict[str, object], param: str
) -> None:
    answer = ask(server, path, **fields)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_a_long_document_is_named(server: ServerProcess) -> None:
    answer = ask(server, "/v1/rerank", query="a", documents=["a", "word " * 500])
    assert_error(answer, 400, "documents[1]", "context_length_exceeded")
