"""The server's flags as Markdown, from the fields of its parser."""

import re
from html import escape

from stellarbyte_server.config.command_line import GROUPS, flag_of, help_of, off_flag_of, options, variable_of


def flags_markdown() -> str:
    """A table for each group of flags: flag, value and variable, default, help text."""
    lines: list[str] = []
    for title, settings_class in GROUPS:
        lines += [f"## {title.capitalize()}", "", "| flag, variable | default | what |", "|---|---|---|"]
        for field in options(settings_class):
            flag, off = flag_of(field), off_flag_of(field)
            shown = f"{flag} {field.metadata['metavar']}{' …' if field.metadata['many'] else ''}"
            names = [shown, variable_of(field)] if off is None else [flag, off, variable_of(field)]
            codes = "<br>".join(f"<code>{_cell(name)}</code>" for name in names)
            what = re.fullmatch(r"(.*?)(?: \(default: (.*)\))?", help_of(field))
            assert what is not None, "both parts may be empty"
            default = "none" if what[2] is None else what[2]
            anchor = f'<span id="{flag.removeprefix("--")}"></span>'
            lines.append(f"| {anchor}{codes} | {_cell(default)} | {_cell(what[1])} |")
        lines.append("")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return escape(text, quote=False).replace("|", "&#124;")
