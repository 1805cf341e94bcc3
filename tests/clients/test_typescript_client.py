"""@stellarbyte/client: its own tests, run by node against a real server."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.clients.keys import ADMIN_KEY, USER_KEY
from tests.support.clients.node_packages import copy_installed
from tests.support.servers.server_process import ROOT, ServerProcess


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_installed(ROOT / "clients/typescript", tmp_path_factory.mktemp("typescript") / "package", "ci")


def run(package: Path, url: str, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"STELLARBYTE_URL": url} | variables
    return subprocess.run(command, cwd=package, env=environment, capture_output=True, text=True, timeout=120)


def test_the_client_passes_its_own_tests(package: Path, adapter_server: ServerProcess) -> None:
    result = run(package, adapter_server.url, "npm", "test", USER_KEY=USER_KEY, ADMIN_KEY=ADMIN_KEY)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "# fail 0" in result.stdout and "# pass 0" not in result.stdout


def test_the_example_loads_and_unloads_an_adapter(package: Path, adapter_server: ServerProcess) -> None:
    subprocess.run(["npm", "run", "build"], cwd=package, check=True, capture_output=True)
    command = ["node", "examples/manage-adapters.mjs", "mine", "pirate", "What is the capital of France?"]
    result = run(package, adapter_server.url, *command, STELLARBYTE_ADMIN_API_KEY=ADMIN_KEY)
    assert result.returncode == 0, result.stderr
    first, loaded, *adapters, unloaded = result.stdout.splitlines()
    assert first.endswith("of at most 512 tokens") and loaded.startswith("loaded mine: rank 4, 21 modules")
    assert "mine: ready, slot, 0 requests, 0 tokens" in adapters and unloaded.startswith("unloaded mine: ")
    refused = run(package, adapter_server.url, *command)
    assert refused.returncode == 1 and refused.stderr.startswith("error: This request needs one of the server's API")
