"""The sizes of files and folders: what grows past them holds more than one thing."""

from collections import Counter

from tests.support.servers.server_process import ROOT

MAX_LINES, MAX_MODULES = 400, 14
MODULES = [path for name in ("stellarbyte", "server", "clients", "benchmarks", "scripts", "tests")
           for path in (ROOT / name).rglob("*.py") if "node_modules" not in path.parts]  # fmt: skip


def test_no_folder_has_too_many_modules() -> None:
    counted = Counter(path.parent for path in MODULES if path.name != "__init__.py")
    assert counted.total() > 500
    assert {str(folder): number for folder, number in counted.items() if number > MAX_MODULES} == {}


def test_no_module_has_too_many_lines() -> None:
    lengths = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8").count("\n") for path in MODULES}
    assert {path: length for path, length in lengths.items() if length > MAX_LINES} == {}
