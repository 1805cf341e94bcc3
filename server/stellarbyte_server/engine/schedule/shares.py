"""The parts of a step of several accounts. Pure decisions over counts of tokens.

Tokens of a step are divided max-min fairly: no account gets more than an equal part while another could use more. The
number of tokens is limited, so that the account with the least demand is not much slower than if all had its demand;
the others take turns over steps. This applies to steady load: an account that recently used less than its part has
credit, with which it computes a short prompt at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from stellarbyte_server.engine.state.account import Account

FREE_PARTS = 8  # of a step's free tokens one such part is for requests in the background, on a CPU none


@dataclass(frozen=True, kw_only=True)
class ShareLimits:
    """Limits that depend on the device."""

    free_tokens: int  # tokens that hardly lengthen a step
    most_credit: int  # most tokens of credit


@dataclass(kw_only=True)
class Demand:
    """An account's demand in the next step."""

    account: Account
    num_rows: int = 0  # sequences that only need their newest token
    num_prompt_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Part:
    """An account's part of a step."""

    account: Account
    num_rows: int
    num_prompt_tokens: int


def max_min(demands: Sequence[int], total: int, first: int = 0) -> list[int]:
    """Divide `total` max-min fairly; remaining tokens are assigned in turn, starting with `first`."""
    parts = [0] * len(demands)
    left = total
    hungry = [number for number, demand in enumerate(demands) if demand]
    while hungry and left:
        equal = left // len(hungry)
        if equal == 0:
            turn = first % len(hungry)
            for number in (hungry[turn:] + hungry[:turn])[:left]:
                parts[number] += 1
            break
        for number in hungry:
            given = min(equal, demands[number] - parts[number])
            parts[number] += given
            left -= given
        hungry = [number for number in hungry if parts[number] < demands[number]]
    return parts


def fair_tokens(demands: Sequence[int], free_tokens: int) -> int:
    """The tokens of a step: 1.5 times as many as if all accounts had the least demand."""
    used = [demand for demand in demands if demand]
    return free_tokens + (3 * len(used) * min(used, default=0) + 1) // 2


def divide(demands: Sequence[Demand], limits: ShareLimits, budget: int, prompt_budget: int, turn: int) -> list[Part]:
    """Divide a step of up to `budget` tokens, at most `prompt_budget` of them of prompts, among accounts.

    `turn` counts steps. Does not change credits: see `settle`.
    """
    prompts = max_min([demand.num_prompt_tokens for demand in demands], prompt_budget, turn)
    wanted = [demand.num_rows + tokens for demand, tokens in zip(demands, prompts, strict=True)]
    parts = max_min(wanted, min(budget, fair_tokens(wanted, limits.free_tokens)), turn)
    beyond = [
        int(min(want - part, limits.most_credit, demand.account.credit))
        for want, part, demand in zip(wanted, parts, demands, strict=True)
    ]
    extra = max_min(beyond, budget - sum(parts), turn)
    return [
        _part(demand, part + more, tokens, turn)
        for demand, part, more, tokens in zip(demands, parts, extra, prompts, strict=True)
    ]


def divide_in_background(
    demands: Sequence[Demand], parts: Sequence[Part], limits: ShareLimits, budget: int, prompt_budget: int, turn: int
) -> list[Part]:
    """What accounts in the background get of a step of which others have `parts`: all of it, or what costs little."""
    used = sum(part.num_rows + part.num_prompt_tokens for part in parts)
    left = min(budget - used, limits.free_tokens // FREE_PARTS) if used else budget
    return divide(demands, limits, left, min(left, prompt_budget), turn)


def _part(demand: Demand, tokens: int, prompt_tokens: int, turn: int) -> Part:
    """Split an account's tokens: rows first, but up to half for prompts, so that an account with many streams can start
    more."""
    for_prompts = min(prompt_tokens, max(tokens - demand.num_rows, (tokens + turn % 2) // 2))
    return Part(
        account=demand.account, num_rows=min(demand.num_rows, tokens - for_prompts), num_prompt_tokens=for_prompts
    )


def settle(used: dict[Account, int], limits: ShareLimits) -> None:
    """Record the usage of each account with demand: an account below an equal part gets credit."""
    equal = sum(used.values()) / max(1, len(used))
    for account, tokens in used.items():
        account.credit = min(float(limits.most_credit), max(0.0, account.credit + equal - tokens))


def spend(account: Account, tokens: int, limits: ShareLimits) -> None:
    """Record the usage of an account alone in a step, which reduces its credit."""
    account.credit = max(0.0, min(float(limits.most_credit), account.credit) - tokens)
