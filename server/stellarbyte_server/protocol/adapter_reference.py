"""The adapters that a request names: one, in its current version or a pinned one, or a mix of several."""

import msgspec

MIN_PIN_DIGITS = 8  # of a content hash
MAX_MIXED_ADAPTERS = 4  # in one mix


class AdapterReference(msgspec.Struct, frozen=True, tag=True):
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


class AdapterMix(msgspec.Struct, frozen=True, tag=True):
    """Several adapters whose changes to the weights add up: y = W x + Σ scale · (alpha / r) · B A x.

    In the order of their names, so that a mix is the same however a request orders it.
    """

    parts: tuple[tuple[AdapterReference, float], ...]  # 2 to MAX_MIXED_ADAPTERS adapters, each with its scale

    @property
    def name(self) -> str:
        """NAME+NAME…, the scales left out."""
        return "+".join(reference.name for reference, _ in self.parts)

    def __str__(self) -> str:
        return "+".join(str(reference) for reference, _ in self.parts)


def parse_references(text: str) -> tuple[AdapterReference, ...]:
    """The adapters of a request's `model`: NAME[@HASH], or several, joined by +."""
    return tuple(AdapterReference.parse(part) for part in text.split("+"))


def mix_of(parts: tuple[tuple[AdapterReference, float], ...]) -> AdapterMix:
    """A mix of adapters with different names."""
    return AdapterMix(tuple(sorted(parts, key=lambda part: part[0].name)))
