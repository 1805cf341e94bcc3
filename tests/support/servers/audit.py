"""A hook that writes down what a process does of that which a server should never do.

The interpreter tells of every file it opens, every connection, every class that is unpickled and all code that is made
at run time (PEP 578), by whichever library. Lines go to the file that the variable AUDIT_FILE names. Left out is what
no request can change: sockets of this machine's file system, code of a module that is being imported, which comes from
its file.
"""

import os
import sys
from collections.abc import Callable
from types import CodeType, FrameType

_IMPORTING = "<frozen importlib._bootstrap>"
_RECORD = "registry/store.py"  # which opens files from its own folders


def install() -> None:
    """Watch this process from now on; there is no way back."""
    file = os.open(os.environ["AUDIT_FILE"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        watch = _WATCHES.get(event)
        if watch is not None and (found := watch(arguments)) is not None:
            os.write(file, f"{event} {found}\n".encode("utf-8", "backslashreplace"))

    sys.addaudithook(hook)


def _opened(arguments: tuple[object, ...]) -> str | None:
    path, _, flags = arguments
    if not isinstance(path, str | bytes | os.PathLike):
        return None
    opener = sys._getframe(2)
    if opener.f_code.co_name == "open_inside" and "at" in opener.f_locals:  # the folder it opens from is not told
        path = os.path.join(os.readlink(f"/proc/self/fd/{opener.f_locals['at']}"), os.fsdecode(path))
    elif opener.f_code.co_filename.endswith(_RECORD) and not os.path.isabs(path):
        method = opener if "self" in opener.f_locals or opener.f_back is None else opener.f_back  # of a comprehension
        path = os.path.join(method.f_locals["self"]._path, "*", os.fsdecode(path))  # in one of its folders
    is_written = isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    return f"{'w' if is_written else 'r'} {os.path.abspath(os.fsdecode(path))!r}"


def _connected(arguments: tuple[object, ...]) -> str | None:
    address = arguments[1]
    return None if isinstance(address, str | bytes) else repr(address)


def _looked_up(arguments: tuple[object, ...]) -> str | None:
    return repr(arguments[0])


def _made_code(arguments: tuple[object, ...]) -> str | None:
    """Of `compile` the file's name, which for texts is made up; of `exec` that of the code; and who did it."""
    first, *rest = arguments
    frames = _callers()
    if any(frame.f_code.co_filename == _IMPORTING for frame in frames):
        return None
    name = first.co_filename if isinstance(first, CodeType) else rest[0] if rest else type(first).__name__
    return f"{name!r} by {frames[0].f_code.co_filename}"


def _unpickled(arguments: tuple[object, ...]) -> str:
    return f"{arguments} by {_callers()[0].f_code.co_filename}"


def _always(arguments: tuple[object, ...]) -> str:
    return repr(arguments[:2])[:500]


def _callers() -> list[FrameType]:
    """From the one that caused the event outwards."""
    frames: list[FrameType] = []
    frame: FrameType | None = sys._getframe(3)
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames


_WATCHES: dict[str, Callable[[tuple[object, ...]], str | None]] = {
    "open": _opened,
    "socket.connect": _connected,
    "socket.sendto": _connected,
    "socket.sendmsg": _connected,
    "socket.getaddrinfo": _looked_up,
    "socket.gethostbyname": _looked_up,
    "pickle.find_class": _unpickled,
    "marshal.loads": _made_code,
    "exec": _made_code,
    "compile": _made_code,
    "code.__new__": _made_code,
    "os.system": _always,
    "os.exec": _always,
    "os.posix_spawn": _always,
    "subprocess.Popen": _always,
    "urllib.Request": _always,
    "ftplib.connect": _always,
    "smtplib.connect": _always,
}
