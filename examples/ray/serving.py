"""StellarByte on Ray Serve: one deployment, a server in each replica, adapters as Serve's multiplexed models.

    serve run --working-dir examples/ray examples/ray/config.yaml

Adapters are the subfolders of `adapter_dir`. A request names its adapter in `model`, as always. Serve prefers replicas
that have answered with this adapter before if the header `serve-multiplexed-model-id` names it, too; answers are the
same without. docs/ray.md describes the rest.
"""

import os
from pathlib import Path

import ray.util
from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.serve import Application
from replica import ServerChild
from starlette.requests import Request
from starlette.responses import Response

MAX_LORAS = 8  # adapters that a replica is preferred for, and that its server computes in one step
START_LIMIT_S = 1800.0  # a first start converts the model and compiles kernels


class Arguments(BaseModel):
    """`args` of the application in config.yaml."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    adapter_dir: str | None = None
    flags: list[str] = []  # further flags of the server
    command: list[str] = ["stellarbyte-server"]  # with a path where the server has an environment of its own


@serve.deployment
class Engine:
    """A replica: it has a server of its own, and passes requests on to it."""

    def __init__(self, arguments: Arguments) -> None:
        self._adapter_dir = None if arguments.adapter_dir is None else Path(arguments.adapter_dir)
        adapters = [] if self._adapter_dir is None else ["--adapter-dir", str(self._adapter_dir)]
        flags = ["--model", arguments.model, *adapters, "--max-loras", str(MAX_LORAS), *arguments.flags]
        self._server = ServerChild([*arguments.command, *flags])
        self._server.wait_ready(START_LIMIT_S)
        self._headers = {"X-Served-By": f"{ray.util.get_node_ip_address()}:{os.getpid()}"}

    async def __call__(self, request: Request) -> Response:
        name = serve.get_multiplexed_model_id()
        if self._is_adapter(name):
            await self.adapter(name)
        return await self._server.pass_on(request, self._headers)

    @serve.multiplexed(max_num_models_per_replica=MAX_LORAS)
    async def adapter(self, name: str) -> str:
        """Make Serve prefer this replica for an adapter.

        There is nothing to load: the server reads an adapter with the first request for it, and keeps the most recently
        used ones in its slots, as Serve does in its list.
        """
        return name

    def _is_adapter(self, name: str) -> bool:
        """Whether a name from a header is a subfolder of `adapter_dir`."""
        if self._adapter_dir is None or not name or name != os.path.basename(name):
            return False
        return (self._adapter_dir / name / "adapter_config.json").is_file()

    async def check_health(self) -> None:
        """Serve replaces a replica for which this fails three times in a row."""
        await self._server.check()


def build(arguments: Arguments) -> Application:
    """The application of config.yaml."""
    return Engine.bind(arguments)
