"""Benchmarks of this commit beside an older one's, in turn on one machine.

    python -m benchmarks.compare_commits b286c11 engine http_path serve --rounds 3

Both commits are checked out into folders of their own, and every round runs each benchmark in both, the older first in
even rounds. Of every number that both wrote, the result has both medians, and the median of the rounds' ratios new ÷
old: the speed of a shared machine may change between rounds more than the commits differ.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.support.record import ROOT, write_result

Figures = dict[str, float]  # by the path to each number: "runs[sequences=64].ms_per_step.text"
_IDENTITY = ("server", "weights", "sequences", "streams", "steps_per_s")  # what tells a run of a list from the others


def main() -> None:
    arguments = _parse()
    found: dict[str, dict[str, list[Figures]]] = {name: {"old": [], "new": []} for name in arguments.benchmarks}
    with tempfile.TemporaryDirectory() as folder:
        trees = {"old": Path(folder, "old"), "new": Path(folder, "new")}
        try:
            for side, commit in (("old", arguments.commit), ("new", "HEAD")):
                _git("worktree", "add", "--quiet", "--detach", str(trees[side]), commit)
            for number in range(arguments.rounds):
                for name in arguments.benchmarks:
                    for side in ("old", "new") if number % 2 == 0 else ("new", "old"):
                        found[name][side].append(_run(trees[side], name))
        finally:
            for tree in trees.values():
                _git("worktree", "remove", "--force", str(tree))
    commits = {"old": _git("rev-parse", arguments.commit), "new": _git("rev-parse", "HEAD")}
    compared = {name: _compare(sides["old"], sides["new"]) for name, sides in found.items()}
    for name, rows in compared.items():
        for path, row in rows.items():
            print(f"{name:10} {path:70} {row['old']:12.4g} {row['new']:12.4g} {row['ratio']:7.3f}")
    write_result("compare_commits", {"commits": commits, "rounds": arguments.rounds, "medians": compared})


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run benchmarks of an older commit and of this one in turn.")
    parser.add_argument("commit", help="the older one")
    parser.add_argument(
        "benchmarks", nargs="+", metavar="BENCHMARK", help='a module with its flags: "serve --rounds 1"'
    )
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def _run(tree: Path, benchmark: str) -> Figures:
    """The numbers of one run of a checked-out commit with this process's packages."""
    name, *flags = shlex.split(benchmark)
    sources = [tree, tree / "server", tree / "clients/python", tree / "clients/web"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, sources))}
    subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *flags], cwd=tree, env=environment, check=True)
    written = sorted((tree / "benchmarks/results").glob(f"*-{name}.json"))[-1]
    return dict(_numbers(json.loads(written.read_text())["figures"], ""))


def _numbers(content: Any, path: str) -> Iterator[tuple[str, float]]:
    if isinstance(content, dict):
        for name, value in content.items():
            yield from _numbers(value, f"{path}.{name}" if path else name)
    elif isinstance(content, list):
        for i, value in enumerate(content):
            named = isinstance(value, dict) and [f"{key}={value[key]}" for key in _IDENTITY if key in value]
            yield from _numbers(value, f"{path}[{','.join(named) if named else i}]")
    elif isinstance(content, int | float) and not isinstance(content, bool):
        yield path, float(content)


def _compare(old: list[Figures], new: list[Figures]) -> dict[str, dict[str, float]]:
    paths = [path for path in old[0] if all(path in figures for figures in [*old, *new])]
    rows = {}
    for path in paths:
        before, after = [figures[path] for figures in old], [figures[path] for figures in new]
        if min(before) > 0:
            ratio = statistics.median(late / early for early, late in zip(before, after, strict=True))
            rows[path] = {"old": statistics.median(before), "new": statistics.median(after), "ratio": round(ratio, 4)}
    return rows


if __name__ == "__main__":
    main()
