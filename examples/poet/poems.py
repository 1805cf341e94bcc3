"""Chinese poems from the npm package chinese-poetry (MIT), as texts and chats to train on.

    python examples/poet/poems.py package --out data/poems

`package` is the unpacked package. Written are JSON lines, compressed, the same at every run:

    shi.jsonl.gz, ci.jsonl.gz               {"text": ...}: a scroll, up to 128 poems of one author
    shi-chats.jsonl.gz, ci-chats.jsonl.gz   {"messages": ...}: a request for a poem, and a poem that fulfils it
    quatrains.jsonl.gz                      the same: all answers are quatrains of five characters
"""

import argparse
import gzip
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

POEMS_OF_A_SCROLL = 128
LONGEST_ANSWER = 240  # characters of a poem in a chat
CHATS_ONE_IN = 6  # poems, chosen by their hashes
QUATRAIN = "五言绝句"
FORMS = {(5, 4): QUATRAIN, (7, 4): "七言绝句", (5, 8): "五言律诗", (7, 8): "七言律诗"}  # characters, clauses
# What poems are asked for, and the characters by which it is found in a title or a text of either script
TOPICS = {
    **{character: character for character in "月酒秋雪梅江山春花柳竹菊雨夜琴舟松僧剑"},
    **{
        "风": "風风",
        "云": "雲云",
        "荷": "荷蓮莲",
        "雁": "雁鴈",
        "鹤": "鶴鹤",
        "湖": "湖",
        "梦": "夢梦",
        "送别": "送別别",
    },
    **{"思乡": "鄉乡歸归", "边塞": "塞邊边", "登楼": "樓楼", "寺庙": "寺廟庙", "春雨": "雨", "秋夜": "夜"},
}
_NOTES = re.compile(r"（[^）]*）|\([^)]*\)|【[^】]*】")
_CLAUSE_ENDS = re.compile(r"[，。！？；、：,!?;\s]+")
_BROKEN = re.compile(r"[□■●○〇\[\]{}<>〖〗「」/\\|*=_#0-9A-Za-z…]")


class Poem(NamedTuple):
    title: str
    author: str
    lines: tuple[str, ...]
    kind: str  # shi or ci

    @property
    def text(self) -> str:
        return "\n".join((f"《{self.title}》", *self.lines))

    @property
    def digest(self) -> int:
        return int.from_bytes(hashlib.sha256(self.text.encode()).digest()[:8])


def clauses(text: str) -> list[str]:
    """The parts between punctuation marks, without a title in 《》."""
    return [part for part in _CLAUSE_ENDS.split(re.sub(r"^《[^》]*》", "", text.strip())) if part]


def form_of(text: str) -> str | None:
    """The regular form of a poem by the lengths of its clauses; None: another."""
    parts = clauses(text)
    lengths = {len(part) for part in parts}
    return FORMS.get((lengths.pop(), len(parts))) if len(lengths) == 1 else None


def read_poems(package: Path) -> Iterator[Poem]:
    """Every poem of Tang and Song without gaps and editors' signs. ValueError: the folder is not the package."""
    for kind, pattern, title_key in (
        ("shi", "dist/quantangshi/poet.*.json", "title"),
        ("ci", "dist/songci/ci.song.*[0-9].json", "rhythmic"),
    ):
        files = sorted(package.glob(pattern))
        if not files:
            raise ValueError(f"{package} has no {pattern}; unpack the npm package chinese-poetry there.")
        for file in files:
            for record in json.loads(file.read_text(encoding="utf-8")):
                poem = _poem(record, title_key, kind)
                if poem is not None:
                    yield poem


def _poem(record: dict[str, Any], title_key: str, kind: str) -> Poem | None:
    lines = tuple(line for raw in record["paragraphs"] if (line := _NOTES.sub("", raw).strip()))
    title = _NOTES.sub("", record[title_key]).strip()
    poem = Poem(title, record["author"].strip(), lines, kind)
    is_whole = title and poem.author and lines and not _BROKEN.search("".join((title, poem.author, *lines)))
    return poem if is_whole else None


def scrolls(poems: Iterable[Poem]) -> Iterator[str]:
    """The poems of each author in their order, each scroll headed by the author's name."""
    for author, group in groupby(sorted(poems, key=lambda poem: poem.author), key=lambda poem: poem.author):
        own = list(group)
        for start in range(0, len(own), POEMS_OF_A_SCROLL):
            yield "\n\n".join((author, *(poem.text for poem in own[start : start + POEMS_OF_A_SCROLL])))


def request_for(poem: Poem, *, names_form: bool = True) -> str:
    """What a reader may have asked for when this poem is the answer; decided by the poem's hash."""
    digest = poem.digest
    form = "诗"
    if poem.kind == "ci":
        form = "词" if digest & 1 else f"词，词牌是{poem.title}"
    elif names_form and digest & 1:
        form = form_of(poem.text) or "诗"
    topic = _topic(poem)
    asked = [f"写一首题为《{poem.title}》的" if poem.kind == "shi" else "写一首", f"仿{poem.author}，写一首"]
    asked += [f"写一首关于{topic}的"] * 3 if topic is not None else []
    first = f"{form}，第一句是“{clauses(poem.text)[0]}”。"
    place = (digest >> 8) % (len(asked) + 1)
    return f"写一首{first}" if place == len(asked) else f"{asked[place]}{form}。"


def _topic(poem: Poem) -> str | None:
    """What the title names, or the text twice."""
    found = [topic for topic, signs in TOPICS.items() if any(sign in poem.title for sign in signs)]
    text = "".join(poem.lines)
    found = found or [topic for topic, signs in TOPICS.items() if sum(text.count(sign) for sign in signs) > 1]
    return found[poem.digest % len(found)] if found else None


def chats(poems: Iterable[Poem]) -> Iterator[dict[str, Any]]:
    for poem in poems:
        is_short = len(clauses(poem.text)) >= 4 and len(poem.text) <= LONGEST_ANSWER
        if is_short and poem.digest % CHATS_ONE_IN == 0:
            yield _chat(request_for(poem), poem)


def quatrains(poems: Iterable[Poem]) -> Iterator[dict[str, Any]]:
    for poem in poems:
        if poem.kind == "shi" and form_of(poem.text) == QUATRAIN:
            yield _chat(request_for(poem, names_form=False), poem)


def _chat(request: str, poem: Poem) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": request}, {"role": "assistant", "content": poem.text}]}


def write_lines(file: Path, records: Iterable[Any]) -> int:
    """The number of records. Equal records make equal files: no time and no name within."""
    count = 0
    with file.open("wb") as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as packed:
        for record in records:
            packed.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
            count += 1
    return count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", type=Path, help="the unpacked npm package chinese-poetry")
    parser.add_argument("--out", type=Path, default=Path("data/poems"), help="default: %(default)s")
    options = parser.parse_args()
    try:
        poems = list(read_poems(options.package))
        options.out.mkdir(parents=True, exist_ok=True)
        for kind in ("shi", "ci"):
            own = [poem for poem in poems if poem.kind == kind]
            texts = ({"text": text} for text in scrolls(own))
            print(f"{kind}.jsonl.gz: {write_lines(options.out / f'{kind}.jsonl.gz', texts):,} scrolls")
            print(f"{kind}-chats.jsonl.gz: {write_lines(options.out / f'{kind}-chats.jsonl.gz', chats(own)):,} chats")
        print(f"quatrains.jsonl.gz: {write_lines(options.out / 'quatrains.jsonl.gz', quatrains(poems)):,} chats")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
