"""The reason of a rejected request, as a label of a metric."""

from starlette.types import Scope

from stellarbyte_server.access.paths import path_of
from stellarbyte_server.access.rules import Access, RouteTable
from stellarbyte_server.api.disconnect import CLIENT_CLOSED_REQUEST
from stellarbyte_server.observe.reasons import reason_of_error
from stellarbyte_server.observe.record import RequestRecord


def rejection_reason(scope: Scope, routes: RouteTable, status: int | None, record: RequestRecord) -> str | None:
    """One of REASONS; None for answered or started requests, and for routes that are not for users.

    `status`: sent to the client; None: none.
    """
    status = status if record.late_status is None else record.late_status
    if status is None or status < 400 or status == CLIENT_CLOSED_REQUEST or record.streams:
        return None
    if scope["method"] != "POST" or routes.methods_of(path_of(scope)).get("POST") is not Access.USER:
        return None
    return reason_of_error(status, record.error_code)
