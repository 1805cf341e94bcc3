"""GET /health and /ready of one HTTP process, over what its engine client says."""

from types import SimpleNamespace

import pytest
from fastapi.testclient import TestClient

from tests.support.application import make_app


@pytest.mark.parametrize(
    ("wrong", "is_draining", "statuses"),
    [
        (None, False, {"/health": 200, "/ready": 200}),
        (None, True, {"/health": 200, "/ready": 503}),
        ("It stands still.", False, {"/health": 503, "/ready": 503}),
    ],
)
def test_health_is_of_the_engine_and_readiness_of_the_server(wrong, is_draining, statuses) -> None:
    client = SimpleNamespace(health=lambda: wrong, is_admitting=not is_draining, degradation=lambda: None)
    with TestClient(make_app(client), base_url="http://127.0.0.1") as http:
        for path, status in statuses.items():
            answer = http.get(path)
            assert answer.status_code == status
            if status == 503:
                error = answer.json()["error"]
                assert error["type"] == "server_error"
                assert error["code"] == ("shutting_down" if is_draining else "engine_unavailable")
                assert error["message"] == wrong or is_draining
                assert answer.headers["retry-after"]


def test_a_server_with_fewer_replicas_is_healthy_and_says_so() -> None:
    client = SimpleNamespace(health=lambda: None, is_admitting=True, degradation=lambda: "1 of 2 replicas serve.")
    with TestClient(make_app(client), base_url="http://127.0.0.1") as http:
        answer = http.get("/health")
        assert (answer.status_code, answer.json()) == (
            200,
            {"status": "degraded", "message": "1 of 2 replicas serve."},
        )
        assert http.get("/ready").json() == {"status": "ready"}
