"""`stellarbyte bench` against a real server on a tiny model: what it reports is what the server counted."""

import asyncio
import json
from pathlib import Path

import httpx
import pytest

from stellarbyte_client.address import Address
from stellarbyte_client.terminal.bench import make_row
from stellarbyte_client.terminal.load import LoadGenerator, Outcome, Work, percentiles_ms
from tests.support.clients.terminal import CTRL_C, Terminal
from tests.support.servers.server_process import ServerProcess
from tests.terminal.command import Adapted, Command, Result
from tests.terminal.failing_server import Prepared, answering

SIZES = ["--requests", "6", "--prompt-tokens", "20", "--max-tokens", "10"]


def counted(server: ServerProcess) -> list[float]:
    names = ["vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:prefix_cache_hits_total"]
    return [server.metric(name) for name in names]


def test_rows_and_json_agree_with_the_servers_metrics(stellarbyte: Command, adapted: Adapted, tmp_path: Path) -> None:
    server, file = adapted.server, tmp_path / "bench.json"
    before = counted(server)
    result = stellarbyte(
        "bench", "--url", server.url, "--model", "tiny,a0,a1", "--streams", "1,3", *SIZES, "--json", str(file)
    )
    assert result.status == 0, result.err
    prompt_tokens, tokens, hits = (now - then for now, then in zip(counted(server), before, strict=True))
    content = json.loads(file.read_text())
    assert content["models"] == ["tiny", "a0", "a1"]
    assert content["command"].startswith(f"stellarbyte bench --url {server.url} --streams 1,3 --model tiny,a0,a1")
    assert content["server_version"] == httpx.get(f"{server.url}/version").json()["version"]
    rows = content["rows"]
    assert [(row["streams"], row["requests"], row["errors"], row["tokens"]) for row in rows] == [
        (1, 6, {}, 60),
        (3, 6, {}, 60),
    ]
    assert tokens == sum(row["tokens"] + row["warm_up_tokens"] for row in rows)
    assert prompt_tokens == 20 * sum(row["requests"] + row["warm_up_requests"] for row in rows)
    assert hits == 0  # every prompt was new
    for row in rows:
        assert row["tokens_per_s"] == pytest.approx(row["tokens"] / row["wall_s"], rel=0.05)
        for p50_ms, p99_ms in (row["ttft_ms"], row["itl_ms"]):
            assert 0 <= p50_ms < 1e3 * row["wall_s"]
            assert p99_ms is None  # of less than 100 values
    shown = [line.split() for line in result.out.splitlines()]
    assert [words[:3] for words in shown if len(words) == 8 and words[0].isdigit()] == [
        ["1", "6", "0"],
        ["3", "6", "0"],
    ]
    assert any(words[:2] == ["3", "streams"] and words[-1] == "tokens/s" for words in shown)


def test_each_stream_takes_the_next_model(stellarbyte: Command, adapted: Adapted) -> None:
    def requests() -> dict[str, int]:
        entries = httpx.get(f"{adapted.server.url}/v1/adapters").json()["data"]
        return {entry["id"]: entry["requests"] for entry in entries}

    before = requests()
    options = ["--model", "a0,tiny", "--streams", "4", "--requests", "4", "--max-tokens", "5", "--prompt-tokens", "5"]
    assert stellarbyte("bench", "--url", adapted.server.url, *options).status == 0
    after = requests()
    assert after["a0"] - before["a0"] >= 4  # two streams: a warm-up request each, and at least one more
    assert after["a1"] == before["a1"]


def test_progress_is_shown_while_it_runs(adapted: Adapted, tmp_path: Path) -> None:
    with Terminal("bench", "--url", adapted.server.url, "--streams", "2", *SIZES, home=tmp_path) as terminal:
        assert terminal.wait_end() == 0
        assert b"0/6" in terminal.raw
        assert "6/6" not in terminal.text  # the bar has gone
        assert "2 streams █" in terminal.text


