"""A fine-tune whose tokenizer got a token that its embedding has no row for: it serves, and the token is refused."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tokenizers import AddedToken, Tokenizer

from stellarbyte.checkpoint.convert import convert
from stellarbyte.cli.main import main
from tests.support.models.hugging_face import tiny_llama
from tests.support.servers.server_process import REAL, ServerProcess, running

ROWS = 280
PAD = "[PAD]"  # as in fine-tunes of Llama 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parent = tmp_path_factory.mktemp("unembeddable")
    source = tiny_llama(parent / "hf", vocab_size=ROWS, head_dim=16)
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(PAD, special=True)])
    assert tokenizer.token_to_id(PAD) == ROWS
    tokenizer.save(str(source / "tokenizer.json"))
    generation = json.loads((source / "generation_config.json").read_text())
    (source / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": [2, ROWS, -1]}))
    return convert(source, parent / "tiny")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ServerProcess]:
    with running(REAL, "--model", str(folder), "--served-model-name", "tiny") as server:
        yield server


def post(server: ServerProcess, path: str, **fields: Any) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=fields, timeout=60)


TEXTS: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/completions", {"prompt": f"a {PAD}"}, "prompt"),
    ("/v1/completions", {"prompt": ["a", f"{PAD}a" * 50]}, "prompt"),
    ("/v1/completions", {"prompt": PAD, "echo": True, "max_tokens": 0}, "prompt"),
    ("/v1/completions", {"prompt": PAD, "echo": True, "logprobs": 1}, "prompt"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": f"a {PAD}"}]}, "messages"),
    ("/v1/chat/completions", {"messages": [{"role": "system", "content": PAD}], "stream": True}, "messages"),
    ("/v1/responses", {"input": PAD}, "input"),
    ("/v1/embeddings", {"input": ["a", PAD]}, "input"),
    ("/tokenize", {"prompt": PAD}, "prompt"),
    ("/tokenize", {"messages": [{"role": "user", "content": PAD}]}, "messages"),
]
IDS: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/completions", {"prompt": [1, ROWS]}, "prompt"),
    ("/v1/completions", {"prompt": [[1], [ROWS]]}, "prompt"),
    ("/v1/embeddings", {"input": [1, ROWS]}, "input"),
    ("/v1/embeddings", {"input": [[1], [ROWS]]}, "input"),
    ("/v1/completions", {"prompt": "a", "logit_bias": {str(ROWS): 1}}, "logit_bias"),
    ("/v1/completions", {"prompt": "a", "stop_token_ids": [ROWS]}, "stop_token_ids"),
    ("/detokenize", {"tokens": [ROWS]}, "tokens"),
]


@pytest.mark.parametrize(("path", "fields", "param"), TEXTS)
def test_a_text_with_the_token_is_refused_by_its_name(
    server: ServerProcess, path: str, fields: dict[str, Any], param: str
) -> None:
    response = post(server, path, model="tiny", **fields)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error")
    assert f"'{PAD}' (id {ROWS})" in error["message"]


@pytest.mark.parametrize(("path", "fields", "param"), IDS)
def test_an_id_without_a_row_is_refused_wherever_it_is_given(
    server: ServerProcess, path: str, fields: dict[str, Any], param: str
) -> None:
    response = post(server, path, model="tiny", **fields)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param) and str(ROWS) in error["message"]


def test_everything_else_is_served_and_the_log_names_what_is_not(server: ServerProcess) -> None:
    """min_tokens bans the ends, of which generation_config.json names one without a row; a grammar shows them."""
    for fields in ({"min_tokens": 3}, {"min_tokens": 3, "temperature": 0}, {"logprobs": 1}, {"stop_token_ids": [5]}):
        answer = post(server, "/v1/completions", model="tiny", prompt="a", max_tokens=6, **fields)
        assert answer.status_code == 200, answer.text
    schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": [1, 12, 123]}}}
    chat = {"messages": [{"role": "user", "content": "a"}], "response_format": schema, "max_tokens": 20}
    answer = post(server, "/v1/chat/completions", model="tiny", **chat).json()
    assert json.loads(answer["choices"][0]["message"]["content"]) in (1, 12, 123)
    log = server.log()
    assert f"'{PAD}'. Texts with one of them are refused." in log and f"eos_token_id [-1, {ROWS}]" in log
    assert "makes steps fail" not in log and "Traceback" not in log


@pytest.mark.slow
def test_a_template_that_writes_the_token_is_refused_by_its_name(folder: Path, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(f"{PAD}{{{{ messages[0]['content'] }}}}")
    flags = ("--model", str(folder), "--served-model-name", "tiny", "--chat-template", str(template))
    with running(REAL, *flags) as server:
        for path in ("/v1/chat/completions", "/tokenize"):
            response = post(server, path, model="tiny", messages=[{"role": "user", "content": "a"}])
            assert response.status_code == 400 and f"'{PAD}'" in response.json()["error"]["message"]


def test_converting_it_says_what_cannot_be_read_and_generating_with_it_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    convert(folder.parent / "hf", tmp_path / "again")
    assert f"280 rows in its embedding, has none: '{PAD}'" in caplog.text
    assert main(["generate", str(folder), f"a {PAD}", "--raw"]) == 1
    assert f"the token '{PAD}' (id {ROWS})" in capsys.readouterr().err
