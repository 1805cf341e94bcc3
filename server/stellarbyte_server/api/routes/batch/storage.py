"""Common to the routes of files and batches: the storage, its objects that a request may see, and pages of lists."""

from collections.abc import Sequence
from typing import Any

from stellarbyte_server.api.contract.errors import ApiError, bad_request
from stellarbyte_server.api.service import Service
from stellarbyte_server.batch.storage import Storage


def storage_of(service: Service) -> Storage:
    """The storage; ApiError if the server was started without one."""
    if service.storage is None:
        raise bad_request(
            "Files and batches are off because the server was started without --data-dir.", code="data_dir_required"
        )
    return service.storage


def no_such(kind: str, given: str, param: str | None = None) -> ApiError:
    """The error for objects that do not exist or belong to another key."""
    return ApiError(404, f"The {kind} {given!r:.100} does not exist.", param=param)


def page(objects: Sequence[dict[str, Any]], *, has_more: bool) -> dict[str, Any]:
    return {
        "object": "list",
        "data": objects,
        "first_id": objects[0]["id"] if objects else None,
        "last_id": objects[-1]["id"] if objects else None,
        "has_more": has_more,
    }
