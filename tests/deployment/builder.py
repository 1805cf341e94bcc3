"""Builds the image with Debian's buildah, on a base that mmdebstrap makes of this machine's own package sources.

Neither needs a daemon or a registry: buildah runs the instructions in a chroot and keeps layers as plain folders.
Needs root. `why_not` says what is missing.
"""

import configparser
import os
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

from tests.support.servers.server_process import ROOT

PROGRAMS = ("buildah", "mmdebstrap")
BASE = "localhost/debian-python"
DEBIAN = "bookworm"  # has Python 3.11
SYSTEM_FOLDERS = ("/etc/apt", "/etc/ssl/certs", "/usr/share/keyrings")  # how this machine reaches its packages


def why_not() -> str | None:
    """The reason that no image can be built here, or None."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "building an image without a daemon needs Linux and root"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    return f"{' and '.join(missing)} not found (on Debian: scripts/test --slow installs them)" if missing else None


class Builder:
    """Images in `folder`, which this machine's own images are not."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        storage = folder / "storage.conf"
        storage.write_text(f'[storage]\ndriver = "vfs"\ngraphroot = "{folder}/images"\nrunroot = "{folder}/run"\n')
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
        self.environment |= {"CONTAINERS_STORAGE_CONF": str(storage), "BUILDAH_ISOLATION": "chroot"}

    def run(self, *command: str, **variables: str) -> str:
        """The output; a failure shows the end of what was printed."""
        result = subprocess.run(
            command,
            cwd=ROOT,
            env=self.environment | variables,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        assert result.returncode == 0, f"{command}: {result.stdout[-3000:]}{result.stderr[-3000:]}"
        return result.stdout.strip()

    def make_base(self) -> None:
        tar = str(self.folder / "base.tar")
        packages = "python3,python3-venv,ca-certificates"
        self.run("mmdebstrap", "--variant=minbase", f"--include={packages}", DEBIAN, tar)
        container = self.run("buildah", "from", "scratch")
        self.run("buildah", "add", "--quiet", container, tar, "/")
        self.run("buildah", "commit", "--quiet", container, BASE)
        self.run("buildah", "rm", container)
        Path(tar).unlink()

    def build(self, variant: str) -> Path:
        """The root of an image that scripts/image has built, with packages from where this machine's pip takes them.

        torch is the CPU's in both variants: the CUDA build is gigabytes, and this is about all the other layers.
        """
        pip = self.folder / "pip.conf"
        files = _write_pip_configuration(pip)
        volumes = [f"--volume={path}:{path}:ro" for path in sorted({*SYSTEM_FOLDERS, *files}) if Path(path).exists()]
        arguments = [f"--build-arg=BASE={BASE}", "--build-arg=TORCH_INDEX=", f"--secret=id=pip,src={pip}"]
        image = f"localhost/stellarbyte-server-{variant}"
        without_docker = ":".join(p for p in self.environment["PATH"].split(":") if not (Path(p) / "docker").exists())
        self.run("scripts/image", variant, *arguments, *volumes, IMAGE=image, PATH=without_docker)
        return Path(self.run("buildah", "mount", self.run("buildah", "from", image)))


def _write_pip_configuration(file: Path) -> set[str]:
    """pip's own configuration as one file, with this repository's CPU constraints; the local paths that it names."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    values = {}
    for line in listed.stdout.splitlines():  # files first, variables last, as pip lets them win
        name, _, value = line.partition("=")
        values[name.rpartition(".")[2]] = value.strip("'")
    values["constraint"] = str(ROOT / "constraints-cpu.txt")
    configuration = configparser.RawConfigParser()
    configuration["global"] = values
    with file.open("w") as text:
        configuration.write(text)
    words = [word for value in values.values() for word in value.split()]
    # The pages of an index link to files that lie beside their folder.
    paths = [str(Path(urlsplit(word).path).parent) if word.startswith("file:") else word for word in words]
    return {path for path in paths if path.startswith("/") and Path(path).exists()} - {"/"}
