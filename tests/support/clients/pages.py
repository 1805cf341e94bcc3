"""The Markdown pages of the repository."""

from pathlib import Path

from tests.support.servers.server_process import ROOT

PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "clients/**/*.md")
    for path in ROOT.glob(pattern)
    if "node_modules" not in path.parts
)
TRANSLATED = [(path, path.with_name(path.name.replace(".zh.md", ".md"))) for path in PAGES if path.match("*.zh.md")]
TRANSLATED.append((ROOT / "README.zh-CN.md", ROOT / "README.md"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))
