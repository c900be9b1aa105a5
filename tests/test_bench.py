"""`isthmus bench` without Isthmus: records, tables, plots, the bridge, every baseline's bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import fields, replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import LIMIT_S, becomes, started
from rich.console import Console

from isthmus.bench import loops, native, programs_guests, transports
from isthmus.bench.bridge import Bridge, BridgeError
from isthmus.bench.cable import LOST, Cable
from isthmus.bench.cases import MX_BENCHES, Case, Settings, cases_of, groups_of, parse_sizes
from isthmus.bench.cli import bench_group
from isthmus.bench.plots import write_plots
from isthmus.bench.process import Pool, WorkerError
from isthmus.bench.records import Record, median, records_as_json, spread
from isthmus.bench.runner import Run, Runner, measure, record_of
from isthmus.bench.table import print_tables, ratio, size_word
from isthmus.bench.transports.ucx import parse_final
from isthmus.vm.guest import descendants
from isthmus.vm.kernels import Missing, uml_kernel

BASELINES = ("tcp-bridge", "unix", "mapped-ring")
CLIENTS = ("native", "python")
BRIEF = Settings(quick=True, repeat=1)

PING = Case("pingpong", "tcp-bridge", None, "native", "spin", 64)


def record(**changes: object) -> Record:
    """A record of TCP spinning at 64 bytes, with changes."""
    run = Run([native.report(p50_us=4.9, p99_us=6.0, count=10, seconds=0.1)], 0.1, 0, 0.0, None, {})
    return replace(record_of(PING, [run], {"cpu_model": "abacus", "cores": 2}), **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def bridge_or_skip() -> None:
    try:
        with Bridge():
            pass
    except BridgeError as error:
        pytest.skip(f"no network namespaces here: {error}")


@pytest.fixture(autouse=True, scope="module")
def _nothing_is_left() -> Iterator[None]:
    """Whatever a test started has ended when they are all over."""
    yield
    started = subprocess.run(
        ["ps", "--ppid", str(os.getpid()), "-o", "args="], capture_output=True, text=True
    )
    left = [
        line for line in started.stdout.splitlines() if "isthmus.bench.worker" in line or line.endswith("cat")
    ]
    assert not left


# Figures


def test_sizes_are_bytes_with_binary_suffixes() -> None:
    assert parse_sizes("1, 64,4k,512KiB,1M") == (1, 64, 4096, 512 << 10, 1 << 20)
    for wrong in ("", "0", "-1", "4T", "64,,1", "x"):
        with pytest.raises(ValueError, match="size"):
            parse_sizes(wrong)
    assert [size_word(size) for size in (1, 64, 1000, 4096, 1 << 20, None)] == [
        "1",
        "64",
        "1000",
        "4K",
        "1M",
        "",
    ]


def test_medians_and_spread_ignore_what_is_absent() -> None:
    assert median([3.0, None, 1.0, 2.0]) == 2.0
    assert median([None]) is None
    assert spread([9.0, 10.0, 12.0]) == pytest.approx(0.3)
    assert spread([]) is None


def test_a_record_is_the_medians_of_its_runs() -> None:
    case = Case("stream", "unix", None, "native", "block", 1000, pairs=2)
    runs = []
    for nanoseconds in (1.0, 2.0, 4.0):
        figures = [native.report(count=10, bytes=10_000, seconds=1e-6 * nanoseconds, total_bytes=20_000)] * 2
        runs.append(Run(figures, 0.004 * nanoseconds, 40_000, 0.0, 0.06, {"send_buffer": 1}))
    found = record_of(case, runs, {})
    assert found.gbytes_per_s == pytest.approx(10.0), "two pairs, 10 kB in 2 us each"
    assert found.per_second == pytest.approx(10e6)
    assert found.cpu_s_per_gb == pytest.approx(0.008 / 40e-6)
    assert found.runs == 3
    assert found.spread == pytest.approx((20 - 5) / 10)
    assert found.p50_us is None
    assert found.detail["send_buffer"] == 1
    assert found.detail["line_us"] == [0.06] * 3


def test_json_is_one_list_with_every_field_and_null_for_what_is_absent() -> None:
    listed = json.loads(records_as_json([record(), record(path="sealed", gbytes_per_s=1 / 3)]))
    assert [set(item) for item in listed] == [{field.name for field in fields(Record)}] * 2
    wanted = "bench transport path client wait size pairs data pages p50_us p99_us gbytes_per_s per_second"
    assert set(f"{wanted} cpu_s_per_gb runs spread machine".split()) <= set(listed[0])
    assert listed[0]["path"] is None
    assert listed[0]["gbytes_per_s"] is None
    assert listed[1]["gbytes_per_s"] == 0.333333
    assert json.loads(records_as_json([])) == []


def test_ratios_compare_what_is_comparable() -> None:
    block = record(wait="block", p50_us=26.3)
    ring = record(transport="mapped-ring", p50_us=0.075)
    everything = [record(), block, ring]
    assert ratio(ring, everything, "p50_us", "spin") == pytest.approx(4.9 / 0.075)
    assert ratio(ring, everything, "p50_us", "block") == pytest.approx(26.3 / 0.075)
    assert ratio(replace(ring, size=4096), everything, "p50_us") is None
    assert ratio(replace(ring, client="python"), everything, "p50_us") is None
    faster = [
        record(bench="stream", gbytes_per_s=8.5),
        record(bench="stream", transport="unix", gbytes_per_s=17.0),
    ]
    assert ratio(faster[1], faster, "gbytes_per_s") == pytest.approx(2.0)


def test_tables_show_every_record_and_its_ratio() -> None:
    console = Console(record=True, width=130, file=open(os.devnull, "w"))  # noqa: SIM115
    everything = [
        record(),
        record(transport="isthmus", path="sealed", p50_us=0.075),
        record(bench="stream", size=512 << 10, wait="block", gbytes_per_s=8.5, cpu_s_per_gb=0.2),
        record(bench="pairs", size=512 << 10, pairs=8, gbytes_per_s=10.5, pinned=False),
        record(bench="pairs", beside=4, p99_us=3518.0),
        record(
            bench="connect",
            size=None,
            per_second=12345.0,
            detail={"foreign_load": 0.5, "line_us": [0.06, 0.24]},
        ),
        record(bench="rate", transport="mx", path="wire", per_second=98765.0, cpu_s_per_gb=125.0),
        record(bench="overlap", overlap=0.25, detail={"overlap_receiver": 0.25, "overlap_sender": 0.75}),
        record(bench="loss", transport="mx", path="wire", gbytes_per_s=2.0, detail={"delivered": 1.0}),
        record(bench="loss", transport="mx", path="wire-lossy", gbytes_per_s=1.1, detail={"delivered": 1.0}),
        record(bench="endpoints", pairs=63, detail={"uneven": 0.0712, "idle_endpoint_kib": 81.5}),
    ]
    print_tables(everything, console)
    console.file.close()
    text = console.export_text()
    for word in (
        "isthmus sealed",
        "65.33 ×",
        "8.5",
        "unpinned",
        "4 pairs",
        "3,518",
        "12,345",
        "98,765",
        "8",
        "75%",
        "55%",
        "63",
        "7%",
        "81.50",
        "abacus",
        "0.060 µs apart",
    ):
        assert word in text


def test_plots_are_written_for_what_was_measured(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    points = [record(size=size, p50_us=size / 10) for size in (1, 64, 4096)]
    points += [record(bench="pairs", size=512 << 10, pairs=pairs, gbytes_per_s=9.0) for pairs in (1, 8)]
    points += [
        record(bench="rate", per_second=1e6),
        record(bench="overlap", overlap=0.5),
        record(bench="loss", gbytes_per_s=1.0),
        record(bench="endpoints", pairs=64, gbytes_per_s=1.0),
    ]
    written = write_plots(points, tmp_path / "deep" / "out")
    names = ("latency", "rate", "loss", "overlap", "endpoints", "pairs-pinned")
    assert [path.name for path in written] == [f"{name}.{kind}" for name in names for kind in ("png", "svg")]
    assert all(path.stat().st_size > 5000 for path in written)
    assert write_plots([], tmp_path) == []


# Which cases, in which order


class Fake(transports.Transport):
    """A transport with nothing behind it."""

    def __init__(self, name: str) -> None:
        self.name = name  # type: ignore[misc]


class FakeRunner(Runner):
    """Remembers what it was told to run."""

    order: list[str]

    def run(self, case: Case) -> Run:
        self.order.append(case.transport)
        if case.transport == "broken":
            raise WorkerError("it broke")
        return Run([native.report(p50_us=1.0, count=1, seconds=1.0)], 0.0, 0, 0.0, None, {})


def fake_runner(settings: Settings, told: list[str]) -> FakeRunner:
    runner = FakeRunner(settings, {}, {}, Pool(), told.append, cpus=[0, 1], described={})
    runner.order = []
    return runner


def test_runs_of_a_group_are_interleaved_and_a_broken_case_stops_only_itself() -> None:
    told: list[str] = []
    runner = fake_runner(Settings(repeat=3), told)
    records = runner.group([replace(PING, transport=name) for name in ("a", "broken", "b")], None)
    assert runner.order == ["a", "broken", "b", "a", "b", "a", "b"]
    assert [(found.transport, found.runs) for found in records] == [("a", 3), ("b", 3)]
    assert told == ["no figure for pingpong broken native spin 64 B: it broke"]


def test_a_group_whose_time_is_over_is_still_run_once() -> None:
    runner = fake_runner(Settings(repeat=3), [])
    records = runner.group([PING], time.monotonic() - 1)
    assert [found.runs for found in records] == [1]


def test_candidates_of_one_situation_form_one_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "missing", lambda: None)
    settings = Settings(sizes=(64, 4096), clients=("native",), waits=("spin", "block"))
    told: list[str] = []
    cases = cases_of("pingpong", settings, [Fake("a"), Fake("b")], told.append)
    groups = groups_of(cases)
    assert [[(case.transport, case.wait) for case in group.cases] for group in groups] == [
        [("a", "spin"), ("a", "block"), ("b", "spin"), ("b", "block")]
    ] * 2
    assert told == []


def test_what_cannot_be_measured_is_left_out_aloud(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "missing", lambda: "not built today")
    told: list[str] = []
    settings = Settings(sizes=(64,), clients=("native", "asyncio"), waits=("spin",))
    assert cases_of("pingpong", settings, [Fake("a")], told.append) == []
    assert any("not built today" in line for line in told)
    assert any("no asyncio client" in line for line in told)


# The bridge


def in_namespace(bridge: Bridge | Cable, side: str, *command: str) -> str:
    return subprocess.run([*bridge.prefix(side), *command], capture_output=True, text=True, check=True).stdout


def links() -> str:
    return Path("/proc/net/dev").read_text().split("lo:")[0] + str(sorted(os.listdir("/sys/class/net")))


@pytest.mark.usefixtures("bridge_or_skip")
def test_two_namespaces_reach_each_other_and_the_machine_is_not_touched() -> None:
    before = links()
    with Bridge() as bridge:
        assert links() == before
        command = [*bridge.prefix("right"), sys.executable, "-c", LISTEN, bridge.right_address]
        with started(command) as server:
            assert server.stdout is not None
            port = server.stdout.readline().strip()
            said = in_namespace(bridge, "left", sys.executable, "-c", CONNECT, bridge.right_address, port)
        assert said.strip() == bridge.left_address
        inside = in_namespace(
            bridge, "left", sys.executable, "-c", "import os; print(os.readlink('/proc/self/ns/net'))"
        )
        assert inside.strip() != os.readlink("/proc/self/ns/net")
        holders = [int(bridge.prefix(side)[-2]) for side in ("left", "right")]
    assert links() == before
    assert not any(Path(f"/proc/{pid}").exists() for pid in holders)


LISTEN = """
import socket, sys
listener = socket.create_server((sys.argv[1], 0))
print(listener.getsockname()[1], flush=True)
connection, peer = listener.accept()
connection.sendall(peer[0].encode())
connection.close()
listener.close()
"""
CONNECT = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2]))) as connection:
    print(connection.recv(100).decode())
"""


