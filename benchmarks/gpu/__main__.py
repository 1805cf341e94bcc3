"""All targets on one GPU in one table: the device's limits, the engine alone, the server over HTTP.

    python -m benchmarks.gpu                                all but the models that take minutes to load, in ten minutes
    python -m benchmarks.gpu --only limits 0.6b/1 8b/64     these (--list says what there is)
    python -m benchmarks.gpu --profile                      and the kernels of a decoding step of each work

Models have random weights, so nothing is downloaded. Every loaded model has its own process, which frees its memory.
Failures are shown in the table, and the rest continues. If vLLM can be imported, it runs the same workloads.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

from benchmarks.gpu.workloads import BASE_OF, ENGINES, NAMES, PEER, RESULT, ROWS, USUAL_NAMES, WORKS, Row
from benchmarks.support.record import ROOT, write_result

LIMIT_S = 570  # of the whole, so that ten minutes are enough
PROGRAM_LIMIT_S = 240
PEER_LIMIT_S = 900  # vLLM alone takes minutes to start
OURS, THEIRS = "benchmarks.gpu.engine", "benchmarks.peers.vllm_engine"

Results = dict[str, dict[str, Any]]  # work → figures, or {"error": reason}


def run_program(module: str, arguments: list[str], limit_s: float) -> tuple[Results, str]:
    """Run a module until it ends or its time is over; returns its reports, and how it ended.

    It has its own process group, so that its children end with it.
    """
    command = [sys.executable, "-m", module, *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    is_late = threading.Event()

    def end() -> None:
        is_late.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(limit_s, end)
    timer.start()
    results: Results = {}
    try:
        for line in process.stdout:
            if line.startswith(RESULT):
                figures = json.loads(line.removeprefix(RESULT))
                work = figures.pop("work")
                results[work] = figures
                print(work, json.dumps(figures), flush=True)  # the table would be lost if this program were ended
            elif line.strip():
                print(line, end="", flush=True)
        status = process.wait()
    finally:
        timer.cancel()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return results, f"no result within {limit_s:.0f} s" if is_late.is_set() else f"ended with status {status}"


def run_all(module: str, works: list[str], arguments: list[str], deadline_s: float, most_s: float) -> Results:
    """Run works in one process, and the rest after a failure in another."""
    results: Results = {}
    while left := [work for work in works if work not in results]:
        limit_s = min(most_s, deadline_s - time.monotonic())
        if limit_s < 5:
            results |= {work: {"error": "no time left"} for work in left}
            break
        with tempfile.TemporaryDirectory() as folder:
            reported, how = run_program(module, [*arguments, "--folder", folder, *left], limit_s)
        results |= reported
        unreported = [work for work in left if work not in reported]
        if unreported and not any("error" in figures for figures in reported.values()):  # otherwise the error is known
            results[unreported[0]] = {"error": f"{how}; see its output"}
    return results


def by_engine(works: list[str]) -> dict[str, list[str]]:
    engines = {engine: [work for work in works if work in WORKS and WORKS[work].engine == engine] for engine in ENGINES}
    return {engine: mine for engine, mine in engines.items() if mine}


def measure(works: list[str], flags: list[str], deadline_s: float, *, profiles: bool) -> Results:
    """Measure our engine and server."""
    results: Results = {}
    if "limits" in works:
        reported, how = run_program("benchmarks.gpu.limits", flags, PROGRAM_LIMIT_S)
        results |= reported if reported else {"limits": {"error": how}}
    for engine, mine in by_engine(works).items():
        arguments = [*flags, "--engine", engine, *(["--profile"] if profiles else [])]
        results |= run_all(OURS, mine, arguments, deadline_s, PROGRAM_LIMIT_S)
    if over_http := [work for work in works if work != "limits" and work not in WORKS]:
        results |= run_all("benchmarks.gpu.http", over_http, flags, deadline_s, PROGRAM_LIMIT_S)
    add_ratios(results)
    return results


def add_ratios(results: Results) -> None:
    """Add the ratios of speed with adapters to that of the base model."""
    for work, base in BASE_OF.items():
        whole, part = (results.get(name, {}).get("tok_s") for name in (base, work))
        if whole and part:
            results[work]["of_base"] = part / whole


def measure_peer(works: list[str], flags: list[str]) -> Results:
    """Measure vLLM on the works that it supports."""
    results: Results = {}
    for engine, mine in by_engine([work for work in works if work in WORKS]).items():
        comparable = [work for work in mine if not WORKS[work].loads_adapters]
        if ENGINES[engine].quantization == "none" and comparable:
            deadline_s = time.monotonic() + PEER_LIMIT_S
            results |= run_all(THEIRS, comparable, [*flags, "--engine", engine], deadline_s, PEER_LIMIT_S)
    add_ratios(results)
    return results


def print_table(results: Results, theirs: Results) -> None:
    """Print measured figures with target and peer; the last columns only if the peer ran here."""
    print(f"\nThe peer is {PEER}, as noted before. A ratio above 1 is better than it, whatever the unit.\n")
    here = f" {'peer here':>10} {'ratio':>6}" if theirs else ""
    titles = f"{'work':<13} {'unit':<14} {'measured':>10} {'target':>10} {'':<4} {'peer':>8} {'ratio':>6} {'cold s':>7}"
    print(titles + here)
    for row in (row for row in ROWS if row.work in results):
        figures = results[row.work]
        if "error" in figures:
            if row is next(other for other in ROWS if other.work == row.work):
                print(f"{row.work:<13} failed: {figures['error'][:200]}")
        elif (measured := figures.get(row.key)) is not None:
            print(line_of(row, measured, figures) + peer_here(row, measured, theirs.get(row.work, {})))


def line_of(row: Row, measured: float, figures: dict[str, Any]) -> str:
    verdict = ""
    if row.target is not None:
        verdict = "met" if row.is_met(measured) else "miss"
    cold = f"{figures['cold_s']:.1f}" if row.key == "tok_s" and "cold_s" in figures else ""
    return (
        f"{row.work:<13} {row.unit:<14} {number(measured):>10} {number(row.target):>10} {verdict:<4} "
        f"{number(row.peer):>8} {number(row.ratio(measured)):>6} {cold:>7}"
    )


def peer_here(row: Row, measured: float, figures: dict[str, Any]) -> str:
    theirs = figures.get(row.key)
    if not theirs:
        return ""
    return f" {number(theirs):>10} {number(theirs / measured if row.less_is_better else measured / theirs):>6}"


def number(value: float | None) -> str:
    """Four digits, or "" for None."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def print_list() -> None:
    for row in ROWS:
        print(f"{row.work:<13} {row.unit:<14} target {number(row.target):<7} peer {number(row.peer)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=USUAL_NAMES, choices=NAMES, metavar="NAME", help="these works")
    parser.add_argument("--list", action="store_true", help="list all workloads and exit")
    parser.add_argument("--profile", action="store_true", help="also the kernels of decoding steps, without HTTP")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and short prompts, to try the program itself")
    parser.add_argument("--limit-s", type=float, default=LIMIT_S, help="time limit without vLLM")
    parser.add_argument("--no-vllm", action="store_true", help="do not run vLLM, even if installed")
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    if options.list:
        print_list()
        return
    flags = ["--device", options.device, *(["--tiny"] if options.tiny else [])]
    results = measure(options.only, flags, time.monotonic() + options.limit_s, profiles=options.profile)
    has_vllm = importlib.util.find_spec("vllm") is not None and not options.no_vllm
    theirs = measure_peer(options.only, flags) if has_vllm else {}
    print_table(results, theirs)
    if not options.no_record:
        rows = [vars(row) for row in ROWS if row.work in results]
        write_result("gpu", {"peer": PEER, "rows": rows, "results": results, "peer_results": theirs})


if __name__ == "__main__":
    main()
