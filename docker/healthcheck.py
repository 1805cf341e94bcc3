"""The container's health check: exit status 0 while the server's /health answers 200, else 1 and the reason.

It reads the server's variables, not its flags: in a container, set port, host and certificate by variable.
"""

import http.client
import os
import ssl
import sys

LIMIT_S = 5
ANY_HOST = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def main() -> int:
    host = os.environ.get("STELLARBYTE_HOST", "127.0.0.1")
    host = ANY_HOST.get(host, host)
    port = int(os.environ.get("STELLARBYTE_PORT", "8000"))
    connection: http.client.HTTPConnection  # not urllib, which would use HTTP_PROXY
    if "STELLARBYTE_SSL_CERTFILE" in os.environ:
        # The certificate is for the host name that clients use, not for this address; nothing secret is sent.
        context = ssl._create_unverified_context()
        connection = http.client.HTTPSConnection(host, port, timeout=LIMIT_S, context=context)
    else:
        connection = http.client.HTTPConnection(host, port, timeout=LIMIT_S)
    try:
        connection.request("GET", "/health")
        response = connection.getresponse()
        if response.status == 200:
            return 0
        reason = f"{response.status} {response.read(500).decode(errors='replace')}"
    except (OSError, http.client.HTTPException) as error:
        reason = str(error)
    finally:
        connection.close()
    sys.stderr.write(f"/health on {host} port {port}: {reason}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