@pytest.mark.usefixtures("bridge_or_skip")
def test_a_bridge_goes_with_the_process_that_made_it_even_if_that_is_killed() -> None:
    program = """
import sys, time
from isthmus.bench.bridge import Bridge
with Bridge() as bridge:
    print(*(bridge.prefix(side)[-2] for side in ("left", "right")), flush=True)
    time.sleep(60)
"""
    with started([sys.executable, "-c", program]) as maker:
        assert maker.stdout is not None
        holders = [Path(f"/proc/{pid}") for pid in maker.stdout.readline().split()]
        assert len(holders) == 2
        assert all(holder.exists() for holder in holders)
        maker.send_signal(signal.SIGKILL)
    becomes(lambda: not any(holder.exists() for holder in holders), "holders are left")


def test_a_missing_tool_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    with pytest.raises(BridgeError, match="ip is not installed"):
        Bridge().__enter__()


# The baselines, in real processes


def measured(bench: str, client: str, names: tuple[str, ...], **changes: object) -> list[Record]:
    """Measure briefly; the loops themselves check every byte of the last message."""
    told: list[str] = []
    settings = replace(BRIEF, clients=(client,), **changes)  # type: ignore[arg-type]
    found = measure([bench], settings, [transports.load(name) for name in names], tell=told.append)
    assert not [line for line in told if line.startswith("no figure")]
    return found


