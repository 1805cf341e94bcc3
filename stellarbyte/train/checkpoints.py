"""The checkpoints of a run: each is there whole or not at all, and says from what data it was made."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.trainer_utils import get_last_checkpoint

from stellarbyte.train.errors import TrainError
from stellarbyte.train.parallel.layout import Layout
from stellarbyte.train.ranks import is_first_rank, wait_for_all

ORIGIN_FILE = "origin.json"
_PARTIAL = ".partial"

Origin = Mapping[str, Any]  # what decides which row is read at which step; "data" is the fingerprint


class Checkpoints:
    """The folders checkpoint-STEP of a run's folder. Every rank calls each method at the same place.

    Args:
        origin: of this run; written into every checkpoint, and compared before one is continued.
        layout: of this run's ranks; written into every checkpoint, which other ranks may continue.
    """

    def __init__(self, folder: Path, origin: Origin, layout: Layout) -> None:
        self.folder = folder
        self.origin = dict(origin)
        self.layout = layout

    def last(self) -> Path | None:
        """The newest checkpoint; None: there is none. Removes what a killed process has left of another."""
        if is_first_rank():
            for partial in self.folder.glob(f".checkpoint-*{_PARTIAL}"):
                shutil.rmtree(partial)
        wait_for_all()  # by all, also if the folder is not there: the first rank may be making it
        found = get_last_checkpoint(str(self.folder)) if self.folder.is_dir() else None
        return None if found is None else Path(found)

    def refuse_other_origin(self, checkpoint: Path) -> None:
        """Raise TrainError unless the checkpoint was made from this run's data, in the same order."""
        try:
            origin = json.loads((checkpoint / ORIGIN_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise TrainError(f"{checkpoint / ORIGIN_FILE} cannot be read; the checkpoint was not made here.") from error
        if origin.get("data") != self.origin["data"]:
            made, now = str(origin.get("data"))[:12], self.origin["data"][:12]
            raise TrainError(f"{checkpoint.name} was made from other data (sha {made}; the file names sha {now}).")
        for name, value in self.origin.items():
            if origin.get(name) != value:
                raise TrainError(f"{checkpoint.name} was made with {name} {origin.get(name)}; the file says {value}.")

    def layout_in(self, checkpoint: Path) -> Layout:
        """Of the ranks that made a checkpoint which `refuse_other_origin` accepts."""
        return Layout(**json.loads((checkpoint / ORIGIN_FILE).read_text(encoding="utf-8"))["layout"])

    @contextmanager
    def staged(self, step: int) -> Iterator[Path]:
        """Yield a folder that becomes checkpoint-STEP when every rank has filled it.

        Raises:
            TrainError: it cannot be written, such as on a full disk; the checkpoints before it stay.
        """
        target = self.folder / f"checkpoint-{step}"
        staging = self.folder / f".{target.name}{_PARTIAL}"
        try:
            if is_first_rank():
                shutil.rmtree(staging, ignore_errors=True)
                staging.mkdir(parents=True)
                content = self.origin | {"layout": asdict(self.layout)}
                (staging / ORIGIN_FILE).write_text(json.dumps(content, indent=1), encoding="utf-8")
            wait_for_all()
            yield staging
            wait_for_all()
            if is_first_rank():
                if target.exists():  # of the same step, when a run was continued from an earlier one
                    shutil.rmtree(target)
                staging.rename(target)
            wait_for_all()
        except (OSError, SafetensorError) as error:
            raise self._unwritten(target, staging, error) from error
        except RuntimeError as error:  # of torch.save
            if "PytorchStreamWriter" not in str(error) and "unexpected pos" not in str(error):
                raise
            raise self._unwritten(target, staging, error) from error

    def remove_old(self, *, keep: int, best: str | None) -> None:
        """Remove all but the newest `keep` checkpoints and the best one. First rank only."""
        steps = sorted(int(folder.name.rpartition("-")[2]) for folder in self.folder.glob("checkpoint-*"))
        for step in steps[:-keep]:
            folder = self.folder / f"checkpoint-{step}"
            if best is None or Path(best).name != folder.name:
                shutil.rmtree(folder)

    def _unwritten(self, target: Path, staging: Path, error: Exception) -> TrainError:
        shutil.rmtree(staging, ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0].rstrip(".")
        last = get_last_checkpoint(str(self.folder))
        kept = "there is none before it" if last is None else f"{Path(last).name} is the last one"
        return TrainError(f"{target} could not be written ({reason}); {kept}.")
