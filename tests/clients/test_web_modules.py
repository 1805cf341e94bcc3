"""The page's modules by themselves, in Node: their own tests, and their types by the TypeScript compiler."""

import subprocess
from pathlib import Path

import pytest

from tests.support.cases import some
from tests.support.clients.node_packages import copy_installed
from tests.support.servers.server_process import ROOT


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_installed(ROOT / "clients/web", tmp_path_factory.mktemp("clients") / "web", "ci")


@pytest.mark.parametrize("script", some(["test", "check"], 0))  # scripts/check runs the latter, too
def test_types_and_modules(web: Path, script: str) -> None:
    result = subprocess.run(["npm", "run", script], cwd=web, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