@pytest.fixture(params=CLIENTS)
def client(request: pytest.FixtureRequest) -> str:
    if request.param == "native" and (reason := native.missing()):
        pytest.skip(f"no native client: {reason}")
    return str(request.param)


@pytest.fixture(params=BASELINES)
def baseline(request: pytest.FixtureRequest) -> str:
    if reason := transports.load(request.param).missing():
        pytest.skip(f"{request.param}: {reason}")
    return str(request.param)


@pytest.mark.parametrize("size", [1, 70_001])
def test_a_ping_comes_back_as_it_left(baseline: str, client: str, size: int) -> None:
    found = measured("pingpong", client, (baseline,), sizes=(size,), waits=("spin", "adaptive", "block"))
    assert [each.wait for each in found] == ["spin", "adaptive", "block"]
    for each in found:
        assert each.p50_us is not None
        assert each.p99_us is not None
        assert 0 < each.p50_us <= each.p99_us
        assert each.gbytes_per_s is None


def test_a_stream_ends_in_the_receivers_buffer(baseline: str, client: str) -> None:
    found = measured("stream", client, (baseline,), sizes=(300_000,), waits=("block", "adaptive"))
    assert len(found) == 2
    for each in found:
        assert each.gbytes_per_s is not None
        assert each.cpu_s_per_gb is not None
        assert each.gbytes_per_s > 0
        assert each.cpu_s_per_gb > 0
        assert each.p50_us is None
        if baseline == "tcp-bridge":
            assert each.detail["congestion_control"] == "cubic"


