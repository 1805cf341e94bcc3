"""The wheel, made by way of the sdist and installed in an environment of its own, far from this checkout."""

import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import httpx
import pytest

from tests.support.servers.server_process import ROOT, free_port, wait_for_server

PACKAGES = ("stellarbyte", "stellarbyte_server", "stellarbyte_client", "stellarbyte_web")
TYPED = ("stellarbyte", "stellarbyte_server", "stellarbyte_client")
PAGES = ROOT / "clients/web/stellarbyte_web"
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    # The checkout without what git ignores: an old build folder would be packed, too.
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if files.returncode != 0:
        pytest.skip("this is no git checkout")
    source = folder / "source"
    for name in filter(None, files.stdout.decode().split("\0")):
        if (ROOT / name).is_file() and not name.startswith(("tests/", "benchmarks/", "docs/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(source)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (folder / f"dist/stellarbyte-{VERSION}.tar.gz").exists()
    return folder / f"dist/stellarbyte-{VERSION}-py3-none-any.whl"


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The commands' folder. What the wheel depends on is this environment's, in which no package of ours is found."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(folder, with_pip=False)
    python = folder / "bin/python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(command, check=True, capture_output=True)
    (site,) = (folder / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def run(*command: str | Path, folder: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "STELLARBYTE_"))}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_it_holds_packages_pages_and_type_markers_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {*PACKAGES, f"stellarbyte-{VERSION}.dist-info"}
    assert {f"{package}/py.typed" for package in TYPED} <= set(names)
    tracked = subprocess.run(["git", "ls-files"], cwd=PAGES, capture_output=True, text=True, check=True).stdout.split()
    assert {f"stellarbyte_web/{name}" for name in tracked} <= set(names)
    for package, folder in zip(PACKAGES, (".", "server", "clients/python", "clients/web"), strict=True):
        modules = subprocess.run(
            ["git", "ls-files", f"{package}/*.py"], cwd=ROOT / folder, capture_output=True, text=True, check=True
        )
        assert set(modules.stdout.split()) <= set(names), package


def test_both_commands_tell_their_version_and_are_the_wheels(installed: Path, tmp_path: Path) -> None:
    for name in ("stellarbyte", "stellarbyte-server"):
        assert run(installed / name, "--version", folder=tmp_path).strip() == f"{name} {VERSION}"
    for package in PACKAGES:
        found = run(installed / "python", "-c", f"import {package}; print({package}.__path__[0])", folder=tmp_path)
        assert Path(found.strip()).is_relative_to(installed.parent)


@pytest.mark.slow
def test_it_serves_the_demo_and_its_pages(installed: Path, tmp_path: Path) -> None:
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "STELLARBYTE_"))}
    with subprocess.Popen(
        [installed / "stellarbyte-server", "--port", str(port)], cwd=tmp_path, env=environment
    ) as server:
        try:
            url = f"http://127.0.0.1:{port}"
            wait_for_server(url, server)
            body = {
                "model": "SmolLM2-135M-Instruct",
                "messages": [{"role": "user", "content": "What is the capital of France?"}],
                "temperature": 0,
                "max_tokens": 12,
            }
            reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
            assert "Paris" in reply["choices"][0]["message"]["content"]
            assert "text/html" in httpx.get(f"{url}/").headers["content-type"]
            assert httpx.get(f"{url}/version").json()["version"] == VERSION
        finally:
            server.terminate()
            assert server.wait(40) == 0
