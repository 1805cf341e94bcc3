"""The container's health check: exit status 0 while the server's /health answers 200, else 1 and the reason."""

import os
import sys
import urllib.error
import urllib.request


def main() -> int:
    url = f"http://127.0.0.1:{os.environ.get('STELLARBYTE_PORT', '8000')}/health"
    try:
        with urllib.request.urlopen(url, timeout=5):
            return 0
    except urllib.error.HTTPError as error:
        sys.stderr.write(f"{url}: {error.code} {error.read(500).decode(errors='replace')}\n")
    except OSError as error:
        sys.stderr.write(f"{url}: {error}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
