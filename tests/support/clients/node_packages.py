"""Folders with a package.json, copied and installed for tests that run what is in them. Skips where that cannot be."""

import shutil
import subprocess
from pathlib import Path

import pytest


def copy_installed(source: Path, target: Path, *npm: str) -> Path:
    """`target`: a copy of `source`, without what was generated there, in which `npm ...` has been run."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("there is no node or no npm on this machine")
    version = subprocess.run(["node", "--version"], capture_output=True, text=True).stdout.strip()
    if int(version.removeprefix("v").partition(".")[0]) < 20:
        pytest.skip(f"this needs Node 20 or later; there is {version}")
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("node_modules", "dist", "build", "__pycache__"))
    command = ["npm", *npm, "--no-audit", "--no-fund"]
    try:
        result = subprocess.run(command, cwd=target, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        pytest.skip(f"npm {npm[0]} took more than five minutes")
    if result.returncode != 0:
        pytest.skip(f"npm {npm[0]} failed: {result.stderr[-500:]}")
    return target