def test_cold_data_on_huge_pages_is_walked_by_the_native_client(baseline: str) -> None:
    if reason := native.missing():
        pytest.skip(f"no native client: {reason}")
    found = measured("stream", "native", (baseline,), sizes=(1 << 20,), data=("cold",), pages=("huge",))
    assert found
    assert all((each.data, each.pages) == ("cold", "huge") and each.gbytes_per_s for each in found)


def test_huge_pages_under_python_buffers() -> None:
    (found,) = measured("stream", "python", ("unix",), sizes=(300_000,), pages=("huge",))
    assert found.pages == "huge"
    assert found.gbytes_per_s


def test_pairs_measure_together_and_a_ping_beside_them(baseline: str) -> None:
    if reason := native.missing():
        pytest.skip(f"no native client: {reason}")
    found = measured("pairs", "native", (baseline,), pairs=(2,))
    together = [each for each in found if each.beside is None]
    assert [(each.pairs, each.pinned) for each in together] == [(2, True), (2, False)]
    assert all(each.gbytes_per_s for each in together)
    (ping,) = [each for each in found if each.beside == 2]
    assert ping.p50_us
    assert ping.gbytes_per_s is None


@pytest.mark.parametrize("name", ["tcp-bridge", "unix"])
def test_connections_are_counted(name: str, client: str) -> None:
    if reason := transports.load(name).missing():
        pytest.skip(f"{name}: {reason}")
    (found,) = measured("connect", client, (name,))
    assert found.per_second is not None
    assert found.per_second > 0
    assert found.size is None


