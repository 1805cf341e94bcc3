"""--root-path behind proxies of either kind: one that strips the prefix from paths, and one that does not."""

from starlette.types import ASGIApp, Receive, Scope, Send

from stellarbyte_server.access.paths import path_of
from stellarbyte_server.access.rules import RouteTable


class RootPath:
    """Removes the prefix from paths that had it already. uvicorn adds it to every path."""

    def __init__(self, app: ASGIApp, routes: RouteTable) -> None:
        self._app = app
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        root: str = scope.get("root_path", "")
        if root and scope["type"] == "http":
            path = path_of(scope)
            # A route that begins like the prefix stays unchanged.
            if path.startswith(f"{root}/") and not self._routes.methods_of(path):
                scope["path"] = scope["path"][len(root) :]
                scope["raw_path"] = scope["raw_path"][len(root.encode()) :]
        await self._app(scope, receive, send)
