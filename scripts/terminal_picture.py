"""Records a chat with the demo model in a terminal and draws the last screen as docs/pictures/terminal.svg.

Answers are greedy, so their text is always the same; times and speeds are the machine's.
"""

import io
import re
import tempfile
from pathlib import Path

from rich.console import Console

from tests.support.clients.terminal import Terminal
from tests.support.servers.server_process import REAL, ROOT, ServerProcess

PICTURE = ROOT / "docs/pictures/terminal.svg"
ROWS, COLUMNS = 32, 96
AT_REST = r"❯$(?!\n)"  # the prompt waits for a question
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


QUESTIONS = ("What is the capital of France?", "Write a Python function that adds two numbers.")


def main() -> None:
    server = ServerProcess(REAL, port=8000)  # the default, which the picture shows
    try:
        server.wait_ready()
        with (
            tempfile.TemporaryDirectory() as home,
            Terminal("chat", "--temperature", "0", home=Path(home), rows=ROWS, columns=COLUMNS) as terminal,
        ):
            terminal.wait_for(AT_REST)
            for line in (*QUESTIONS, "/usage"):
                terminal.type(f"{line}\r")
                terminal.wait_for(re.escape(f"❯ {line}")).wait_for(AT_REST)
            drawn = terminal.drawn()
    finally:
        server.stop()
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    console.print(drawn)
    PICTURE.write_text(console.export_svg(title="stellarbyte chat", code_format=SVG, unique_id="terminal"))
    print(f"Wrote {PICTURE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