def test_a_round_trip_is_awaited_in_one_event_loop() -> None:
    (found,) = measured("pingpong", "asyncio", ("unix",), sizes=(64,))
    assert found.client == "asyncio"
    assert found.p50_us


def test_the_limits_are_measured_in_the_same_run() -> None:
    if reason := native.missing():
        pytest.skip(f"no limits: {reason}")
    (line,) = measured("pingpong", "native", ("cacheline",), sizes=(4096,))
    assert line.size == 64
    assert line.p50_us
    (copy,) = measured("stream", "native", ("memcpy",), sizes=(65536,))
    assert copy.gbytes_per_s


@pytest.mark.parametrize("name", ["pyzmq", "mpi4py", "ucx", "iceoryx2"])
def test_an_installed_peer_gives_figures(name: str) -> None:
    transport = transports.load(name)
    if reason := transport.missing():
        pytest.skip(f"{name}: {reason}")
    for client in transport.clients:
        if transport.refuses(replace(PING, transport=name, client=client)):
            continue
        (ping,) = measured("pingpong", client, (name,), sizes=(64,))
        (stream,) = measured("stream", client, (name,), sizes=(65536,))
        assert ping.p50_us
        assert stream.gbytes_per_s


# MX


@pytest.fixture
def cable_or_skip() -> None:
    if reason := transports.load("mx").missing():
        pytest.skip(f"mx: {reason}")


@pytest.mark.usefixtures("cable_or_skip")
def test_many_small_messages_are_under_way(client: str) -> None:
    found = measured("rate", client, ("isthmus", "mx", "tcp-cable"), waits=("block", "adaptive"))
    assert {(each.transport, each.path) for each in found} == {
        ("isthmus", "sealed"),
        ("isthmus", "put"),
        ("mx", "sealed"),
        ("mx", "wire"),
        ("tcp-cable", None),
    }
    for each in found:
        assert each.size == 64
        assert each.per_second is not None
        assert each.per_second > 0
        assert each.detail["values"] == [each.per_second]


@pytest.mark.usefixtures("cable_or_skip")
def test_a_transfer_and_work_are_timed_alone_and_together() -> None:
    found = measured("overlap", "python", ("mx",), sizes=(300_000,))
    assert [each.path for each in found] == ["sealed", "wire"]
    for each in found:
        ends = each.detail["overlap_receiver"], each.detail["overlap_sender"]
        assert each.overlap == min(ends)
        assert all(0 <= end <= 1 for end in ends)
        assert each.p50_us
        assert not each.pinned


def test_what_is_hidden_is_a_part_of_the_shorter() -> None:
    assert loops.hidden(2.0, 2.0, 2.0) == 1.0
    assert loops.hidden(2.0, 2.0, 3.0) == 0.5
    assert loops.hidden(1.0, 3.0, 3.5) == 0.5
    assert loops.hidden(2.0, 2.0, 9.0) == 0.0, "slower than one after the other"
    assert loops.hidden(2.0, 2.0, 1.0) == 1.0, "faster than either"


