"""How both processes log: one line per message on stderr, the same form everywhere."""

import logging


def configure_logging(level: str, process: str) -> None:
    """Send this process's messages of at least `level` to stderr. Called once, at the start of a process."""
    logging.basicConfig(
        level=level.upper(), format=f"%(asctime)s %(levelname)s {process} %(name)s: %(message)s", force=True
    )
    for chatty in ("asyncio", "sse_starlette", "uvicorn"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
