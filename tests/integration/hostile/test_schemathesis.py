"""The server keeps to its own document, whatever is sent: thousands of right and wrong requests made from it."""

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis import GenerationMode, checks
from schemathesis.config import (
    CheckConfig,
    ChecksConfig,
    GenerationConfig,
    ProjectConfig,
    ProjectsConfig,
    SchemathesisConfig,
)
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from stellarbyte_server.api.contract.openapi import make_document
from stellarbyte_server.api.contract.operation import Operation
from stellarbyte_server.api.endpoints import OPERATIONS
from tests.support.servers.server_process import FAKE_MODEL as MODEL
from tests.support.servers.server_process import ServerProcess

CHECKS = [
    checks.not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
# Of each operation, beside those at the edges of what the document allows.
MAX_EXAMPLES = min(100, 2 * settings().max_examples)
MIN_CASES = 20 * MAX_EXAMPLES
_SMALL = {"max_tokens": 4, "max_completion_tokens": 4, "max_output_tokens": 4, "n": 2, "best_of": 2}

_PLAIN = {
    "model": MODEL,
    "prompt": "ab",
    "messages": [{"role": "user", "content": "hi"}],
    "input": "ab",
    "text_1": "ab",
    "text_2": ["ab", "cd"],
    "query": "ab",
    "documents": ["ab", {"text": "cd"}],
    "tokens": [104, 105],
}

statuses: Counter[tuple[str, str, int, str]] = Counter()


_REJECTED = CheckConfig(expected_statuses=["400", "404", "405", "413"])
_PROJECT = ProjectConfig(
    generation=GenerationConfig(deterministic=True),
    checks=ChecksConfig(negative_data_rejection=_REJECTED),
    max_stream_events=10_000,  # it would read no more of an answer; how many a stream has depends on timing
)
_CONFIG = SchemathesisConfig(seed=1, projects=ProjectsConfig(default=_PROJECT))
_DOCUMENT = make_document(OPERATIONS, MODEL, allows_unknown_fields=False)
schema = schemathesis.openapi.from_dict(_DOCUMENT, config=_CONFIG)


@pytest.fixture(scope="module")
def session() -> Iterator[requests.Session]:
    with requests.Session() as session:
        yield session


def test_the_server_gives_the_document_that_it_is_held_to(fake_server: ServerProcess) -> None:
    assert httpx.get(f"{fake_server.url}/openapi.json").json() == _DOCUMENT


def _test_of(method: str, path: str) -> Callable[..., None]:
    @schema.include(method=method.upper(), path=path).parametrize()
    @settings(max_examples=MAX_EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    def test(case: schemathesis.Case, fake_server: ServerProcess, session: requests.Session) -> None:
        """The server keeps to its document."""
        _let_it_run(case)
        response = case.call(base_url=fake_server.url, session=session, timeout=30)
        kind = response.headers.get("content-type", [""])[0].partition(";")[0]
        statuses[case.method.lower(), case.path, response.status_code, kind] += 1
        case.validate_response(response, checks=CHECKS, excluded_checks=_not_said_by(case))
        if kind == "text/event-stream":
            _check_events(OPERATIONS[case.method.lower(), case.path], response.text)

    return test


def _not_said_by(case: schemathesis.Case) -> list[Any]:
    """What says nothing about this request: a form has no way to send the empty list that its body was given."""
    is_form = case.media_type == "multipart/form-data" and isinstance(case.body, dict)
    return [negative_data_rejection] if is_form and [] in case.body.values() else []


# A function each: schemathesis gives all tests of one function the same id, and of those pytest-xdist runs one.
for _method, _path in OPERATIONS:
    globals()[f"test_{_method}_{re.sub('[^a-z0-9]+', '_', _path).strip('_')}"] = _test_of(_method, _path)


def _check_events(operation: Operation, text: str) -> None:
    assert operation.event is not None
    data = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert (data[-1] == "[DONE]") == operation.ends_with_done
    for content in data[:-1] if operation.ends_with_done else data:
        operation.event.model_validate_json(content)


def _let_it_run(case: schemathesis.Case) -> None:
    """Ask for the model that is served, and for few tokens, where the document allows what there is instead.

    Hardly any right body made of everything the document allows can run: fields ask for things that exclude each other.
    So most of the right ones keep but a few fields, and are about a prompt that has an answer.
    """
    body = case.body
    if not isinstance(body, dict):
        return
    if isinstance(body.get("model"), str) and len(body["model"]) % 4:
        body["model"] = MODEL
    for name, small in _SMALL.items():
        value = body.get(name)
        if isinstance(value, int) and value > small:
            body[name] = small
    choice = random.Random(repr(body))
    if case.meta is None or case.meta.generation.mode is not GenerationMode.POSITIVE or choice.random() < 0.3:
        return
    for name in [name for name in body if name not in _PLAIN and choice.random() < 0.7]:
        del body[name]
    for name in body.keys() & _PLAIN.keys():
        body[name] = _PLAIN[name]
    if OPERATIONS[case.method.lower(), case.path].event is not None:
        body["max_output_tokens" if case.path == "/v1/responses" else "max_tokens"] = choice.randint(1, 4)
        body["stream"] = choice.choice([True, False, None])


def test_that_was_much_and_not_all_of_it_was_refused() -> None:
    assert statuses.total() >= MIN_CASES
    answered: Counter[tuple[str, str]] = Counter()
    streamed: Counter[tuple[str, str]] = Counter()
    for (method, path, status, kind), count in statuses.items():
        if status == 200:
            answered[method, path] += count
            streamed[method, path] += count if kind == "text/event-stream" else 0
    for row, operation in OPERATIONS.items():
        # The fake engine has no adapters and its server neither fine-tuning nor feedback, and nobody knows the id of a
        # file.
        is_off = any(name in row[1] for name in ("lora", "fine_tuning", "feedback"))
        is_known = not is_off and row != ("post", "/v1/batches")
        if is_known and not operation.path_parameters:
            assert answered[row] >= (MAX_EXAMPLES // 6 if operation.bodies else 1), row
        if is_known and operation.event is not None:
            assert streamed[row] >= MAX_EXAMPLES // 12, row
