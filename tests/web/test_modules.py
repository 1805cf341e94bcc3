"""The page's modules by themselves, in Node: their own tests, and their types by the TypeScript compiler."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.server_process import ROOT


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of clients/web with its packages installed."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("there is no node or no npm on this machine")
    version = subprocess.run(["node", "--version"], capture_output=True, text=True).stdout.strip()
    if int(version.removeprefix("v").partition(".")[0]) < 20:
        pytest.skip(f"the tests need Node 20 or later; this is {version}")
    folder = tmp_path_factory.mktemp("clients") / "web"
    shutil.copytree(ROOT / "clients/web", folder, ignore=shutil.ignore_patterns("node_modules", "__pycache__"))
    command = ["npm", "ci", "--no-audit", "--no-fund"]
    try:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        pytest.skip("npm ci took more than two minutes")
    if result.returncode != 0:
        pytest.skip(f"npm ci failed: {result.stderr[-500:]}")
    return folder


@pytest.mark.parametrize("script", ["check", "test"])
def test_types_and_modules(web: Path, script: str) -> None:
    result = subprocess.run(["npm", "run", script], cwd=web, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
