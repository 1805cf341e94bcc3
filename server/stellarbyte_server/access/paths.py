"""The path of a request below --root-path, and the API that it belongs to."""

from starlette.types import Scope


def path_of(scope: Scope) -> str:
    """The path for matching routes: ASGI's `path` without its `root_path`."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    if path == root or path.startswith(f"{root}/"):
        return path[len(root) :]
    return path


def is_anthropics(path: str) -> bool:
    """Whether a path without --root-path is one of Anthropic's API, which has its own errors and headers."""
    return path == "/v1/messages" or path.startswith("/v1/messages/")
