"""The server as a container runs it, without a container engine: Linux namespaces make the same surroundings.

The whole file system is read-only but for /tmp and the image's volume, the server is process 1 of its own, and has the
image's variables, its user's numbers, and no capabilities. Where that cannot be made, `why_not` says why.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.deployment.files import image_environment, read_dockerfile
from tests.support.servers.server_process import ROOT, ServerProcess, free_port

MODEL = "/tmp/model"  # where a model folder is mounted


def _user() -> tuple[str, str]:
    (user,) = [each.arguments for each in read_dockerfile() if each.name == "USER"]
    name, group = user.split(":")
    return name, group


def command_in_container(
    root: Path, model: Path | None, environment: dict[str, str], command: list[str], image: Path | None = None
) -> list[str]:
    """`command` in the surroundings of the image, whose root is laid out under the empty folder `root`.

    The files are those of `image`, the root of a built image; without it, those of this machine and this checkout.
    """
    (volume,) = [each.arguments for each in read_dockerfile() if each.name == "VOLUME"]
    user, group = _user()
    is_root = os.geteuid() == 0  # else one is root in a namespace of one's own, and nobody outside it
    variables = image_environment("cpu") | ({"PATH": os.environ["PATH"]} if image is None else {}) | environment
    identity = f"setpriv --reuid {user} --regid {group} --clear-groups --bounding-set=-all" if is_root else "setpriv"
    lines = [
        "set -e",
        f"root={shlex.quote(str(root))}",
        'mount --rbind / "$root"' if image is None else f'mount --bind {shlex.quote(str(image))} "$root"',
        'mount -o remount,bind,ro "$root"',
        'mount -t proc proc "$root/proc"',
        'mount -t tmpfs -o mode=1777,noexec tmpfs "$root/tmp"',
    ]
    if image is None:
        home = shlex.quote(str(Path.home()))  # the image's user has no such home
        lines += [
            f'mount -t tmpfs -o mode=755 tmpfs "$root"{home}',
            f'mount -t tmpfs tmpfs "$root{Path(volume).parent}"',
        ]
        lines += [f'install -d {f"-o {user} -g {group}" if is_root else ""} "$root{volume}"']
    else:
        lines += [
            'mount --bind /dev "$root/dev"',
            f'mount -t tmpfs -o mode=755,uid={user},gid={group} tmpfs "$root{volume}"',
        ]
    mounts = [(str(path), str(path)) for path in (ROOT, sys.prefix, sys.base_prefix)] if image is None else []
    mounts += [] if model is None else [(str(model), MODEL)]
    for outside, inside in mounts:  # again, where one of the new file systems hides them
        inside = shlex.quote(inside)
        lines += [f'mkdir -p "$root"{inside}', f'mount --bind {shlex.quote(outside)} "$root"{inside}']
        lines += [f'mount -o remount,bind,ro "$root"{inside}']
    inner = shlex.join(
        ["env", "-i", f"--chdir={'/' if image else ROOT}", *(f"{k}={v}" for k, v in variables.items()), *command]
    )
    lines.append(f'exec chroot "$root" {identity} --no-new-privs {inner}')
    own_user = [] if is_root else ["--user", "--map-root-user"]
    return ["unshare", *own_user, "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", "\n".join(lines)]


def why_not(root: Path) -> str | None:
    """The reason that nothing can be run so, or None."""
    if not sys.platform.startswith("linux"):
        return "namespaces are Linux's"
    missing = [name for name in ("unshare", "setpriv", "chroot") if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not found (on Debian: util-linux, coreutils)"
    probe = command_in_container(root, None, {}, [sys.executable, "-c", "import stellarbyte.user_cache"])
    result = subprocess.run(probe, capture_output=True, text=True)
    return f"no namespaces here: {result.stderr.strip()}" if result.returncode != 0 else None


class ContainerProcess(ServerProcess):
    """A server in the image's surroundings; `root` is an empty folder. The port is given by variable, as there.

    `command` is Python's arguments, or with `image` a command of that image.
    """

    def __init__(
        self, root: Path, command: list[str], model: Path | None = None, image: Path | None = None, **variables: str
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = tempfile.TemporaryFile()
        environment = {"STELLARBYTE_PORT": str(self.port), "PYTHONPATH": os.environ["PYTHONPATH"], **variables}
        self.process = subprocess.Popen(
            command_in_container(root, model, environment, command if image else [sys.executable, *command], image),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )

    def first_pid(self) -> int:
        """The server's number as seen from outside; inside it is 1."""
        return self.engine_pid()  # the one child

    def root(self) -> Path:
        """The container's root folder as seen from outside."""
        return Path("/proc") / str(self.first_pid()) / "root"

    def terminate(self) -> None:
        """SIGTERM to process 1, as container engines send it."""
        os.kill(self.first_pid(), signal.SIGTERM)

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.kill()  # --kill-child: process 1 goes as well, and with it all the others
        return self.process.wait()
