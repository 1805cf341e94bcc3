"""The progress of a conversion."""

import sys
from collections.abc import Callable

from tqdm import tqdm

Progress = Callable[[int, int], None]  # bytes of weights written so far, bytes in all


class ProgressBar:
    """A progress bar of written bytes on stderr; appears with the first call and closes at the end."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._bar: tqdm | None = None

    def __call__(self, written: int, total: int) -> None:
        if self._bar is None:
            self._bar = tqdm(total=total, desc=self._title, unit="B", unit_scale=True, file=sys.stderr)
        self._bar.update(written - self._bar.n)
        if written == total:
            self._bar.close()