def test_errors_are_counted_by_message_and_make_the_status_1(stellarbyte: Command, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    with answering(Prepared.error(429, "The queue is full.")) as url:
        result = stellarbyte("bench", "--url", url, "--streams", "2", *SIZES, "--json", str(file))
    assert result.status == 1
    assert "6 × The queue is full." in result.out
    (row,) = json.loads(file.read_text())["rows"]
    assert (row["errors"], row["tokens"], row["ttft_ms"]) == ({"The queue is full.": 6}, 0, [None, None])


def test_a_file_that_cannot_be_written_is_told_before_anything_is_measured(
    stellarbyte: Command, tmp_path: Path
) -> None:
    received: list[bytes] = []
    with answering(Prepared.whole_stream(), received) as url:
        result = stellarbyte("bench", "--url", url, *SIZES, "--streams", "2", "--json", str(tmp_path))
    said = f"error: {tmp_path} cannot be written: Is a directory.\n"
    assert (result, received) == (Result(1, "", said), [])


def test_ctrl_c_keeps_the_rows_that_were_measured(tmp_path: Path) -> None:
    file, stream = tmp_path / "bench.json", Prepared.whole_stream({"usage": {"completion_tokens": 7}})
    options = ["--streams", "1,2", "--requests", "2", "--json", str(file)]
    with answering(stream, most_answers=3) as url:  # one to warm up, two that are measured
        with Terminal("bench", "--url", url, *options, home=tmp_path) as terminal:
            terminal.wait_for("^2 streams .* 0/2").type(CTRL_C)
            assert terminal.wait_end() == 130
    (row,) = json.loads(file.read_text())["rows"]
    assert (row["streams"], row["tokens"]) == (1, 14)
    assert "1 stream " in terminal.text and "Traceback" not in terminal.text


def test_more_streams_than_requests_are_refused(stellarbyte: Command) -> None:
    result = stellarbyte("bench", "--url", "http://127.0.0.1:1", "--streams", "8", "--requests", "4")
    said = "error: --requests must be at least the number of streams; 4 is less than 8.\n"
    assert result == Result(1, "", said)


def test_figures_are_of_requests_that_ended_well() -> None:
    good = Outcome(sent_at_s=1.0, event_times_s=[1.5, 1.6, 1.8], tokens=5)
    silent = Outcome(sent_at_s=1.0, tokens=3)
    failed = Outcome(sent_at_s=1.0, event_times_s=[9.0], tokens=99, error="no")
    row = make_row(3, [good, silent, failed], 2.0, [good])
    assert (row.tokens, row.tokens_per_s, row.errors) == (8, 4.0, {"no": 1})
    assert row.ttft_ms == [500.0, None]
    assert row.itl_ms == [100.0, None]
    assert row.tpot_ms == [75.0, None]  # 0.3 s for the four tokens after the first event
    assert (row.warm_up_requests, row.warm_up_tokens) == (1, 5)


def test_a_percentile_is_the_least_value_that_so_many_are_not_above() -> None:
    def of(count: int) -> list[float | None]:
        return percentiles_ms([i / 1000 for i in range(count, 0, -1)])

    assert of(200) == [100.0, 198.0]
    assert of(101) == [51.0, 100.0]
    assert of(100) == [50.0, 99.0]
    assert of(99) == [50.0, None]  # it would be the largest
    assert of(1) == [1.0, None]
    assert of(0) == [None, None]


def outcome_of(prepared: Prepared, received: list[bytes] | None = None, *, needs_done: bool = True) -> Outcome:
    """The outcome of one request to a server with this answer."""
    with answering(prepared, received) as url:
        load = LoadGenerator(Address.of(url, None, None, 60), needs_done=needs_done)
        work = Work(models=["m"], prompt_tokens=2, max_tokens=3)
        (outcome,) = asyncio.run(load.run(work, streams=1, requests=[0]))
    return outcome


@pytest.mark.parametrize(
    ("prepared", "needs_done", "error"),
    [
        (Prepared.stream({"usage": {"completion_tokens": 3}}), True, "The answer broke off."),
        (Prepared.stream({"usage": {"completion_tokens": 3}}), False, None),
        (Prepared.whole_stream({"choices": []}), True, "The server's usage counts no tokens."),
        (Prepared.stream({"error": {"message": "The engine died."}}), True, "The engine died."),
        (Prepared(200, "", {"Content-Length": "9"}), True, "The answer is not valid HTTP: "),
        (Prepared(200, "data: {\n"), True, "The answer is not that of an OpenAI-compatible server: "),
    ],
)
def test_an_incomplete_answer_is_an_error(prepared: Prepared, needs_done: bool, error: str | None) -> None:
    outcome = outcome_of(prepared, needs_done=needs_done)
    assert outcome.error == error or (error is not None and (outcome.error or "").startswith(error))


def test_tokens_without_text_are_timed() -> None:
    """The first bytes of a character, and an end of the answer, are tokens that give no text."""
    choices = [{"text": "", "token_ids": [7]}, {"text": "é", "token_ids": [8]}, {"text": "", "token_ids": [2]}]
    usage = {"choices": [], "usage": {"completion_tokens": 3}}
    stream = Prepared.whole_stream(*({"choices": [choice]} for choice in choices), usage)
    received: list[bytes] = []
    outcome = outcome_of(stream, received)
    assert (outcome.error, outcome.tokens, len(outcome.event_times_s)) == (None, 3, 3)
    assert json.loads(received[0])["return_token_ids"] is True  # else no server tells
