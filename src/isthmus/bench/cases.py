"""What is measured: every bench is a list of cases, grouped into those that are compared with each other."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from isthmus.bench.transports import Transport

__all__ = [
    "BENCHES",
    "CLIENTS",
    "MX_BENCHES",
    "WAITS",
    "Case",
    "Settings",
    "cases_of",
    "groups_of",
    "parse_sizes",
]

BENCHES = ("pingpong", "stream", "pairs", "connect")
#: What `isthmus bench mx` measures: also small messages with many under way, transfers beside work, lost
#: frames, and many endpoints of one card.
MX_BENCHES = ("pingpong", "stream", "rate", "overlap", "loss", "endpoints")
#: Who drives: loops in Rust, the same with messages that stay in the rings, loops in Python, an event loop.
CLIENTS = ("native", "in-place", "python", "asyncio")
WAITS = ("spin", "adaptive", "block")

KIB, MIB = 1 << 10, 1 << 20

#: The same however long the run is.
MX_SIZES: dict[str, tuple[int, ...]] = {
    "rate": (64,),
    "overlap": (MIB, 4 * MIB),
    "loss": (MIB,),
    "endpoints": (64 * KIB,),
}
#: Sizes that show where each transport bends, and the few that fit into a quick run.
SIZES: dict[str, tuple[int, ...]] = {
    "pingpong": (1, 64, KIB, 4 * KIB),
    "stream": (4 * KIB, 64 * KIB, 512 * KIB, MIB, 4 * MIB),
    "pairs": (512 * KIB,),
    **MX_SIZES,
}
QUICK_SIZES: dict[str, tuple[int, ...]] = {
    "pingpong": (64, 4 * KIB),
    "stream": (64 * KIB, 512 * KIB),
    "pairs": (512 * KIB,),
    **MX_SIZES,
}
QUICKEST_SIZES: dict[str, tuple[int, ...]] = {
    "pingpong": (64,),
    "stream": (512 * KIB,),
    "pairs": (512 * KIB,),
    **MX_SIZES,
}

#: Phases between guests are this much longer.
GUESTS_STRETCH = 4

#: A paced ping: one each 0.3 ms, so that every one finds its peer asleep or busy with somebody else.
PACED_SIZE = 64
PACED_GAP_S = 0.0003


@dataclass(frozen=True)
class Case:
    """One thing to measure. Fields as in :class:`isthmus.bench.records.Record`."""

    bench: str
    transport: str
    path: str | None
    client: str
    wait: str
    size: int | None
    pairs: int = 1
    data: str = "hot"
    pages: str = "4k"
    pinned: bool = True
    beside: int | None = None

    def __str__(self) -> str:
        words = [self.bench, self.transport, self.path, self.client, self.wait]
        words += [
            None if self.size is None else f"{self.size} B",
            f"{self.pairs} {'endpoints' if self.bench == 'endpoints' else 'pairs'}"
            if self.pairs > 1
            else None,
        ]
        words += [
            None if self.data == "hot" else self.data,
            None if self.pages == "4k" else f"{self.pages} pages",
        ]
        words += [None if self.pinned else "unpinned"]
        words += [None if self.beside is None else f"beside {self.beside} pairs"]
        return " ".join(word for word in words if word)


@dataclass(frozen=True)
class Settings:
    """What the user asked for. An empty tuple means: what suits the bench."""

    sizes: tuple[int, ...] = ()
    transports: tuple[str, ...] = ()
    clients: tuple[str, ...] = ()
    waits: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    pages: tuple[str, ...] = ()
    pairs: tuple[int, ...] = ()
    pinned: tuple[bool, ...] = ()
    repeat: int | None = None
    quick: bool = False
    #: Both ends are in guests.
    guests: bool = False
    #: Paths that any case takes.
    paths: frozenset[str | None] = frozenset()
    #: Sizes by bench in the place of the usual ones.
    usual: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    #: Several benches share the time of a quick run.
    benches: int = 1

    @property
    def runs(self) -> int:
        """Runs of each case; a quick run takes as many of them as its time allows."""
        return self.repeat if self.repeat is not None else 3 if self.quick else 5

    @property
    def usual_sizes(self) -> dict[str, tuple[int, ...]]:
        """Sizes by bench for those who named none."""
        quick = QUICK_SIZES if self.benches == 1 else QUICKEST_SIZES
        return {**(quick if self.quick else SIZES), **self.usual}

    @property
    def duration_s(self) -> float:
        """Length of one measured phase; guests take longer to find their speed."""
        return (0.06 if self.quick else 0.25) * (GUESTS_STRETCH if self.guests else 1)

    @property
    def warmup_s(self) -> float:
        """Length of the phase before it."""
        return (0.015 if self.quick else 0.05) * (GUESTS_STRETCH if self.guests else 1)


@dataclass
class Group:
    """Cases whose runs are interleaved, A B C A B C, because their figures are compared."""

    title: str
    cases: list[Case] = field(default_factory=list)


def parse_sizes(text: str) -> tuple[int, ...]:
    """Turn ``64,4K,1M`` into bytes; K, M and G are powers of 1024.

    Raises
    ------
    ValueError
        A word is not a size, or is 0.
    """
    sizes = []
    for word in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*([KMG]?)(?:i?B)?\s*", word, re.IGNORECASE)
        if match is None or int(match[1]) == 0:
            raise ValueError(f"size {word!r}: give bytes, as in 64,4K,1M")
        sizes.append(int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2].upper()])
    return tuple(sizes)


def cases_of(
    bench: str, settings: Settings, transports: Sequence[Transport], skipped: Callable[[str], None]
) -> list[Case]:
    """Return the cases of `bench` that were asked for and can be measured; say why not the rest.

    Parameters
    ----------
    skipped : callable
        Told one sentence for each transport, or choice of it, that was asked for and cannot be measured.
    """
    cases: list[Case] = []
    for transport in transports:
        for client, path in itertools.product(settings.clients or CLIENTS, transport.paths_for(bench)):
            waits = settings.waits or transport.waits_for(bench, client)
            for shape, wait in itertools.product(_shapes(bench, settings), waits):
                case = replace(shape, transport=transport.name, path=path, client=client, wait=wait)
                case = transport.normal(case)
                reason = transport.refuses(case)
                if reason is None:
                    cases.append(case)
                elif _was_asked_for(case, settings, transport):
                    skipped(f"{case}: {reason}")
    return list(dict.fromkeys(cases))


def _was_asked_for(case: Case, settings: Settings, transport: Transport) -> bool:
    """Whether somebody would miss this case: they named its client or its wait."""
    return case.bench in transport.benches and (
        case.client in settings.clients or case.wait in settings.waits
    )


def _shapes(bench: str, settings: Settings) -> Iterable[Case]:
    """Everything about the cases of a bench but who carries them."""
    blank = Case(bench=bench, transport="", path=None, client="", wait="", size=None)
    if bench == "connect":
        yield blank
        return
    sizes = settings.sizes or settings.usual_sizes[bench]
    if bench == "pairs":
        counts = settings.pairs or ((1, 4) if settings.quick else (1, 2, 4, 8))
        hurried = settings.quick and settings.benches > 1
        # A guest's processors are threads of its monitor, which nobody pins.
        usual = (False,) if settings.guests else (True,) if hurried else (True, False)
        pinned = settings.pinned or usual
        for size, pin, pairs in itertools.product(sizes, pinned, counts):
            yield replace(blank, size=size, pairs=pairs, pinned=pin)
        beside = (max(counts),) if settings.quick else (0, *counts)
        for bulk in beside:
            yield replace(blank, size=PACED_SIZE, beside=bulk, pinned=pinned[0])
        return
    if bench in ("overlap", "endpoints"):
        # Who computes beside its own progress, or has many threads, needs more than one processor.
        pinned = settings.pinned or (False,)
        counts = (1,) if bench == "overlap" else settings.pairs or ((64,) if settings.quick else (1, 8, 64))
        for size, pairs in itertools.product(sizes, counts):
            yield replace(blank, size=size, pairs=pairs, pinned=pinned[0])
        return
    for size in sizes:
        for data, pages in itertools.product(settings.data or ("hot",), settings.pages or ("4k",)):
            yield replace(blank, size=size, data=data, pages=pages, pinned=(settings.pinned or (True,))[0])
    if (
        bench == "stream"
        and not settings.quick
        and not settings.data
        and not settings.pages
        and not settings.sizes
    ):
        # The two things that move throughput more than the transport does, at the size where it matters most.
        yield replace(blank, size=512 * KIB, data="cold")
        yield replace(blank, size=512 * KIB, pages="huge")


def groups_of(cases: Iterable[Case]) -> list[Group]:
    """Group cases that differ in transport, path and wait alone; each group keeps the order of its cases."""
    groups: dict[Case, Group] = {}
    for case in cases:
        client = "native" if case.client == "in-place" else case.client
        key = replace(case, transport="", path=None, wait="", client=client)
        title = str(replace(key, transport="", wait=""))
        groups.setdefault(key, Group(title)).cases.append(case)
    return list(groups.values())
