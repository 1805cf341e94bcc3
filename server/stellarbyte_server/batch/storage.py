"""The contents of --data-dir, as opened by one process of the server."""

from dataclasses import dataclass

from stellarbyte_server.batch.batches import Batches
from stellarbyte_server.batch.files import Files, StoreLimits
from stellarbyte_server.batch.folder import INDEX, DataFolder, DataFolderError
from stellarbyte_server.batch.index import Index


@dataclass(frozen=True)
class Storage:
    """Files and batches. Any thread."""

    folder: DataFolder
    files: Files
    batches: Batches
    index: Index

    @classmethod
    def open(cls, path: str, limits: StoreLimits) -> "Storage":
        """Open a folder that `claim_folder` has prepared."""
        folder = DataFolder(path)
        index = Index(folder.path / INDEX)
        return cls(folder, Files(folder, index, limits), Batches(index), index)

    def remove_old(self) -> None:
        """Remove expired files and batches."""
        self.files.remove_expired()
        self.batches.remove_old()

    def close(self) -> None:
        self.index.close()
        self.folder.close()


def claim_folder(path: str) -> int:
    """Claim a folder for this server; the returned descriptor holds it until closed.

    Raises:
        DataFolderError: the folder cannot be used, or another server uses it.
    """
    storage = Storage.open(path, StoreLimits(file_bytes=0, owner_bytes=0))
    try:
        lock = storage.folder.lock("lock")
        if lock is None:
            raise DataFolderError(f"another server uses the folder {path}")
        storage.index.prepare()
        storage.files.remove_leftovers(storage.batches.planned_files())
        return lock
    except (OSError, ValueError) as error:
        raise error if isinstance(error, DataFolderError) else DataFolderError(f"cannot use {path}: {error}") from None
    finally:
        storage.close()