@pytest.mark.usefixtures("cable_or_skip")
def test_lost_frames_lose_no_message() -> None:
    found = measured("loss", "native", ("mx", "tcp-cable", "tcp-cable-lossy"), sizes=(100_000,))
    assert [each.name for each in found] == ["mx wire", "mx wire-lossy", "tcp-cable", "tcp-cable-lossy"]
    for each in found:
        assert each.gbytes_per_s
        assert each.detail["delivered"] == 1.0
    assert found[1].detail["frames_lost_by"] == "cable"
    assert found[1].detail["frames_lost"] > LOST / 3


@pytest.mark.usefixtures("cable_or_skip")
def test_where_the_kernel_drops_nothing_cards_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.bench.cable._dropping", lambda _: "nonsense")
    (lossless, lossy) = measured("loss", "native", ("mx",), sizes=(100_000,))
    assert (lossless.path, lossy.path) == ("wire", "wire-lossy")
    assert lossy.detail["frames_lost_by"] == "card"
    assert lossy.detail["frames_lost"] > LOST / 3
    assert lossy.detail["delivered"] == 1.0


@pytest.mark.usefixtures("cable_or_skip")
def test_many_endpoints_of_a_card_are_measured_one_by_one() -> None:
    found = measured("endpoints", "native", ("mx",), pairs=(9,), sizes=(10_000,))
    assert [(each.pairs, each.path) for each in found] == [(9, "wire"), (9, "wire-1G")]
    for each in found:
        assert each.gbytes_per_s
        assert each.detail["uneven"] > 0
        assert 0 < each.detail["idle_endpoint_kib"] < 1024
    assert (found[1].gbytes_per_s or 1.0) < 0.15, "more than the cable carries"


@pytest.mark.usefixtures("cable_or_skip")
def test_a_lossy_cable_loses_what_it_says() -> None:
    count = 4000
    with Cable(lost=LOST) as cable:
        command = [*cable.prefix("right"), sys.executable, "-c", COUNT, cable.right_address]
        with started(command) as counting:
            assert counting.stdout is not None
            port = counting.stdout.readline().strip()
            in_namespace(cable, "left", sys.executable, "-c", TELL, cable.right_address, port, str(count))
            arrived = int(counting.communicate()[0])
    assert 0.97 * count < arrived < 0.999 * count


COUNT = """
import socket, sys
SO_RCVBUFFORCE = 33
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as heard:
    heard.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 1 << 24)
    heard.bind((sys.argv[1], 0))
    print(heard.getsockname()[1], flush=True)
    heard.settimeout(60)
    count = 0
    while heard.recv(10) != b"end":
        count += 1
    print(count)
"""
# Forty at a time, as many as any queue on the way holds; the end is said often enough to be heard. The socket
# is not connected: it is not told that whoever heard the first end is gone.
TELL = """
import socket, sys, time
to = sys.argv[1], int(sys.argv[2])
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as told:
    for number in range(int(sys.argv[3])):
        told.sendto(b"x", to)
        if number % 40 == 0:
            time.sleep(0.002)
    time.sleep(0.1)
    for _ in range(5):
        told.sendto(b"end", to)
"""


def test_mpi_is_measured_as_mx_is() -> None:
    transport = transports.load("mpi4py")
    if reason := transport.missing():
        pytest.skip(f"mpi4py: {reason}")
    for client in transport.clients:
        if not transport.refuses(replace(PING, transport="mpi4py", client=client)):
            (rate,) = measured("rate", client, ("mpi4py",))
            assert rate.per_second
    (overlap,) = measured("overlap", "python", ("mpi4py",), sizes=(300_000,))
    assert overlap.overlap is not None
    assert 0 <= overlap.overlap <= 1


