"""HTML elements as text; what is not an element itself is escaped."""

from collections.abc import Iterable, Sequence
from html import escape

_VOID = frozenset({"img", "link", "meta", "source"})


class Element(str):
    """Text that is HTML already."""


Content = str | Iterable["Content"]


def element(name: str, /, *content: Content, **attributes: str | int) -> Element:
    """<name ...>content</name>. An attribute named class_ or for_ loses the _; others get - for _."""
    named = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()}
    inside = "".join(f' {key}="{escape(str(value))}"' for key, value in named.items())
    return Element(f"<{name}{inside}>" if name in _VOID else f"<{name}{inside}>{_text(content)}</{name}>")


def _text(content: Content) -> str:
    if isinstance(content, Element):
        return content
    return escape(content) if isinstance(content, str) else "".join(_text(part) for part in content)


def table(head: Sequence[str], rows: Iterable[Sequence[Content]], *, caption: str) -> Element:
    """The first cell of a row is its heading. It scrolls sideways by itself, by keyboard, too."""
    lines = [
        element("tr", element("th", row[0], scope="row"), [element("td", cell) for cell in row[1:]]) for row in rows
    ]
    header = element("thead", element("tr", [element("th", title, scope="col") for title in head]))
    content = element("table", element("caption", caption, class_="unseen"), header, element("tbody", lines))
    return element("div", content, class_="scroll", tabindex=0, role="region", aria_label=caption)


def details(summary: str, *content: Content) -> Element:
    """Closed at first."""
    return element("details", element("summary", summary), *content)
