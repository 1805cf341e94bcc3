"""Fields that choose an adapter, LoRAX's or for a mix of several, on every route that takes a model."""

import httpx
import pytest

from tests.support.servers.server_process import FAKE_MODEL, ServerProcess

MESSAGES = [{"role": "user", "content": "hi"}]
BODIES = {
    "/v1/completions": {"prompt": "hi"},
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/responses": {"input": "hi"},
    "/v1/embeddings": {"input": "hi"},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 1},
}


def post(server: ServerProcess, route: str, **fields: object) -> httpx.Response:
    return httpx.post(server.url + route, json={"model": FAKE_MODEL, **BODIES[route], **fields})


@pytest.mark.parametrize("route", BODIES)
def test_adapter_id_is_the_model_that_is_asked(fake_server: ServerProcess, route: str):
    absent = post(fake_server, route, adapter_id="pirate")
    assert absent.status_code == 404 and "'pirate' does not exist" in absent.json()["error"]["message"]
    for fields in ({"adapter_id": None}, {"adapter_source": "local"}, {"adapter_source": None}):
        assert post(fake_server, route, **fields).status_code == 200


@pytest.mark.parametrize("route", BODIES)
def test_a_mix_is_the_model_that_is_asked(fake_server: ServerProcess, route: str):
    scaled = [{"name": "pirate"}, {"name": "bard@01234567", "scale": 0.5}]
    for fields, said in (
        ({"model": "pirate+bard"}, "bard+pirate"),
        ({"adapters": scaled}, "bard@01234567+pirate"),
        ({"model": "pirate+bard@01234567", "adapters": scaled, "adapter_scale": 2}, "bard@01234567+pirate"),
    ):
        absent = post(fake_server, route, **fields)
        assert absent.status_code == 404 and f"'{said}' does not exist" in absent.json()["error"]["message"]
    assert post(fake_server, route, adapters=None).status_code == 200


@pytest.mark.parametrize("route", BODIES)
@pytest.mark.parametrize(
    ("fields", "field", "said"),
    [
        ({"model": "pirate", "adapter_id": "other"}, "adapter_id", "name two adapters"),
        ({"model": "pirate", "adapter_id": FAKE_MODEL}, "adapter_id", "name two adapters"),
        ({"adapter_id": ""}, "adapter_id", "at least 1 character"),
        ({"adapter_id": "x" * 257}, "adapter_id", "at most 256 characters"),
        ({"adapter_id": 5}, "adapter_id", "string"),
        ({"model": "pirate+bard+pirate"}, "model", "names the adapter 'pirate' twice"),
        ({"adapters": [{"name": "pirate", "scale": -1}]}, "adapters[0].scale", "greater than or equal to 0"),
        ({"adapter_source": "hub"}, "adapter_source", "must be 'local'"),
        ({"adapter_source": 1}, "adapter_source", "must be 'local'"),
        ({"adapter_source": ["local"]}, "adapter_source", "must be 'local'"),
    ],
)
def test_contradictions_and_other_sources_are_refused(
    fake_server: ServerProcess, route: str, fields: dict[str, object], field: str, said: str
):
    response = post(fake_server, route, **fields)
    message = response.json()["error"]["message"]
    assert response.status_code == 400 and field in message and said in message, message
