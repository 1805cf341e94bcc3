"""The image, built from the Dockerfile by scripts/image and run as its user on a read-only root.

A container engine is not needed: buildah builds in a chroot, and Linux namespaces make a container's surroundings. Not
shown: docker and podman themselves, and a GPU in a container.
"""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.deployment import builder
from tests.deployment.builder import Builder
from tests.deployment.container import ContainerProcess, command_in_container

pytestmark = pytest.mark.slow
MAX_BYTES = 2_000_000_000  # of the CPU's image: torch is half of it


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    reason = builder.why_not()
    if reason is not None:
        pytest.skip(reason)
    made = Builder(tmp_path_factory.mktemp("images"))
    made.make_base()
    return made


@pytest.fixture(scope="module")
def image(built: Builder) -> Path:
    return built.build("cpu")


@contextlib.contextmanager
def serving(image: Path, folder: Path) -> Iterator[ContainerProcess]:
    server = ContainerProcess(folder, ["stellarbyte-server"], image=image)
    try:
        yield server.wait_ready()
    finally:
        server.stop()


def run(image: Path, folder: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    inside = command_in_container(folder, None, variables, list(command), image)
    return subprocess.run(inside, capture_output=True, text=True, timeout=120)


def test_the_demo_answers_from_a_read_only_root_as_an_unprivileged_user(image: Path, tmp_path: Path) -> None:
    (tmp_path / "server").mkdir()
    (tmp_path / "probe").mkdir()
    with serving(image, tmp_path / "server") as server:
        body = {
            "model": "SmolLM2-135M-Instruct",
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "temperature": 0,
            "max_tokens": 12,
        }
        reply = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
        assert "Paris" in reply["choices"][0]["message"]["content"]
        status = Path(f"/proc/{server.first_pid()}/status").read_text()
        assert status.split("Uid:")[1].split()[0] == "10001" and status.split("CapEff:")[1].split()[0] == "0" * 16
        for folder in ("etc", "opt/stellarbyte", "usr"):
            with pytest.raises(OSError):
                (server.root() / folder / "written").touch()
        check = ("python", "/opt/stellarbyte/healthcheck.py")
        healthy = run(image, tmp_path / "probe", *check, STELLARBYTE_PORT=str(server.port))
        assert healthy.returncode == 0, healthy.stderr
        server.terminate()
        assert server.wait(40) == 0, server.log()
        unwell = run(image, tmp_path / "probe", *check, STELLARBYTE_PORT=str(server.port))
        assert unwell.returncode == 1 and "refused" in unwell.stderr


def test_it_holds_nothing_of_the_build(image: Path) -> None:
    """Neither pip's configuration, which may name mirrors and tokens, nor a compiler."""
    assert not (image / "run/secrets/pip").exists() and not (image / "src").exists()
    configurations = [image / "etc/pip.conf", image / "opt/stellarbyte/pip.conf", image / "root/.config/pip/pip.conf"]
    assert not [path for path in configurations if path.exists()]
    assert not (image / "usr/bin/gcc").exists()
    size = sum(path.lstat().st_size for path in image.rglob("*") if not path.is_dir() or path.is_symlink())
    assert size < MAX_BYTES, f"{size / 1e9:.2f} GB"


def test_it_never_imports_from_the_current_folder(image: Path, tmp_path: Path) -> None:
    """Mounted models and adapters stand in the current folder of many a deployment."""
    (tmp_path / "root").mkdir()
    result = run(
        image,
        tmp_path / "root",
        "/bin/sh",
        "-c",
        "cd /tmp && echo 'raise SystemExit(3)' > numpy.py && stellarbyte --version",
    )
    assert result.returncode == 0, result.stderr


def test_the_cuda_variant_builds_and_has_a_compiler_for_triton(built: Builder, tmp_path: Path) -> None:
    """All its layers but torch, which is the CPU's here."""
    image = built.build("cuda")
    assert os.access(image / "usr/bin/gcc", os.X_OK)
    result = run(image, tmp_path, "stellarbyte-server", "--help")
    assert result.returncode == 0 and "--model" in result.stdout, result.stderr
