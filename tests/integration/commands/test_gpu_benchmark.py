"""benchmarks.gpu: what it counts is what was generated, and a part that fails does not take the others along."""

import json
import re
import subprocess
import sys
import time

import pytest

from benchmarks.gpu.__main__ import run_all
from benchmarks.gpu.engine import Run
from benchmarks.gpu.profile import busy_us
from benchmarks.gpu.workloads import ROWS, WORKS
from stellarbyte_server.protocol.messages import Delta
from tests.support.servers.server_process import ROOT


def run_tiny(*flags: str) -> str:
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--tiny", "--no-record", "--no-vllm", *flags]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def figures_of(table: str, work: str) -> list[float]:
    """The measured column of a work's rows; every unit ends with a letter."""
    lines = [line for line in table.splitlines() if line.startswith(f"{work} ")]
    return [float(re.search(r"[a-zA-Z0-9] {2,}([\d.,]+)", line)[1].replace(",", "")) for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("works", [["8b/64-lora32"], ["limits", "8b/64-lora32", "8b/load32"]], ids=["one", "three"])
def test_a_model_that_cannot_be_had_is_told_and_the_others_are_measured(works):
    table = run_tiny("--only", *works, "8b-int8/1")
    for work in works:
        figures = figures_of(table, work)
        assert figures and all(figure > 0 for figure in figures), table
    assert re.search(r"8b-int8/1 +failed: StartupError: --quantization int8 ", table)


@pytest.mark.slow
def test_the_server_is_started_and_measured_over_http():
    table = run_tiny("--only", "0.6b/start", "0.6b/http-64")
    (start_s,), (tok_s,) = figures_of(table, "0.6b/start"), figures_of(table, "0.6b/http-64")
    assert 0.5 < start_s < 120 and tok_s > 1


@pytest.mark.slow
def test_a_profile_names_what_a_step_runs_and_how_often():
    table = run_tiny("--profile", "--only", "0.6b/64")
    launches = {line.split()[-1]: float(line.split()[2]) for line in table.splitlines() if "aten::" in line}
    assert launches["aten::linear"] >= 15  # seven of each of two layers, and the head
    assert re.search(r"[\d.]+ us a step with.*\n\d+\.\d% of it the device was idle", table)


@pytest.mark.slow
def test_the_kernels_of_experts_are_measured_and_their_bytes_counted():
    command = [sys.executable, "-m", "benchmarks.gpu.moe_kernels", "--device", "cpu", "--tiny", "--no-record"]
    pytest.importorskip("triton", reason="Triton is not installed")
    table = subprocess.run([*command, "--tokens", "3"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    tokens, experts, megabytes = (float(cell) for cell in table.splitlines()[-1].split()[:3])
    assert tokens == 3 and 2 <= experts <= 8
    assert megabytes == pytest.approx((experts * 3 * 64 * 32 * 4 + 8 * 64 * 2) / 1e6, abs=0.06)
    assert all(name in table for name in ("gate_up", "down", "combine", "routing"))


@pytest.mark.slow
@pytest.mark.parametrize("sweeps", [False, True])
def test_products_of_quantized_weights_are_measured(sweeps: bool):
    pytest.importorskip("triton", reason="Triton is not installed")
    command = [sys.executable, "-m", "benchmarks.gpu.quantized", "--device", "cpu", "--tiny", "--no-record"]
    options = [
        "--rows",
        "1",
        "3",
        "--parts",
        "qkv",
        "--forms",
        "int8",
        "int4/64",
        *(["--sweep", "1"] if sweeps else []),
    ]
    table = subprocess.run([*command, *options], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    rows = [line.split() for line in table.splitlines()]
    for form in ("int8", "int4/64"):
        assert [row[2] for row in rows if row[:2] == [form, "qkv"] and row[-1] == "served"] == ["1", "3"]
    for variant in ("norm apart", "vector (8, 2, 64, 8)", "rows (8, 16, 4, 4, 4, 1)"):
        assert (variant in table) == sweeps


FAULTY = """
import json, sys, time
for work in sys.argv[sys.argv.index("--folder") + 2 :]:
    if work == "crashes":
        sys.exit(3)
    if work == "hangs":
        time.sleep(600)
    if work == "fails":
        print("RESULT " + json.dumps({"work": work, "error": "it says why"}), flush=True)
        sys.exit(1)
    print("noise")
    print("RESULT " + json.dumps({"work": work, "tok_s": 1}), flush=True)
"""


def test_a_work_that_crashes_or_hangs_costs_only_itself(tmp_path, monkeypatch):
    (tmp_path / "faulty_program.py").write_text(FAULTY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    results = run_all(
        "faulty_program", ["a", "fails", "b", "crashes", "hangs", "c"], [], time.monotonic() + 60, most_s=6
    )
    assert [results[work] for work in "abc"] == [{"tok_s": 1}] * 3
    assert results["fails"]["error"] == "it says why"
    assert "ended with status 3" in results["crashes"]["error"]
    assert "no result within 6 s" in results["hangs"]["error"]
    assert run_all("faulty_program", ["a"], [], time.monotonic(), 6) == {"a": {"error": "no time left"}}


def test_every_row_names_a_work_and_every_work_of_the_engine_has_a_row():
    assert {row.work for row in ROWS} >= WORKS.keys()
    json.dumps([vars(row) for row in ROWS])


@pytest.mark.parametrize(("less_is_better", "ratio"), [(False, 2), (True, 0.5)])
def test_a_ratio_above_one_is_better_than_the_peer(less_is_better, ratio):
    row = next(row for row in ROWS if row.peer is not None and row.less_is_better == less_is_better)
    assert row.ratio(2 * row.peer) == ratio


def test_tokens_are_counted_with_the_times_they_came_at():
    run = Run(started_s=0.0)
    for arrived_s, num_tokens in [(1.0, 1), (2.0, 1), (2.5, 2), (4.5, 0), (5.0, 4)]:
        run.note([Delta(request_id="a", text="", num_tokens=num_tokens)])
        run.arrivals["a"][-1] = (arrived_s, num_tokens)
    assert run.num_tokens == 8
    assert run.second_half_tok_s() == 4 / 2.5  # from the fourth token on
    assert run.longest_gap_s(0, 10) == 2.0
    assert run.longest_gap_s(0, 2.4) == 1.0
    assert run.longest_gap_s(0, 0.5) == 0.0
    with pytest.raises(RuntimeError, match="it broke"):
        run.note([Delta(request_id="a", text="", num_tokens=0, finish_reason="error", error="it broke")])


def test_a_device_is_busy_while_any_kernel_runs():
    assert busy_us([(5, 6), (0, 2), (1, 3), (1, 2), (5, 6)]) == 4
