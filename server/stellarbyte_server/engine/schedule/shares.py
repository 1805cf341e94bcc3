"""What part of a step each account gets, where there are several. Pure decisions over counts of tokens.

Tokens of a step are divided max-min fairly: nobody gets more than an equal part while another could use more. A step
has only so many of them that the account which uses least is not slowed down to much less than what it would get if
all used as much as it does; the others take turns over steps. That is for those who go on and on: an account that has
used less than its part lately has credit, with which it takes a short prompt at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from stellarbyte_server.engine.state.account import Account


@dataclass(frozen=True, kw_only=True)
class ShareLimits:
    """What depends on the device."""

    free_tokens: int  # tokens that a step takes in about the time of none
    most_credit: int  # tokens that an account may take at once, beyond its part


@dataclass(kw_only=True)
class Demand:
    """What an account could use in the next step."""

    account: Account
    num_rows: int = 0  # sequences that only need their newest token
    num_prompt_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Part:
    """What it gets."""

    account: Account
    num_rows: int
    num_prompt_tokens: int


def max_min(demands: Sequence[int], total: int, first: int = 0) -> list[int]:
    """Divide `total` so that the least satisfied gets as much as possible; tokens left over go round from `first`."""
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
    """How many tokens a step may have: half as many again as if each account used what the one with least does."""
    used = [demand for demand in demands if demand]
    return free_tokens + (3 * len(used) * min(used, default=0) + 1) // 2


def divide(demands: Sequence[Demand], limits: ShareLimits, budget: int, prompt_budget: int, turn: int) -> list[Part]:
    """What each account gets of a step of up to `budget` tokens, `prompt_budget` of them of prompts.

    `turn` counts steps. Credits are not changed: see `settle`.
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


def _part(demand: Demand, tokens: int, prompt_tokens: int, turn: int) -> Part:
    """Rows go first, but prompts get up to half: otherwise an account with many streams could start no other."""
    for_prompts = min(prompt_tokens, max(tokens - demand.num_rows, (tokens + turn % 2) // 2))
    return Part(
        account=demand.account, num_rows=min(demand.num_rows, tokens - for_prompts), num_prompt_tokens=for_prompts
    )


def settle(used: dict[Account, int], limits: ShareLimits) -> None:
    """Note what each account that could use the step has used: who used less than an equal part gets credit."""
    equal = sum(used.values()) / max(1, len(used))
    for account, tokens in used.items():
        account.credit = min(float(limits.most_credit), max(0.0, account.credit + equal - tokens))


def spend(account: Account, tokens: int, limits: ShareLimits) -> None:
    """Note what an account has used of a step that it had for itself: it has been no modest one lately."""
    account.credit = max(0.0, min(float(limits.most_credit), account.credit) - tokens)
