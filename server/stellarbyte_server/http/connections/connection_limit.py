"""The limit of connections of an HTTP process, and the answer beyond it."""

import resource

from stellarbyte_server.api.contract.errors import ApiError

MAX_CONNECTIONS = 8192  # of one HTTP process
OTHER_FILES = 128  # descriptors for other files, and for connections not yet counted
ACCEPTED_AT_ONCE = 16  # in one turn of the event loop; connections beyond the limit are closed some turns later


def connections_allowed() -> int:
    """The process's limit of open files, less some for other files, and at most MAX_CONNECTIONS.

    Raises the soft limit of open files first: it is often 1024, with a far larger hard limit.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else max(1, min(MAX_CONNECTIONS, soft - OTHER_FILES))


def too_many_connections() -> ApiError:
    message = "The server has too many open connections; try again later."
    return ApiError(503, message, code="too_many_connections", headers={"Retry-After": "1"})
