"""The programs that measure: what they count is what was sent, and what they check can fail."""

import hashlib
import json
import subprocess
import sys

import pytest

from benchmarks import endless
from benchmarks.endless import broken_bounds
from benchmarks.quality import CORPUS
from stellarbyte_server.config.settings import EngineSettings
from stellarbyte_server.engine.start.load import build_core
from tests.support.servers.server_process import ROOT


def run_loadgen(url: str, *flags: str) -> dict:
    command = [sys.executable, "-m", "benchmarks.loadgen", "--url", url, "--model", "fake", "--vocab", "120", *flags]
    return json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)


@pytest.mark.parametrize("flags", [[], ["--chat"], ["--text"], ["-p", "2"], ["--lenient"]])
def test_loadgen_counts_every_token_of_every_stream(fake_server, flags):
    figures = run_loadgen(fake_server.url, "-n", "6", "-c", "3", "--output-tokens", "20", *flags)
    assert (figures["errors"], figures["out_tokens"]) == (0, 120), figures["why"]
    assert 0 < figures["ttft_ms"][0]
    assert figures["ttft_ms"][1] is None  # of less than 100 values
    assert 0 < figures["tok_s"]


def test_loadgen_counts_a_refused_request_as_an_error_and_says_why(fake_server):
    figures = run_loadgen(fake_server.url, "-n", "2", "-c", "2", "--prompt-tokens", "5000")
    assert (figures["errors"], figures["out_tokens"], figures["tok_s"]) == (2, 0, 0)
    assert "The prompt has 5000 tokens" in figures["why"]


def test_the_way_to_the_socket_loses_no_token():
    command = ["benchmarks.http_path", "--no-record", "--streams", "8", "--tokens-per-s", "800", "--seconds", "1"]
    output = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=True, capture_output=True, text=True)
    run = json.loads(output.stdout)
    assert 0 < run["tokens_per_s"] < 1000
    assert 0 < run["age_ms_p50"] <= run["age_ms_p99"] <= run["age_ms_max"]


def test_the_engines_own_work_is_measured_in_its_parts():
    command = ["benchmarks.engine", "--no-record", "--sequences", "3", "--steps", "5", "--prompt-tokens", "4"]
    output = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=True, capture_output=True, text=True)
    parts = json.loads(output.stdout.splitlines()[-1])["ms_per_step"]
    assert parts["all_but_runner"] >= parts["text"] > 0


def rows_of_a_stream(resident_mib: list[float], ms: list[float]) -> list[dict]:
    pairs = zip(resident_mib, ms, strict=True)
    return [{"resident_mib": memory, "ms_per_token_median": time_ms} for memory, time_ms in pairs]


def test_an_endless_streams_samples_are_compared_with_the_oracle():
    """The samples once hung on a call that the engine did not make any more: there were none."""
    with endless._model("tiny") as model:
        settings = EngineSettings(model=model, max_num_seqs=1, sliding_window=32, sink_tokens=4)
        core, _ = build_core(settings)
        samples = endless.keep_samples(core, 50)
        _, token_ids = endless.measure(core, 200)
        assert list(samples) == [99, 149, 199, 249]
        assert endless.largest_error(settings, token_ids[:-1], samples) < 1e-4
        samples[149] = samples[149] + 1e-3
        assert endless.largest_error(settings, token_ids[:-1], samples) > 5e-4


def test_an_endless_stream_may_neither_grow_nor_slow_down_nor_drift():
    assert broken_bounds(rows_of_a_stream([300, 400, 410, 419], [9, 1, 2, 2.2]), 1e-5) == []
    assert "25.0 MiB" in broken_bounds(rows_of_a_stream([300, 400, 425, 401], [2, 2, 2, 2]), 0)[0]
    assert "2.4 ms at last" in broken_bounds(rows_of_a_stream([400] * 5, [2, 2, 2, 2, 2.4]), 0)[0]
    assert "3.0e-04" in broken_bounds(rows_of_a_stream([400] * 4, [2] * 4), 3e-4)[0]


def test_the_text_of_the_quality_benchmark_is_that_of_the_documented_figures():
    """Perplexities of different texts do not compare."""
    digest = hashlib.sha256(CORPUS.read_bytes()).hexdigest()
    assert digest == "a16bdfd734e35c31f2771199fcf4d7abb294cee0ec646c2b93dd9b6282e206fc"
