"""What the routes of files and batches share: the storage, whose things a request sees, pages of lists."""

from collections.abc import Sequence
from typing import Any

from stellarbyte_server.api.contract.errors import ApiError, bad_request
from stellarbyte_server.api.service import Service
from stellarbyte_server.batch.storage import Storage


def storage_of(service: Service) -> Storage:
    """ApiError when the server was started without one."""
    if service.storage is None:
        raise bad_request(
            "Files and batches are off because the server was started without --data-dir.", code="data_dir_required"
        )
    return service.storage


def no_such(kind: str, given: str, param: str | None = None) -> ApiError:
    """What is another key's is not there."""
    return ApiError(404, f"There is no {kind} {given!r:.100}.", param=param)


def page(objects: Sequence[dict[str, Any]], *, has_more: bool) -> dict[str, Any]:
    return {
        "object": "list",
        "data": objects,
        "first_id": objects[0]["id"] if objects else None,
        "last_id": objects[-1]["id"] if objects else None,
        "has_more": has_more,
    }
