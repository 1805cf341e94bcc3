"""Three ordinary clients beside one that asks for all it can: what they get, compared with equal shares.

Alone on the machine (`scripts/test --slow -n 0 FILE`) the bounds are those that we aim at.
The figures of docs/security.md come from `python -m benchmarks.fairness`, which measures in the same way.
"""

import asyncio
from collections.abc import Iterator

import pytest

from benchmarks.fairness.__main__ import measure, write_keys
from benchmarks.fairness.attacks import ATTACKS, Attack
from tests.support.cases import some
from tests.support.servers.server_process import REAL, ServerProcess, running

MOST_GROWTH_MIB = 600  # of all processes of the server together


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with running(REAL, "--keys", write_keys(tmp_path_factory.mktemp("keys"))) as process:
        asyncio.run(measure(process, None, 3.0))  # what comes first only
        yield process


@pytest.mark.slow
@pytest.mark.parametrize("attack", some(ATTACKS, 0), ids=lambda attack: attack.__name__)
def test_ordinary_clients_beside_an_attacker(
    server: ServerProcess, attack: Attack, pytestconfig: pytest.Config
) -> None:
    """Before keys had shares nobody got a token within the time, at 40 times the wait, but for schemas."""
    is_alone = pytestconfig.getoption("--slow")  # else another file's tests take a core now and then
    least_share, most_times = (0.5, 3.0) if is_alone else (0.2, 10.0)
    equal = asyncio.run(measure(server, None, 5.0))  # just before: other programs on the machine come and go
    figures = asyncio.run(measure(server, attack, 5.0))
    print(f"\n{attack.__name__}: {figures} (equal shares: {equal}), memory {figures.growth_mib:+.0f} MiB")
    assert figures.failures == []
    assert figures.tokens_per_s >= least_share * equal.tokens_per_s
    assert figures.first_token_s <= most_times * equal.first_token_s
    assert figures.growth_mib <= MOST_GROWTH_MIB
