"""Who measures: interleaves the cases of a group, repeats them, and makes a record of each.

One run of one case is one conversation with its workers: they connect, all say so, all are told to go, and
report.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from isthmus.bench import machine
from isthmus.bench.calm import Calm
from isthmus.bench.cases import PACED_GAP_S, SIZES, Case, Settings, cases_of, groups_of
from isthmus.bench.guests import GuestPool, Guests, between_guests
from isthmus.bench.native import Report
from isthmus.bench.process import Pool, Worker, WorkerError
from isthmus.bench.records import Record, median, spread
from isthmus.bench.transports import Job, Setup, Transport

__all__ = ["Runner", "measure"]

#: A run that takes this much longer than its phases is stuck.
PATIENCE_S = 15
#: The same between guests, whose agents may still be starting.
GUESTS_PATIENCE_S = 60
#: How long the other ends of a failed run may take to say why, seconds.
LAST_WORDS_S = 0.5

#: What the two processes of a pair add to a run.
PROCESS_S = 0.05

#: A paced ping needs this many times a bulk run's length: it sends 3000 a second where a bulk run sends
#: millions.
PACED_STRETCH = 4
#: So do these: a loss is rare, many endpoints share what one has elsewhere, and overlap is three loops.
STRETCH = {"loss": 4, "endpoints": 8, "overlap": 3}
#: The loop that a bench plays, where it is not called the same.
LOADS = {"pairs": "stream", "rate": "stream", "loss": "stream", "endpoints": "stream"}


@dataclass
class Run:
    """What one run of one case gave."""

    #: Reports of the ends that wait for an answer or receive: the client of a ping-pong, the server of a
    #: stream.
    figures: list[Report]
    cpu_s: float
    total_bytes: int
    foreign_load: float
    #: What a cache line took from core to core just before; None without the native loops.
    line_us: float | None
    detail: dict[str, Any]
    #: What the senders of a stream sent, the last message included; 0 where the ends do not say.
    sent_bytes: int = 0

    @property
    def uneven(self) -> float | None:
        """How far the pair that is furthest from the mean is from it, as a part of it; None for one pair."""
        rates = [report["bytes"] / report["seconds"] for report in self.figures if report["seconds"]]
        rates = [rate for report in self.figures for rate in report.get("rates", ())] or rates
        mean = sum(rates) / len(rates) if len(rates) > 1 else 0.0
        return max(abs(rate - mean) for rate in rates) / mean if mean else None


@dataclass
class Seat:
    """One worker of a run and what it is to do."""

    worker: Worker
    prefix: Sequence[str]
    job: Job
    #: Whether its figures are the case's, rather than load beside it.
    counts: bool
    report: Report | None = None


@dataclass
class Runner:
    """Runs cases with workers that it keeps.

    Parameters
    ----------
    settings : Settings
        Durations and repeats.
    transports : dict of str to Transport
        By name.
    setups : dict of str to Setup
        What each transport prepared.
    tell : callable
        Told a line for each group, and for each case that failed.
    """

    settings: Settings
    transports: dict[str, Transport]
    setups: dict[str, Setup]
    pool: Pool
    tell: Callable[[str], None]
    cpus: list[int] = field(default_factory=machine.pick_cpus)
    described: dict[str, Any] = field(default_factory=machine.describe)
    guests: Guests | None = None

    def __post_init__(self) -> None:
        self.calm = Calm(self.cpus, quick=self.settings.quick)

    def cost_s(self, cases: Sequence[Case]) -> float:
        """Guess how long one run of each of these cases takes; only their proportions matter."""
        phases_s = self.settings.warmup_s + self.settings.duration_s
        return sum(
            phases_s * (PACED_STRETCH if case.beside is not None else STRETCH.get(case.bench, 1))
            + PROCESS_S * (case.pairs + (case.beside or 0))
            + self.transports[case.transport].start_s
            for case in cases
        )

    def run(self, case: Case) -> Run:
        """Run a case once.

        Raises
        ------
        WorkerError
            No figure came of it; its workers have been ended.
        """
        with tempfile.TemporaryDirectory(prefix="isthmus-bench-") as directory:
            seats: list[Seat] = []
            line_us = self.calm.wait() if self.guests is None else None
            try:
                seats = self._seats(case, directory)
                return self._converse(case, seats, line_us)
            except BaseException as error:
                asked = seats if isinstance(error, WorkerError) else []
                said = [words for seat in asked if (words := seat.worker.last_words(LAST_WORDS_S))]
                for seat in seats:
                    self.pool.discard(seat.worker)
                seats = []
                if said:
                    # One end's failure is often only the news of the other's.
                    raise WorkerError("; the other end: ".join([str(error), *said])) from None
                raise
            finally:
                for seat in seats:
                    self.pool.give_back(seat.prefix, seat.worker)

    def _seats(self, case: Case, directory: str) -> list[Seat]:
        """Give every process of a run its worker and its job."""
        transport, setup = self.transports[case.transport], self.setups[case.transport]
        bulk = replace(case, size=SIZES["pairs"][0], beside=None)
        # Many endpoints are one process on each side.
        pairs = 1 if case.bench == "endpoints" else case.pairs
        plays = [(case, True)] * pairs + [(bulk, False)] * (case.beside or 0)
        seats = []
        for pair, (played, counts) in enumerate(plays):
            place = os.path.join(directory, str(pair))
            os.mkdir(place)
            for role in transport.roles(played):
                prefix = setup.prefix_of(role, pair)
                job = self._job(played, role, pair, place, setup, paced=case.beside is not None)
                seats.append(Seat(self.pool.take(prefix), prefix, job, counts))
        return seats

    def _job(self, case: Case, role: str, pair: int, place: str, setup: Setup, *, paced: bool) -> Job:
        duration_s, gap_s = self.settings.duration_s * STRETCH.get(case.bench, 1), 0.0
        load = LOADS.get(case.bench, case.bench)
        if paced:
            duration_s *= PACED_STRETCH
            if case.beside is not None:
                load, gap_s = "pingpong", PACED_GAP_S
        return Job(
            case=case,
            role=role,
            load=load,
            size=case.size or 1,
            cpus=self._cpus_for(case, role, pair),
            warmup_s=self.settings.warmup_s * STRETCH.get(case.bench, 1),
            duration_s=duration_s,
            gap_s=gap_s,
            directory=place,
            options=setup.options.get(role, {}),
        )

    def _cpus_for(self, case: Case, role: str, pair: int) -> list[int]:
        """Every pair spans two processors, so that none of them has its ends on one."""
        if not case.pinned or self.guests is not None:
            return []
        client, server = self.cpus[2 * pair % len(self.cpus)], self.cpus[(2 * pair + 1) % len(self.cpus)]
        return {"client": [client], "server": [server], "alone": [client, server]}[role]

    def _converse(self, case: Case, seats: list[Seat], line_us: float | None) -> Run:
        setup = self.setups[case.transport]
        longest = max(seat.job.warmup_s + seat.job.duration_s for seat in seats)
        patience_s = PATIENCE_S if self.guests is None else GUESTS_PATIENCE_S
        deadline = time.monotonic() + longest + patience_s
        for seat in seats:
            seat.worker.say(seat.job.as_dict())
        servers = [seat for seat in seats if seat.job.role == "server"]
        callers = [seat for seat in seats if seat.job.role != "server"]
        for server, client in zip(servers, callers, strict=False):
            client.worker.say({"address": server.worker.expect("ready", deadline)["ready"]})
        for seat in callers:
            seat.worker.expect("connected", deadline)
        busy, mediated = machine.busy_seconds(), self._mediated(setup)
        started = time.monotonic()
        # Load first, then what is measured beside it.
        for seat in sorted(callers, key=lambda seat: seat.counts):
            seat.worker.say({"go": True})
        detail = dict(setup.detail)
        for seat in [*callers, *servers]:
            message = seat.worker.expect("report", deadline)
            seat.report = message["report"]
            detail.update(message.get("detail", {}))
        wall = time.monotonic() - started
        mediated = self._mediated(setup) - mediated
        busy = machine.busy_seconds() - busy
        for seat in seats:
            seat.worker.expect("done", deadline)
        reports = [(seat, seat.report) for seat in seats if seat.report is not None]
        # What a guest's program used is in what its monitor did.
        cpu_s = mediated
        if self.guests is None:
            cpu_s += sum(report["cpu_s"] for _, report in reports)
        figures = [report for seat, report in reports if seat.counts and report["seconds"] is not None]
        # In a connect bench both ends count; the client's count is the one without warm-up.
        if case.bench == "connect":
            figures = [report for seat, report in reports if seat.job.role != "server"]
        return Run(
            figures=figures,
            cpu_s=cpu_s,
            total_bytes=sum(report["total_bytes"] for report in figures),
            foreign_load=max(0.0, busy - cpu_s) / (wall * machine.cpu_count()),
            line_us=line_us,
            detail=detail,
            sent_bytes=sum(report["bytes"] for _, report in reports if report["seconds"] is None),
        )

    def _mediated(self, setup: Setup) -> float:
        if self.guests is not None:
            return self.guests.cpu_seconds()
        return machine.cpu_seconds(setup.mediators)

    def group(self, cases: Sequence[Case], deadline: float | None) -> list[Record]:
        """Run cases A B C A B C and return their records, those without a single figure left out.

        Parameters
        ----------
        deadline : float or None, monotonic seconds
            No round is begun that would likely end later; the first is always run.
        """
        runs: dict[Case, list[Run]] = {case: [] for case in cases}
        failed: set[Case] = set()
        for _ in range(self.settings.runs):
            began = time.monotonic()
            for case in cases:
                if case not in failed:
                    try:
                        runs[case].append(self.run(case))
                    except WorkerError as error:
                        failed.add(case)
                        self.tell(f"no figure for {case}: {error}")
            now = time.monotonic()
            if deadline is not None and now + (now - began) > deadline:
                break
        return [record_of(case, found, self.described) for case, found in runs.items() if found]


def record_of(case: Case, runs: Sequence[Run], described: dict[str, Any]) -> Record:
    """Take the medians over all runs of a case."""

    def rate(what: str) -> list[float]:
        return [
            sum(report[what] / report["seconds"] for report in run.figures if report["seconds"])  # type: ignore[literal-required]
            for run in runs
        ]

    # A limit carries no messages, yet memcpy has a rate and a cache line a time.
    timed = case.bench in ("pingpong", "overlap") or case.beside is not None
    p50 = [value for run in runs for report in run.figures if (value := report["p50_us"]) is not None]
    p99 = [value for run in runs for report in run.figures if (value := report["p99_us"]) is not None]
    bulk = case.bench in ("stream", "pairs", "rate", "loss", "endpoints") and not timed
    gbytes = [value / 1e9 for value in rate("bytes")] if bulk else []
    per_second = rate("count") if case.beside is None else []
    cpu = [run.cpu_s / (run.total_bytes / 1e9) for run in runs if bulk and run.total_bytes]
    overlaps = [found for run in runs for report in run.figures if (found := report.get("overlap"))]
    overlap = [statistics.median(found[end] for found in overlaps) for end in (0, 1)] if overlaps else []
    main = [min(found) for found in overlaps] or (
        per_second if case.bench == "rate" else gbytes or p50 or per_second
    )
    detail: dict[str, Any] = {"values": main, "foreign_load": median(run.foreign_load for run in runs)}
    detail["line_us"] = [run.line_us for run in runs]
    if case.bench in ("pairs", "endpoints") and not timed:
        detail["uneven"] = median(uneven for run in runs if (uneven := run.uneven) is not None)
    if case.bench == "loss":
        # The first counted message starts the clock of the receiver, who counts it nowhere.
        sent = sum(run.sent_bytes for run in runs)
        detail["delivered"] = sum(run.total_bytes + (case.size or 0) for run in runs) / sent if sent else None
    if overlap:
        detail["overlap_receiver"], detail["overlap_sender"] = overlap
    for run in runs:
        detail.update(run.detail)
    return Record(
        bench=case.bench,
        transport=case.transport,
        path=case.path,
        client=case.client,
        wait=case.wait,
        size=case.size,
        pairs=case.pairs,
        data=case.data,
        pages=case.pages,
        pinned=case.pinned,
        beside=case.beside,
        p50_us=median(p50),
        p99_us=median(p99),
        gbytes_per_s=median(gbytes),
        per_second=median(per_second),
        cpu_s_per_gb=median(cpu),
        overlap=min(overlap) if overlap else None,
        runs=len(runs),
        spread=spread(main),
        detail=detail,
        machine=described,
    )


def measure(
    benches: Sequence[str],
    settings: Settings,
    transports: Iterable[Transport],
    *,
    tell: Callable[[str], None],
    deadline: float | None = None,
    between: str | None = None,
) -> list[Record]:
    """Measure benches and return their records in the order of their cases.

    Parameters
    ----------
    transports : iterable of Transport
        Those that cannot be measured here are left out, and `tell` is told why.
    tell : callable
        Told one line at a time: what is being measured, what was left out and why.
    deadline : float or None, monotonic seconds
        When a quick run has to be over. The time left is shared among the groups left.
    between : {"uml", "qemu"}, optional
        Both ends are in guests of this monitor.
    """
    settings = replace(settings, benches=len(benches), guests=between is not None)
    present: dict[str, Transport] = {}
    for transport in transports:
        if between is not None:
            found = between_guests(transport)
            if found is not None:
                present[transport.name] = found
            continue
        reason = transport.missing()
        if reason is None:
            present[transport.name] = transport
        else:
            tell(f"left out: {transport.name}: {reason}")
    cases = [
        case
        for bench in benches
        for case in cases_of(bench, settings, list(present.values()), lambda line: tell(f"left out: {line}"))
    ]
    settings = replace(settings, paths=frozenset(case.path for case in cases))
    groups = groups_of(cases)
    records: list[Record] = []
    with ExitStack() as stack:
        used = {case.transport for case in cases}
        setups = {name: present[name].prepare(stack, settings) for name in present if name in used}
        # Entered last, so that workers end before what they use.
        pool: Pool
        if between is None:
            pool = stack.enter_context(Pool())
            runner = Runner(settings, present, setups, pool, tell)
        else:
            most = max((case.pairs + (case.beside or 0) for case in cases), default=1)
            guests = stack.enter_context(Guests(between, most))
            pool = inside = GuestPool(guests)
            stack.enter_context(pool)
            tell(f"{len(guests.names)} guests: {guests.described}")
            inside.start(guests.names)
            runner = Runner(settings, present, setups, pool, tell, guests=guests)
            runner.described["guests"] = guests.described
        for done, group in enumerate(groups):
            now = time.monotonic()
            if deadline is not None and now > deadline:
                tell(f"left out: {group.title}: the time of a quick run is over")
                continue
            costs = [runner.cost_s(rest.cases) for rest in groups[done:]]
            share = None if deadline is None else now + (deadline - now) * costs[0] / sum(costs)
            tell(f"{group.title}: {len(group.cases)} candidates")
            records += runner.group(group.cases, share)
    return records
