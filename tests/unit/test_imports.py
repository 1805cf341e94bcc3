"""Which modules may be imported: none with tests, and of libraries none that is private."""

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.support.servers.server_process import ROOT

MODULES = frozenset((ROOT / "tests").rglob("*.py"))


def names_imported(module: Path) -> Iterator[str]:
    """Every module that the file may import, also within functions: `from a import b` may be a.b."""
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, f"{module} has a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def holds_tests(name: str) -> bool:
    """Whether a dotted name is one of our test modules or conftest files."""
    path = ROOT.joinpath(*name.split(".")).with_suffix(".py")
    return path.name.startswith(("test_", "conftest.")) and path in MODULES


def test_a_module_with_tests_is_known_as_one() -> None:
    assert holds_tests("tests.unit.test_imports") and holds_tests("tests.web.conftest")
    assert not holds_tests("tests.support.engines.engine") and not holds_tests("pytest")


def test_no_module_imports_one_with_tests() -> None:
    found = {str(module.relative_to(ROOT)): set(filter(holds_tests, names_imported(module))) for module in MODULES}
    assert {module: names for module, names in found.items() if names} == {}


PRIVATE = {
    "server/stellarbyte_server/http/connections/uvicorn_private.py",  # says what it uses without a promise
    "stellarbyte/parallel/nccl_group.py",  # torch's symmetric memory, which it can do without
}
UNDOCUMENTED = ("uvicorn.protocols.",)


def is_private(name: str) -> bool:
    own = ("stellarbyte", "tests.", "benchmarks.", "scripts.", "__future__")
    inner = name.split(".")[1:]
    return not name.startswith(own) and (name.startswith(UNDOCUMENTED) or any(part.startswith("_") for part in inner))


def test_private_parts_of_libraries_are_imported_in_known_places_only() -> None:
    folders = ("stellarbyte", "server", "clients/python", "benchmarks", "scripts", "tests")
    modules = {str(path.relative_to(ROOT)): path for folder in folders for path in (ROOT / folder).rglob("*.py")}
    found = {module: set(filter(is_private, names_imported(path))) for module, path in modules.items()}
    assert {module for module, names in found.items() if names} == PRIVATE
