"""examples/poet/poems.py: what becomes of the records of the npm package chinese-poetry."""

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from examples.poet import poems
from tests.support.servers.server_process import ROOT

MOON = {"title": "靜夜思", "author": "李白", "paragraphs": ["牀前明月光，疑是地上霜。", "舉頭望明月，低頭思故鄉。"]}
TOWER = {
    "title": "登鸛雀樓",
    "author": "王之渙",
    "paragraphs": ["白日依山盡，黃河入海流。", "欲窮千里目，更上一層樓。"],
}
BROKEN = {"title": "句", "author": "李白", "paragraphs": ["□□天地闊，一片白雲秋。"]}
NOTED = {"title": "雪（一作霜）", "author": "李白", "paragraphs": ["千山鳥飛絕（一作盡），萬徑人蹤滅。", "（缺）"]}
SONG = {
    "rhythmic": "如梦令",
    "author": "李清照",
    "paragraphs": ["常记溪亭日暮，沉醉不知归路。", "兴尽晚回舟，误入藕花深处。", "争渡，争渡，惊起一滩鸥鹭。"],
}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("package")
    for name, records in (
        ("quantangshi/poet.tang.0.json", [MOON, BROKEN, TOWER]),
        ("quantangshi/poet.tang.1000.json", [NOTED, *({**MOON, "title": "月" + chr(0x4E00 + n)} for n in range(200))]),
        ("quantangshi/authors.tang.json", []),
        ("songci/ci.song.0.json", [SONG]),
    ):
        file = folder / "dist" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return folder


def read(file: Path) -> list[Any]:
    return [json.loads(line) for line in gzip.decompress(file.read_bytes()).decode().splitlines()]


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("\n".join(MOON["paragraphs"]), "五言绝句"),
        ("《靜夜思》\n" + "".join(MOON["paragraphs"]), "五言绝句"),
        ("两个黄鹂鸣翠柳，一行白鹭上青天。窗含西岭千秋雪，门泊东吴万里船。", "七言绝句"),
        ("\n".join(MOON["paragraphs"] * 2), "五言律诗"),
        ("牀前明月光，疑是地上霜。", None),
        ("牀前明月光，疑是地上霜。舉頭望明月，低頭思鄉。", None),
        ("\n".join(SONG["paragraphs"]), None),
    ],
)
def test_forms_are_those_of_the_clauses(text: str, form: str | None) -> None:
    assert poems.form_of(text) == form


def test_texts_and_chats_of_a_package(package: Path, tmp_path: Path) -> None:
    command = [sys.executable, "examples/poet/poems.py", str(package), "--out", str(tmp_path / "poems")]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120).returncode == 0
    shi = [record["text"] for record in read(tmp_path / "poems" / "shi.jsonl.gz")]
    by_author = {author: [text for text in shi if text.startswith(author + "\n\n《")] for author in ("李白", "王之渙")}
    assert [len(texts) for texts in by_author.values()] == [2, 1] and len(shi) == 3
    parts = [part for text in by_author["李白"] for part in text.split("\n\n")[1:]]
    assert len(parts) == 202 and max(text.count("《") for text in shi) == poems.POEMS_OF_A_SCROLL
    assert parts[0] == "《靜夜思》\n" + "\n".join(MOON["paragraphs"])
    assert parts[1] == "《雪》\n千山鳥飛絕，萬徑人蹤滅。"  # without the notes, and without the poem that has gaps
    (ci,) = [record["text"] for record in read(tmp_path / "poems" / "ci.jsonl.gz")]
    assert ci == "李清照\n\n《如梦令》\n" + "\n".join(SONG["paragraphs"])
    for name, least in (("shi-chats", 202 // 16), ("quatrains", 202)):
        chats = [record["messages"] for record in read(tmp_path / "poems" / f"{name}.jsonl.gz")]
        assert least <= len(chats) <= 204
        for user, assistant in chats:
            assert (user["role"], assistant["role"]) == ("user", "assistant")
            assert user["content"].startswith(("写一首", "仿")) and assistant["content"].startswith("《")
    assert all(poems.form_of(answer["content"]) == poems.QUATRAIN for _, answer in chats)
    assert not any(poems.QUATRAIN in request["content"] for request, _ in chats)
    first = (tmp_path / "poems" / "shi-chats.jsonl.gz").read_bytes()
    assert subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120).returncode == 0
    assert (tmp_path / "poems" / "shi-chats.jsonl.gz").read_bytes() == first


def test_a_request_fits_its_poem(package: Path) -> None:
    """Each names the title, the author, the first clause, or a topic of the poem; a form only if the poem has it."""
    asked = set()
    for poem in poems.read_poems(package):
        request = poems.request_for(poem)
        reasons = {
            "title": poem.title in request,
            "author": request.startswith(f"仿{poem.author}，"),
            "first": f"第一句是“{poems.clauses(poem.text)[0]}”" in request,
            "topic": request.startswith("写一首关于"),
        }
        assert any(reasons.values()), request
        asked |= {name for name, holds in reasons.items() if holds}
        named = [form for form in poems.FORMS.values() if form in request]
        assert named in ([], [poems.form_of(poem.text)])
        assert ("词" in request) == (poem.kind == "ci")
    assert asked == {"title", "author", "first", "topic"}


def test_another_folder_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, "examples/poet/poems.py", str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1 and "unpack the npm package chinese-poetry there." in ended.stderr
