"""Cards of adapters, as engines list them."""

from typing import Any

from stellarbyte_server.protocol.messages import AdapterCard


def adapter_card(name: str, **fields: Any) -> AdapterCard:
    """A current adapter on disk, but for the fields that are given."""
    default: dict[str, Any] = {
        "is_current": True, "state": "ready", "tier": "disk", "content_hash": "", "root": name, "rank": 0,
        "num_bytes": 0, "num_running": 0, "num_waiting": 0, "num_requests": 0, "num_tokens": 0, "error": "",
    }  # fmt: skip
    return AdapterCard(name=name, **(default | fields))
