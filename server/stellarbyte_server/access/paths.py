"""The path of a request below --root-path."""

from starlette.types import Scope


def path_of(scope: Scope) -> str:
    """The path for matching routes: ASGI's `path` without its `root_path`."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    if path == root or path.startswith(f"{root}/"):
        return path[len(root) :]
    return path
