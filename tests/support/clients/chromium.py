"""The browser that drives the pages: whichever Chromium the machine has, told to ask no host by itself."""

import os
import shutil

_PROGRAMS = ("/usr/bin/chromium", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    *(("--no-sandbox",) if os.geteuid() == 0 else ()),  # which root cannot have
)


def find_chromium() -> str | None:
    """Where it is; None if there is none."""
    return next((found for name in _PROGRAMS if (found := shutil.which(name))), None)
