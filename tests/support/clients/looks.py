"""What can be seen and reached on a page: measured in the browser, and by axe."""

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page

# The focused element, and whether its outline is on the screen.
FOCUSED = """() => {
  const one = document.activeElement;
  const framed = one.closest(".composer textarea") ? one.closest(".composer") : one;
  const { outlineStyle, outlineWidth } = getComputedStyle(framed);
  const { top, bottom } = one.getBoundingClientRect();
  return {
    name: one.id || one.className || one.textContent.trim(),
    isSeen: outlineStyle !== "none" && parseFloat(outlineWidth) >= 1 && top < innerHeight && bottom > 0,
  };
}"""

# The controls that are beyond a width of the screen.
OUTSIDE = """(width) => [...document.querySelectorAll("button, select, input, textarea, a")].filter((one) => {
  const { left, right, width: own } = one.getBoundingClientRect();
  return own > 1 && (left < 0 || right > width) && !one.closest(".skip");
}).map((one) => one.outerHTML)"""


def serious_violations(page: Page) -> list[tuple[str, object]]:
    found = Axe().run(page).response["violations"]
    return [(one["id"], one["nodes"]) for one in found if one["impact"] in ("serious", "critical")]
