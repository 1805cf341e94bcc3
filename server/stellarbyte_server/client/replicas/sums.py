"""What several engines report, as the report of one."""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import zip_longest

import msgspec

from stellarbyte_server.protocol.histogram import Buckets, Histogram
from stellarbyte_server.protocol.messages import AdapterCard, AdapterList, EngineStats, EngineTotals
from stellarbyte_server.protocol.offload_stats import sum_of_offloads

_NOW = ("num_running", "num_waiting", "num_blocked", "num_blocks_used")  # of the present, not counted from the start
_BEST_STATE = ("ready", "loading", "failed", "draining")
_BEST_TIER = ("slot", "cpu", "disk")


def sum_of_totals(running: Sequence[EngineTotals], ended: Sequence[EngineTotals] = ()) -> EngineTotals:
    """The totals of at least one engine process together.

    The use of the cache is the mean over those that run. Of one that has ended only what it counted remains: it has no
    requests and no cache any more.
    """
    totals = [*running, *map(_of_the_past, ended)]
    usage = sum(each.stats.kv_cache_usage for each in running) / max(1, len(running))
    summed: dict[str, object] = {"stats": _sum_of_stats([each.stats for each in totals], usage)}
    for name in totals[0].__struct_fields__:
        values = [getattr(each, name) for each in totals]
        if name != "stats":
            summed[name] = _sum_of_buckets(values) if isinstance(values[0], Buckets) else _sum_of_counts(values)
    return msgspec.structs.replace(totals[0], **summed)


def _of_the_past(totals: EngineTotals) -> EngineTotals:
    return msgspec.structs.replace(totals, stats=msgspec.structs.replace(totals.stats, **dict.fromkeys(_NOW, 0)))


def _sum_of_stats(stats: Sequence[EngineStats], usage: float) -> EngineStats:
    apart = ("kv_cache_usage", "accepted_by_place", "offload")
    names = [name for name in stats[0].__struct_fields__ if name not in apart]
    summed = {name: sum(getattr(each, name) for each in stats) for name in names}
    by_place = zip_longest(*(each.accepted_by_place for each in stats), fillvalue=0)
    offload = sum_of_offloads(each.offload for each in stats)
    return EngineStats(kv_cache_usage=usage, accepted_by_place=tuple(map(sum, by_place)), offload=offload, **summed)


def _sum_of_counts(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return dict(total)


def _sum_of_buckets(buckets: Sequence[Buckets]) -> Buckets:
    total = Histogram(buckets[0].bounds)
    for each in buckets:
        total.add(each)
    return total.snapshot()


def merged_lists(lists: Sequence[AdapterList]) -> AdapterList:
    """The adapters of at least one engine: one card for each current adapter, and for each content that drains."""
    cards: dict[tuple[str, str | None], list[AdapterCard]] = {}
    for each in lists:
        for card in each.cards:
            cards.setdefault((card.name, None if card.is_current else card.content_hash), []).append(card)
    merged = sorted(map(_merged_card, cards.values()), key=lambda card: (card.name, not card.is_current))
    return msgspec.structs.replace(
        lists[0],
        cards=tuple(merged),
        load_seconds=_sum_of_buckets([each.load_seconds for each in lists]),
        num_slots=sum(each.num_slots for each in lists),
        num_in_slots=sum(each.num_in_slots for each in lists),
        num_in_memory=sum(each.num_in_memory for each in lists),
    )


def _merged_card(cards: Sequence[AdapterCard]) -> AdapterCard:
    """The state of the engine that is best off, and the sums of requests and tokens. Bytes are those of one engine."""
    best = min(cards, key=lambda card: (_BEST_STATE.index(card.state), _BEST_TIER.index(card.tier)))
    sums = ("num_running", "num_waiting", "num_requests", "num_tokens", "num_version_requests", "num_version_tokens")
    return msgspec.structs.replace(best, **{name: sum(getattr(card, name) for card in cards) for name in sums})
