"""Undocumented parts of uvicorn that the service uses; pyproject.toml bounds uvicorn's releases for them.

- `HttpToolsProtocol`: its attributes app, connections, cycle, flow, headers, loop, parser, timeout_keep_alive_task,
  transport and url, its `_unset_keepalive_if_required` and `timeout_keep_alive_handler`, and its methods
  `on_...`, called by httptools. Of its cycle: chunked_encoding, expected_content_length, keep_alive, message_event,
  response_complete and scope, and that `send` is its method; of its flow: read_paused.
- `uvicorn.Server`: `server_state.tasks`, and that `startup` and `capture_signals` may be overridden.
"""

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

__all__ = ["HttpToolsProtocol"]