@pytest.mark.usefixtures("cable_or_skip")
def test_the_benches_of_mx_are_chosen_by_name() -> None:
    words = "mx rate overlap --quick --repeat 1 --clients python --transports mx --waits adaptive --json"
    done = CliRunner().invoke(bench_group, words.split())
    assert done.exit_code == 0, done.output
    listed = json.loads(done.stdout)
    assert {item["bench"] for item in listed} == {"rate", "overlap"}
    assert all((item["overlap"] is not None) == (item["bench"] == "overlap") for item in listed)
    refused = CliRunner().invoke(bench_group, ["mx", "pigeon"])
    assert refused.exit_code == 2
    assert all(name in refused.output for name in MX_BENCHES)


def test_ucx_perftests_last_line_is_read_by_position() -> None:
    sample = "Final:  1000000  0.106  0.106  0.106  576.05  576.05  9437777  9437777\n"
    assert parse_final(f"[1700000000.1] warning\n{sample}") == (0.106, 576.05)
    with pytest.raises(ValueError, match="no route"):
        parse_final("no route to host")


def test_a_channel_that_damages_messages_gets_no_figure() -> None:
    class Damaging:
        def send(self, message: bytearray) -> None:
            self.sent = bytes(message)

        def recv_into(self, message: bytearray) -> None:
            message[:] = self.sent
            message[40] ^= 1

    job = transports.Job(PING, "client", "pingpong", 64, [], 0.0, 0.0, 0.0, "", {})
    with pytest.raises(ValueError, match="byte 40 of the last message"):
        loops.play(job, Damaging())


def test_a_worker_that_fails_says_why_and_leaves_nobody_waiting() -> None:
    with ExitStack() as stack:
        pool = stack.enter_context(Pool())
        # Without what `prepare` makes, the server does not know its address, and the client waits for it.
        setups = {"tcp-bridge": transports.Setup()}
        runner = Runner(BRIEF, {"tcp-bridge": transports.load("tcp-bridge")}, setups, pool, print)
        with pytest.raises(WorkerError, match="KeyError: 'host'"):
            runner.run(replace(PING, client="python"))


# The command


