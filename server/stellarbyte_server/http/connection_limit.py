"""How many connections an HTTP process may hold, and what one too many hears."""

import resource

from stellarbyte_server.api.contract.errors import ApiError

MAX_CONNECTIONS = 8192  # of one HTTP process
OTHER_FILES = 128  # descriptors for all that is not a connection, or not yet known to be one too many
ACCEPTED_AT_ONCE = 16  # by one turn of the event loop; it takes some turns until those too many are closed


def connections_allowed() -> int:
    """As many as this process may hold files open, but for some others, and MAX_CONNECTIONS at most.

    What the system lets the process open is raised first: many systems begin with 1024 and allow far more.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else max(1, min(MAX_CONNECTIONS, soft - OTHER_FILES))


def too_many_connections() -> ApiError:
    message = "The server has as many connections as it can hold; try again later."
    return ApiError(503, message, code="too_many_connections", headers={"Retry-After": "1"})
