"""The interface of the grammar that an answer follows."""

from typing import Protocol

from stellarbyte_server.engine.state.sequence import TokenMask


class Grammar(TokenMask, Protocol):
    """The state of a grammar after the answer so far."""

    def accept(self, token_id: int) -> None:
        """Advance by an allowed token."""

    def begin_mask(self) -> None:
        """Start computing the next mask in the background, if it takes long."""

    @property
    def is_complete(self) -> bool:
        """Whether the answer is complete."""

    @property
    def error(self) -> str | None:
        """Why the grammar cannot continue, in one sentence; None: it can."""
