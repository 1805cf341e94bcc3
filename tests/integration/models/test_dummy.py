"""--load-format dummy: a server of a folder that holds only a config.json."""

import httpx
import pytest

from tests.support.models.adapters import write_adapter
from tests.support.models.byte_transformer import make_model
from tests.support.servers.server_process import REAL, running


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "made-up"
    model = make_model(vocab_size=300)
    model.config.save_pretrained(folder)
    adapters = tmp_path_factory.mktemp("adapters")
    write_adapter(adapters / "a", model, seed=1)
    flags = ["--model", str(folder), "--load-format", "dummy", "--dtype", "bfloat16", "--max-num-seqs", "4"]
    with running(REAL, *flags, "--adapter-dir", str(adapters)) as server:
        yield server.url


def complete(url, **body):
    body = {"model": "made-up", "prompt": [5, 6, 7], "max_tokens": 6, "seed": 1, "ignore_eos": True} | body
    return httpx.post(f"{url}/v1/completions", json=body, timeout=60)


def test_token_ids_are_answered_with_a_text_that_spells_the_tokens(url):
    choice = complete(url, return_token_ids=True).json()["choices"][0]
    assert len(choice["token_ids"]) == 6
    assert choice["text"] == "".join(f" {token_id}" for token_id in choice["token_ids"])
    with httpx.stream("POST", f"{url}/v1/completions", json={"model": "made-up", "prompt": [5], "stream": True}) as r:
        assert len([line for line in r.iter_lines() if '"text"' in line]) > 1


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("v1/completions", {"prompt": "a text"}),
        ("v1/completions", {"prompt": "a text", "echo": True, "max_tokens": 0}),
        ("v1/completions", {"prompt": "a long text " * 10_000}),
        ("v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
        ("v1/responses", {"input": "hi"}),
        ("v1/embeddings", {"input": "a text"}),
        ("tokenize", {"prompt": "a text"}),
        ("tokenize", {"messages": [{"role": "user", "content": "hi"}]}),
    ],
)
def test_a_text_is_refused_with_one_sentence_that_says_why(url, route, body):
    answer = httpx.post(f"{url}/{route}", json={"model": "made-up"} | body, timeout=60)
    assert answer.status_code == 400
    assert answer.json()["error"] == {
        "message": "This model has no tokenizer; give the prompt as token ids.",
        "type": "invalid_request_error",
        "param": None,
        "code": None,
    }


def test_the_weights_say_that_they_are_random(url):
    (card, _) = httpx.get(f"{url}/v1/models").json()["data"]
    assert card["content_hash"].startswith("dummy-")
    assert httpx.post(f"{url}/detokenize", json={"tokens": [7, 299]}).json() == {"prompt": " 7 299"}


def test_an_adapter_works_on_random_weights(url):
    """Greedy, so the adapter's own file must change the answer."""
    base, adapted = (complete(url, model=name, temperature=0).json() for name in ("made-up", "a"))
    assert base["choices"][0]["text"] != adapted["choices"][0]["text"]


@pytest.mark.slow
def test_without_a_tokenizer_and_without_the_flag_the_server_does_not_start(tmp_path):
    make_model().config.save_pretrained(tmp_path)
    with pytest.raises(AssertionError, match="has no weights"), running(REAL, "--model", str(tmp_path)):
        pass
