"""Hooks of mkdocs: links out of docs/, generated tables, and a check for other hosts.

The pages are also read on GitHub, so links may lead out of docs/. They are changed to the site's page or file with that
content; without one, only the text remains. Links to missing files fail `mkdocs build --strict`.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.nav import Navigation
from mkdocs.structure.pages import Page
from mkdocs.utils.templates import TemplateContext

from scripts.site.api_reference import api_markdown
from scripts.site.flags_reference import flags_markdown
from stellarbyte_server.api.contract.openapi import make_document
from stellarbyte_server.api.endpoints import OPERATIONS
from stellarbyte_server.config.settings import DEMO_MODEL_NAME

ROOT = Path(__file__).resolve().parents[2]
ELSEWHERE = {  # pages → their files
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "python-client.md": "clients/python/README.md",
    "typescript-client.md": "clients/typescript/README.md",
}
RESULTS = "benchmarks/results/"  # its files are part of the site, as results/
GENERATED = {
    "<!-- The API reference. -->": lambda: api_markdown(
        make_document(OPERATIONS, DEMO_MODEL_NAME, allows_unknown_fields=False)
    ),
    "<!-- The flags. -->": flags_markdown,
}
_OTHER_LANGUAGE = re.compile(r"^\[(简体中文|English)\]\(\S+\)\n", re.MULTILINE)  # the site has a language switch
_LINK = re.compile(r"(\[[^\[\]]*\]\()(?![a-z]+:)([^)#\s]+)(#[^)\s]*)?\)")
_LOADED = re.compile(  # `mkdocs serve` uses its own address for a page and its neighbours
    r"<(?:script|img|iframe|source|link(?![^>]*\brel=[\"']?(?:canonical|alternate|prev|next)))\b"
    r"[^>]*?\b(?:src|href)=[\"']?((?:https?:)?//[^\"'\s>]+)"
)


@event_priority(100)  # before the plugin that sorts files by language
def on_files(files: Files, config: MkDocsConfig) -> Files:
    for file in ROOT.glob(f"{RESULTS}*.json"):
        files.append(File.generated(config, f"results/{file.name}", abs_src_path=str(file)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    del config, files
    source = ELSEWHERE.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    if page.file.src_uri in ELSEWHERE:
        markdown = (ROOT / source).read_text(encoding="utf-8")
    markdown = _OTHER_LANGUAGE.sub("", markdown, count=1)
    markdown = _LINK.sub(lambda link: _in_site(link, posixpath.dirname(source)), markdown)
    for marker, generate in GENERATED.items():
        if marker in markdown:
            markdown = markdown.replace(marker, generate())
    return markdown


@event_priority(-200)  # after that plugin
def on_page_context(context: TemplateContext, page: Page, config: MkDocsConfig, nav: Navigation) -> TemplateContext:
    """Make the switch of languages relative on home pages, too: a site may lie below any path."""
    del nav
    alternates: dict[str, File] = page.file.alternates  # type: ignore[attr-defined]  # of the plugin, too
    for alternate in config.extra.alternate:  # type: ignore[attr-defined]  # which has put a list there
        alternate["link"] = alternates[alternate["lang"]].url
    return context


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    del config
    loaded = _LOADED.search(output)
    if loaded is not None:
        raise PluginError(f"{page.file.src_uri} would make browsers ask another host for {loaded[1]}.")
    return output


def _in_site(link: re.Match[str], folder: str) -> str:
    """A link of a file in that folder of the repository, as pages of the site have it, which lie side by side."""
    target = posixpath.normpath(posixpath.join(folder, link[2]))
    page = next((page for page, path in ELSEWHERE.items() if path == target), None)
    if page is None and target.startswith(RESULTS):
        page = "results/" + target.removeprefix(RESULTS)
    if page is None and target.startswith("docs/"):
        page = target.removeprefix("docs/")
    if page is None:
        return link[1][1:-2] if (ROOT / target).exists() else link[0]
    return f"{link[1]}{page}{link[3] or ''})"
