"""A reference names an adapter: its current version, or a pinned one."""

import msgspec

MIN_PIN_DIGITS = 8  # of a content hash


class AdapterReference(msgspec.Struct, frozen=True):
    """A request's `model` other than the served model: NAME or NAME@HASH."""

    name: str
    pin: str | None = None  # the first digits of a version's content hash; None: the current version

    @classmethod
    def parse(cls, text: str) -> "AdapterReference":
        name, at, pin = text.partition("@")
        return cls(name, pin if at else None)

    def __str__(self) -> str:
        return self.name if self.pin is None else f"{self.name}@{self.pin}"

    def selects(self, content_hash: str) -> bool:
        """Whether the reference may mean a version with this content hash; "": its files are not read yet."""
        if self.pin is None:
            return True
        return len(self.pin) >= MIN_PIN_DIGITS and (content_hash or self.pin).startswith(self.pin)
