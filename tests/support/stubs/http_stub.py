"""A stand-in for a server, whose answers a test decides."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Asked:
    """What a client sent."""

    method: str
    path: str
    headers: dict[str, str]  # names in lower case
    body: bytes


@dataclass
class Stub:
    """Answers whatever it is asked with the next of `answers`; the last stays."""

    url: str
    answers: list[tuple[int, dict[str, str], bytes]] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)

    def answer(self, body: str, status: int = 200, **headers: str) -> None:
        """The next answer; `headers` have _ for -."""
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        self.answers.append((status, names, body.encode()))

    def next_answer(self, asked: Asked) -> tuple[int, dict[str, str], bytes]:
        self.asked.append(asked)
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