def test_json_is_all_there_is_on_standard_output(tmp_path: Path) -> None:
    arguments = "--quick --repeat 1 --sizes 64 --clients python --transports unix,pyzmq --waits block --json"
    done = CliRunner().invoke(bench_group, ["pingpong", *arguments.split(), "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    listed = json.loads(done.stdout)
    assert {item["transport"] for item in listed} <= {"unix", "pyzmq"}
    assert listed[0]["machine"]["congestion_control"] == "cubic"
    assert (tmp_path / "records.json").exists()


def test_an_unknown_word_is_refused_with_the_choices() -> None:
    done = CliRunner().invoke(bench_group, ["stream", "--transports", "pigeon"])
    assert done.exit_code == 2
    assert "pigeon: one of " in done.output


def test_nothing_measured_is_a_failure() -> None:
    done = CliRunner().invoke(bench_group, ["connect", "--transports", "memcpy", "--clients", "asyncio"])
    assert done.exit_code == 1
    assert "nothing was measured" in done.output


def test_unmodified_programs_are_measured_each_way(tmp_path: Path) -> None:
    arguments = ["programs", "connect", "files", "--repeat", "1", "--seconds", "0.2", "--json"]
    done = CliRunner().invoke(bench_group, [*arguments, "--out", str(tmp_path)])
    if "cannot be made" in done.output or "not installed" in done.output:
        pytest.skip(done.output)
    assert done.exit_code == 0, done.output
    listed = json.loads(done.stdout)
    assert [(item["program"], item["way"]) for item in listed] == [
        ("connect", "bridge"),
        ("connect", "run"),
        ("files", "bridge"),
        ("files", "run"),
    ]
    assert all(item["values"][0] > 0 for item in listed)
    assert (tmp_path / "programs.json").exists()
    assert CliRunner().invoke(bench_group, ["programs", "pigeon"]).exit_code == 2


@pytest.mark.parametrize("program", ["mpi", "postgres"])
def test_programs_that_are_installed_are_measured(program: str) -> None:
    options = ["--repeat", "1", "--seconds", "0.3", "--json"]
    done = CliRunner().invoke(bench_group, ["programs", program, *options])
    if "cannot be made" in done.output or "not installed" in done.output:
        pytest.skip(done.output)
    assert done.exit_code == 0, done.output
    listed = json.loads(done.stdout)
    assert [item["way"] for item in listed][:2] == ["bridge", "run"]
    assert all(0 < item["p50_us"] <= item["p99_us"] for item in listed)
    assert all((item["per_second"] or item["gbytes_per_s"]) > 0 for item in listed)


# Programs between guests


@pytest.fixture
def uml_or_skip(bridge_or_skip: None) -> None:
    if os.geteuid() != 0:
        pytest.skip("the network cards of guests are made by root alone")
    try:
        uml_kernel()
    except Missing as error:
        pytest.skip(str(error))


def monitors_of(pid: int) -> list[int]:
    """The monitors that a process started."""
    found = []
    for child in descendants(pid):
        with suppress(OSError):
            if b"linux.uml" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(child)
    return found


@pytest.mark.timeout(600)  # Two guests boot, and run four programs.
@pytest.mark.usefixtures("uml_or_skip")
def test_unmodified_programs_are_measured_between_guests(tmp_path: Path) -> None:
    options = ["--between", "vm", "--monitor", "uml", "--repeat", "1", "--seconds", "0.5", "--json"]
    done = CliRunner().invoke(bench_group, ["programs", *options, "--out", str(tmp_path)])
    if "is not installed" in done.output:
        pytest.skip(done.output)
    assert done.exit_code == 0, done.output
    listed = json.loads(done.stdout)
    ways = [(item["program"], item["way"]) for item in listed]
    assert ways == [(name, way) for name in ("redis", "iperf3") for way in ("bridge", "run")]
    assert all((item["per_second"] or item["gbytes_per_s"]) > 0 for item in listed)
    assert all(0 < item["p50_us"] <= item["p99_us"] for item in listed if item["program"] == "redis")
    assert all(item["cpu_s"] > 0 for item in listed)
    assert {item["monitor"] for item in listed} == {"uml"}
    assert "only ratios mean anything" in listed[0]["machine"]["guests"]
    assert (tmp_path / "programs.json").exists()
    assert not monitors_of(os.getpid())


@pytest.mark.usefixtures("uml_or_skip")
def test_a_program_that_fails_in_a_guest_says_what_it_printed() -> None:
    with programs_guests.Pair("uml") as pair:
        server = [sys.executable, "-c", "print('no room'); raise SystemExit(3)"]
        with pytest.raises(WorkerError, match=r"ended with 3: no room"):
            pair.start_server("bridge", server, 7100)
        with pytest.raises(WorkerError, match=r"^pigeon 7: ended with 127: .*pigeon"):
            pair.work("bridge", ["pigeon", "7"], 1.0)
        assert not monitors_of(os.getpid())


@pytest.mark.usefixtures("uml_or_skip")
def test_an_interrupted_bench_leaves_no_guest() -> None:
    words = "-m isthmus bench programs iperf3 --between vm --monitor uml"
    with started(
        [sys.executable, *words.split()],
        stderr=subprocess.STDOUT,
        # Whoever runs the tests in the background ignores it, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as bench:
        assert bench.stdout is not None
        line = bench.stdout.readline()
        if "is not installed" in line:
            pytest.skip(line)
        assert line.startswith("2 guests")
        guests = monitors_of(bench.pid)
        assert guests
        bench.send_signal(signal.SIGINT)
        said, _ = bench.communicate(timeout=LIMIT_S)
        assert bench.returncode != 0, said
    becomes(lambda: not any(Path(f"/proc/{pid}").exists() for pid in guests), "guests are left")


def test_between_guests_only_some_programs_are_measured() -> None:
    done = CliRunner().invoke(bench_group, ["programs", "nginx", "--between", "vm", "--monitor", "uml"])
    assert done.exit_code == 2
    assert "nginx: between guests, one of redis, iperf3" in done.output
    assert CliRunner().invoke(bench_group, ["programs", "redis", "--monitor", "uml"]).exit_code == 2
