"""Versions of adapters as the HTTP processes and the engine speak of them (see messages.py)."""

import msgspec


class StoredAdapter(msgspec.Struct, frozen=True, kw_only=True):
    """The server's own copy of a version's files, which never changes."""

    folder: str  # absolute path
    root: str  # its source, for the API
    content_hash: str = ""  # that the files must have; "": they have not been read yet
    rank: int = 0  # these three as they were when it was loaded; 0, (): not recorded
    num_bytes: int = 0
    invocation: tuple[int, ...] = ()


class LocateAdapter(msgspec.Struct, frozen=True, tag=True):
    """Find the files of an adapter that may be loaded; answered by `AdapterLocated` or `CallFailed`."""

    call_id: str
    path: str


class SetVersions(msgspec.Struct, frozen=True, tag=True):
    """Set which loaded versions requests for a name get, from now on; answered by `Settled` or `CallFailed`.

    All other versions of the name drain.
    """

    call_id: str
    name: str
    current: str  # content hash; "": the current one stays
    shares: tuple[tuple[str, float], ...] = ()  # content hash, share of the callers; (): all get the current one
    pinned: bool = False  # the current one keeps a slot


class RestoredAdapter(msgspec.Struct, frozen=True, kw_only=True):
    """A name and the versions that its requests get."""

    name: str
    current: StoredAdapter
    shares: tuple[tuple[StoredAdapter, float], ...] = ()
    pinned: bool = False


class RecordedAdapters(msgspec.Struct, frozen=True, kw_only=True):
    """The record of what was loaded and unloaded over HTTP, which every engine has to have."""

    adapters: tuple[RestoredAdapter, ...] = ()
    withdrawn: tuple[str, ...] = ()  # unloaded names of --adapter-dir and --lora-modules, which are not offered


class RestoreAdapters(msgspec.Struct, frozen=True, tag=True):
    """Do as the record says: its adapters are available, read on first use, other stored ones drain.

    Answered by `Settled`. The first call of a new engine.
    """

    call_id: str
    recorded: RecordedAdapters


class AdapterProbe(msgspec.Struct, frozen=True, kw_only=True):
    """The logits after a short prompt with an adapter, compared with those without it."""

    max_logit_change: float  # absolute
    num_changed: int  # logits that differ
    num_prompt_tokens: int


class AdapterLocated(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    call_id: str
    config: str  # absolute paths
    weights: str
    root: str  # the allowed folder that contains them
    shown: str  # the path in the API
