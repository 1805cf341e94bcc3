"""Streams over HTTP and what became of each: complete, ended by an error as it should be, or neither."""

import json
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

DONE = "data: [DONE]"


@dataclass
class Ended:
    """A request that is over."""

    status: int
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    error: dict[str, Any] | None = None  # as the API shows it
    finish_reason: str | None = None
    is_done: bool = False  # [DONE] was sent
    broken: str = ""  # how the connection broke, if it did
    ended_at_s: float = 0.0

    @property
    def is_complete(self) -> bool:
        return self.status == 200 and self.error is None and self.finish_reason is not None and not self.broken

    @property
    def is_honest_failure(self) -> bool:
        """It ended with an error in the API's form, and with nothing that says it was complete."""
        if self.error is None or self.is_done or self.finish_reason is not None or self.broken:
            return False
        return self.error.keys() == {"message", "type", "param", "code"} and self.error["type"] == "server_error"


@dataclass
class Progress:
    """Of a stream that is being read."""

    num_events: int = 0


async def ask(
    http: httpx.AsyncClient, body: dict[str, Any], progress: Progress | None = None, path: str = "/v1/completions"
) -> Ended:
    """Send a request, streamed or not, and read its answer to the end."""
    ended = Ended(0)
    try:
        async with http.stream("POST", path, json=body) as response:
            ended.status = response.status_code
            if response.headers["content-type"].startswith("application/json"):
                _note(ended, json.loads(await response.aread()))
            else:
                async for line in response.aiter_lines():
                    if line == DONE:
                        ended.is_done = True
                    elif line.startswith("data: "):
                        _note(ended, json.loads(line.removeprefix("data: ")))
                        if progress is not None:
                            progress.num_events += 1
    except httpx.TransportError as error:
        ended.broken = repr(error)
    ended.ended_at_s = time.monotonic()
    return ended


def _note(ended: Ended, content: dict[str, Any]) -> None:
    ended.error = content.get("error", ended.error)
    for choice in content.get("choices", ()):
        ended.text += choice["text"]
        ended.token_ids += choice.get("token_ids") or ()
        ended.finish_reason = choice["finish_reason"] or ended.finish_reason
