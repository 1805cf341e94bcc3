"""Records a chat with the demo model in a terminal and draws the last screen as docs/pictures/terminal.svg.

Answers are greedy, so their text is the same every time; times and speeds are those of the machine that draws.
"""

import tempfile
from pathlib import Path

from rich.console import Console

from tests.server_process import REAL, ROOT, running
from tests.terminal.screen import Terminal

PICTURE = ROOT / "docs/pictures/terminal.svg"
ROWS, COLUMNS = 32, 96
# rich's own frame, without the font that it would fetch from another host
SVG = """\
<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
  <style>
    .{unique_id}-matrix {{
      font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
      font-size: {char_height}px;
      line-height: {line_height}px;
    }}
    {styles}
  </style>
  <defs>
    <clipPath id="{unique_id}-clip-terminal">
      <rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" />
    </clipPath>
    {lines}
  </defs>
  {chrome}
  <g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
    {backgrounds}
    <g class="{unique_id}-matrix">
    {matrix}
    </g>
  </g>
</svg>
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as home, running(REAL, limit_s=180) as server:
        options = ["chat", "--temperature", "0", "--url", server.url]
        with Terminal(*options, home=Path(home), rows=ROWS, columns=COLUMNS) as terminal:
            terminal.wait_for("❯ ")
            for question in ("What is the capital of France?", "Write a Python function that adds two numbers."):
                terminal.type(f"{question}\r")
                terminal.wait_for(r"(?s)" + question[:20] + r".*cached\s+❯")
            terminal.type("/usage\r")
            terminal.wait_for(r"(?s)/usage.*context.*❯")
            drawn = terminal.drawn()
    console = Console(record=True, width=COLUMNS, file=open("/dev/null", "w"))
    console.print(drawn, end="")
    PICTURE.write_text(console.export_svg(title="stellarbyte chat", code_format=SVG, unique_id="terminal"))
    print(f"Wrote {PICTURE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
