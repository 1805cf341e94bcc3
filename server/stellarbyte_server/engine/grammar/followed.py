"""The interface of the grammar that an answer follows."""

from typing import Protocol

from stellarbyte_server.engine.state.sequence import TokenMask


class Grammar(TokenMask, Protocol):
    """The state of a grammar after the answer so far."""

    def begin_mask(self) -> None:
        """Start computing the next mask in the background, if it takes long."""
