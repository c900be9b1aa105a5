"""libmyriexpress as C programs see it: layouts, symbols and versions, and a program that sends to itself."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import link_myriexpress
import pytest
from click.testing import CliRunner
from test_mx_wire import Nodes

from isthmus import attach, mx
from isthmus.cli import mx as cli_mx
from isthmus.cli.app import root
from isthmus.cli.output import Problem
from isthmus.testing import PrivateBroker

#: A program by its name, its arguments, and what it finds in its environment.
Run = Callable[..., "subprocess.CompletedProcess[str]"]
#: A program by its name: where it is.
Compiled = Callable[[str], Path]
#: The environment of a program, by its domain.
Surroundings = Callable[..., "dict[str, str]"]

#: The library may have to be built first.
pytestmark = pytest.mark.timeout(600)

SOURCES = Path(__file__).parent / "mx"
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-pedantic")
INCLUDE = f"-I{link_myriexpress.INCLUDE}"
LIMIT_S = 60.0
#: A program of ours waits no longer for what must happen.
SOON_S = 10.0
#: What a program exits with that its error handler has ended, -1 as the shell sees it.
ENDED_BY_HANDLER = 255

#: The functions that have versions, and which.
VERSIONED = {
    "mx_open_endpoint": "MX_0.9",
    "mx_decompose_endpoint_addr": "MX_0.9",
    "mx_get_info": "MX_0.91",
    "mx_test": "MX_0.91",
    "mx_wait": "MX_0.91",
    "mx_iprobe": "MX_0.91",
    "mx__init_api": "MX_0.92",
}
#: Each version, and the one that it continues.
VERSIONS = {"MX_0.0": None, "MX_0.9": None, "MX_0.91": "MX_0.9", "MX_0.92": "MX_0.91"}
DATA = {"MX_ERRORS_ARE_FATAL", "MX_ERRORS_RETURN"}
FUNCTIONS = set(
    re.findall(
        r"\w+",
        """
    mx__init_api mx_finalize mx_set_error_handler mx_open_endpoint mx_close_endpoint mx_wakeup
    mx_disable_progression mx_reenable_progression mx_progress mx_get_info mx_hostname_to_nic_id
    mx_nic_id_to_hostname mx_board_number_to_nic_id mx_nic_id_to_board_number mx_strerror mx_strstatus
    mx_connect mx_iconnect mx_disconnect mx_get_endpoint_addr mx_decompose_endpoint_addr
    mx_decompose_endpoint_addr2 mx_set_endpoint_addr_context mx_get_endpoint_addr_context
    mx_isend mx_issend mx_irecv mx_test mx_wait mx_test_any mx_wait_any mx_ipeek mx_peek mx_iprobe mx_probe
    mx_ibuffered mx_buffered mx_context mx_cancel mx_forget mx_set_request_timeout
    mx_register_unexp_handler mx_register_unexp_callback mx_iput mx_iget
    mx_open_board mx__get_mapper_state mx__regcache_clean
    mx_raw_handle mx_raw_open_endpoint mx_raw_close_endpoint mx_raw_send mx_raw_next_event
    mx_raw_set_route_begin mx_raw_set_route_end mx_raw_set_route_mag mx_raw_set_route mx_raw_clear_routes
    mx_raw_remove_peer mx_raw_set_map_version mx_raw_num_ports mx_raw_line_speed mx_raw_set_hostname
    mx_raw_set_peer_name mx_raw_set_nic_reply_info
    """,
    )
)

#: The tests that C programs run, and the sentences they prove.
SENTENCES = {
    ("messages", "lengths"): "a message of any length arrives whole, on either side of every limit",
    ("messages", "segments"): "segments are gathered and scattered, and those that are empty may be nowhere",
    ("messages", "truncation"): "both sides learn that a receive was too short",
    ("messages", "order"): "receives are tried as posted, messages as they came",
    ("messages", "probes"): "a probe tells of a message and leaves it where it is",
    ("messages", "timeouts"): "a wait that expires is a success with nothing done",
    ("messages", "peeks"): "what a peek shows is completed by the next test",
    ("messages", "contexts"): "wait_any keeps to its context, or to none",
    ("messages", "progression"): "nothing moves while progression is disabled",
    ("messages", "buffered"): "what was buffered is the program's again",
    ("messages", "threads"): "a wakeup lets all go that wait, and a message lets one",
    ("messages", "crowd"): "threads share an endpoint and get what is theirs",
    ("unexpected", "finished"): "what the handler has dealt with is gone",
    ("unexpected", "continued"): "what the handler leaves waits for its receive",
    ("unexpected", "posting"): "the handler may post, send and test, and nothing overtakes meanwhile",
    ("unexpected", "callback"): "the callback of old is told, and takes nothing",
    ("interface", "handlers"): "a handler is told codes of both kinds, and its answer takes their place",
    ("interface", "texts"): "every code has a text, and an unknown one does no harm",
    ("interface", "initialisation"): "the library begins once, for its version, and again after its end",
    ("interface", "opening"): "an endpoint opens where there is one, and once",
    ("interface", "information"): "every question has an answer that fits, or a refusal",
    ("interface", "names"): "boards are found by number, by NIC and by name",
    ("interface", "boards"): "a board tells of its fabric, and has no raw endpoints",
    ("interface", "addresses"): "an address goes by value, is copied by memcpy, and outlives nothing",
    ("interface", "connections"): "a connect fails as it should, waiting or not",
    ("interface", "cancelling"): "sends cannot be cancelled, and what was cancelled does not complete",
    ("interface", "requests"): "a request is good for its endpoint only, and until it is done",
}


@pytest.fixture(scope="module")
def library() -> Path:
    for tool in ("cargo", "cc", "objcopy", "readelf"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool}: libmyriexpress cannot be built or looked at")
    return link_myriexpress.build()


@pytest.fixture(scope="module")
def broker() -> Iterator[PrivateBroker]:
    with PrivateBroker(("a", "b")) as broker:
        yield broker


@pytest.fixture(scope="module")
def compiled(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """One of the programs in `SOURCES`, compiled against the headers and the library."""
    directory = tmp_path_factory.mktemp("mx")

    def compiled(program: str) -> Path:
        binary = directory / program
        if not binary.exists():
            source = str(SOURCES / f"{program}.c")
            # foreign.c has the interface from elsewhere.
            include = () if program == "foreign" else (INCLUDE,)
            where = f"-L{library.parent}", "-lmyriexpress", "-pthread"
            compile_c("-std=gnu11", *include, source, f"-o{binary}", *where)
        return binary

    return compiled


@pytest.fixture(scope="module")
def surroundings(library: Path, broker: PrivateBroker) -> Surroundings:
    """The environment of a program in a domain."""

    def surroundings(domain: str, **more: str) -> dict[str, str]:
        there = {"LD_LIBRARY_PATH": str(library.parent), "ISTHMUS_DOOR": broker.door(domain)}
        return {**os.environ, **there, **more}

    return surroundings


@pytest.fixture(scope="module")
def run(compiled: Compiled, surroundings: Surroundings) -> Run:
    """Run one of the programs in the domain "a" until it ends."""

    def run(program: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [compiled(program), *arguments],
            env=surroundings("a", **environment),
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )

    return run


def compile_c(*arguments: str) -> None:
    if shutil.which("cc") is None:
        pytest.skip("no cc: nothing can be compiled")
    done = subprocess.run(["cc", *WARNINGS, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def readelf(*arguments: str | Path) -> str:
    environment = {**os.environ, "LC_ALL": "C"}
    return subprocess.run(
        ["readelf", "-W", *arguments], env=environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def exports(library: Path) -> dict[str, tuple[str, str]]:
    """Each symbol that `library` defines, with its type and size; a version is part of the name."""
    rows = (line.split() for line in readelf("--dyn-syms", library).splitlines())
    whole = [row for row in rows if len(row) == 8 and row[4] in ("GLOBAL", "WEAK") and row[6] != "UND"]
    # The linker leaves a symbol for each version itself.
    return {row[7]: (row[3], row[2]) for row in whole if row[6] != "ABS"}


# --- Headers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", ["c -std=c99", "c -std=c11", "c++ -std=c++17"])
def test_every_header_compiles_alone_and_beside_the_others(language: str, tmp_path: Path) -> None:
    headers = sorted(str(path.relative_to(link_myriexpress.INCLUDE)) for path in find_headers())
    assert len(headers) == 6
    for names in [*([name] for name in headers), headers, headers[::-1]]:
        source = tmp_path / "header.c"
        source.write_text("".join(f'#include "{name}"\n' for name in names))
        compile_c("-x", *language.split(), INCLUDE, "-fsyntax-only", str(source))


def find_headers() -> list[Path]:
    return list(link_myriexpress.INCLUDE.rglob("*.h"))


@pytest.mark.parametrize("language", ["c -std=c11", "c++ -std=c++17"])
def test_types_have_the_layout_that_programs_were_compiled_with(language: str) -> None:
    compile_c("-x", *language.split(), INCLUDE, "-fsyntax-only", str(SOURCES / "layout.c"))


def test_types_have_the_layout_of_32_bits() -> None:
    # Freestanding: the compiler's own headers are enough, and a 32-bit libc is seldom there.
    flags = "-m32", "-ffreestanding", "-fsyntax-only"
    probe = subprocess.run(["cc", *flags, "-x", "c", "-"], input="#include <stdint.h>\n", text=True)
    if probe.returncode != 0:
        pytest.skip("cc does not compile for 32 bits")
    compile_c("-std=c11", *flags, INCLUDE, str(SOURCES / "layout.c"))


def test_c_plus_plus_links_against_the_names_of_c(library: Path, tmp_path: Path) -> None:
    source = tmp_path / "link.cc"
    names = sorted(FUNCTIONS - {"mx__regcache_clean"})
    includes = "".join(f'#include "{name}"\n' for name in ("mx_raw.h", "mx_internals/mx__fops.h"))
    table = ", ".join(f"reinterpret_cast<void *>({name})" for name in names)
    source.write_text(f"{includes}void *all[] = {{{table}}};\nint main() {{ return all[0] == nullptr; }}\n")
    binary = tmp_path / "link"
    compile_c(
        "-x", "c++", "-std=c++17", INCLUDE, str(source), f"-o{binary}", f"-L{library.parent}", "-lmyriexpress"
    )
    environment = {**os.environ, "LD_LIBRARY_PATH": str(library.parent)}
    subprocess.run([binary], env=environment, check=True, timeout=LIMIT_S)


# --- The shared library -------------------------------------------------------------------------------------


def test_pitfall_3_the_soname_has_no_version(library: Path) -> None:
    assert re.findall(r"Library soname: \[(.*)\]", readelf("-d", library)) == ["libmyriexpress.so"]


def test_pitfall_3_seven_functions_have_versions_and_nothing_else_is_exported(library: Path) -> None:
    assert len(FUNCTIONS) == 65
    versions = {name: f"{name}@@{version}" for name, version in VERSIONED.items()}
    assert exports(library).keys() == {versions.get(name, name) for name in FUNCTIONS} | DATA


def test_pitfall_3_the_handlers_are_data_of_one_pointer(library: Path) -> None:
    symbols = exports(library)
    assert {symbols.pop(name) for name in DATA} == {("OBJECT", "8")}
    assert {kind for kind, _ in symbols.values()} == {"FUNC"}


def test_pitfall_3_each_version_continues_the_one_before(library: Path) -> None:
    versions: dict[str, str | None] = {}
    for line in readelf("-V", library).split("Version needs section")[0].splitlines():
        if found := re.search(r"Flags: (?!BASE).*Name: (\S+)", line):
            versions[found[1]] = None
        elif found := re.search(r"Parent 1: (\S+)", line):
            versions[list(versions)[-1]] = found[1]
    assert versions == VERSIONS


def test_everything_the_headers_declare_is_there(library: Path) -> None:
    text = "".join(path.read_text() for path in find_headers())
    declared = set(re.findall(r"^(?:\w+ )*\w+ \*?(mx_\w+)\(", text, re.MULTILINE))
    # Programs that call it declare it themselves.
    assert declared == FUNCTIONS - {"mx__regcache_clean"}


def test_the_library_needs_nothing_but_the_c_library(library: Path) -> None:
    needed = set(re.findall(r"NEEDED\)\s+Shared library: \[(.*?)\]", readelf("-d", library)))
    assert {name.split(".")[0].split("-")[0] for name in needed} <= {"libc", "libgcc_s", "libm", "ld"}


# --- Programs -----------------------------------------------------------------------------------------------


def test_a_program_compiled_elsewhere_runs(run: Run) -> None:
    done = run("foreign")
    assert (done.stdout, done.stderr, done.returncode) == ("ok\n", "", 0)


def test_without_a_door_or_a_broker_there_is_no_device_or_no_driver(run: Run, tmp_path: Path) -> None:
    nobody = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    nobody.bind(str(tmp_path / "door"))
    nobody.close()
    for door, name in ((tmp_path / "none", "MX_NO_DEV"), (tmp_path, "MX_NO_DRIVER")):
        done = run("interface", "fatal_status", ISTHMUS_DOOR=str(door))
        assert done.returncode == ENDED_BY_HANDLER
        assert f"({name})" in done.stderr
        assert str(door) in done.stderr


#: What people stumble over in this interface, by the number it has in the list of pitfalls.
PITFALLS = {
    ("messages", "timeouts"): "1",
    ("interface", "addresses"): "2 and 9",
    ("interface", "handlers"): "4",
    ("interface", "cancelling"): "7 and 8",
}


def sentence(test: tuple[str, str]) -> str:
    pitfall = f"pitfall {PITFALLS[test]}: " if test in PITFALLS else ""
    return pitfall + SENTENCES[test]


@pytest.mark.parametrize("test", SENTENCES, ids=sentence)
def test_of_one_program(run: Run, test: tuple[str, str]) -> None:
    done = run(*test)
    assert (done.stdout, done.stderr, done.returncode) == ("ok\n", "", 0)


def test_every_test_of_the_programs_is_run(run: Run) -> None:
    found = {
        (program, name)
        for program in ("messages", "unexpected", "interface")
        for name in run(program).stdout.split()
    }
    assert {test for test in found if not test[1].startswith("fatal_")} == SENTENCES.keys()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("fatal_before_init", "mx_open_endpoint: the library is not initialised; call mx_init first"),
        ("fatal_status", "mx_wait: the message was longer than the receive"),
    ],
)
def test_an_error_ends_a_program_that_says_nothing_about_errors(run: Run, name: str, says: str) -> None:
    done = run("interface", name)
    assert done.returncode == ENDED_BY_HANDLER
    assert done.stderr.startswith(f"MX: {says}")
    assert "went on" not in done.stderr


@pytest.mark.parametrize(
    ("environment", "is_fatal"),
    [
        ({}, True),
        ({"MX_ERRORS_ARE_FATAL": "1"}, True),
        ({"MX_ERRORS_ARE_FATAL": "0"}, False),
        ({"OMX_FATAL_ERRORS": "0"}, False),
        ({"MX_ERRORS_ARE_FATAL": "0", "OMX_FATAL_ERRORS": "1"}, True),
        ({"MX_ERRORS_ARE_FATAL": "0", "OMX_IGNORE_MX_ENV": "1"}, True),
    ],
    ids=str,
)
def test_the_environment_says_whether_errors_are_fatal(
    run: Run, environment: dict[str, str], is_fatal: bool
) -> None:
    assert run("interface", "fatal_not", **environment).returncode == (ENDED_BY_HANDLER if is_fatal else 0)


# --- Two programs -------------------------------------------------------------------------------------------


class Part:
    """A part of `pair.c` in a domain of its own, until the end of a `with`."""

    def __init__(self, binary: Path, part: str, environment: dict[str, str], *peer: str) -> None:
        self.process = subprocess.Popen(
            [binary, part, *peer],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def where(self) -> list[str]:
        """NIC and endpoint, as `pair.c` takes them."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().split()

    def check(self) -> None:
        """It ended well."""
        out, err = self.process.communicate(timeout=LIMIT_S)
        assert (out, err, self.process.returncode) == ("ok\n", "", 0)

    def __enter__(self) -> Part:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def start(compiled: Compiled, surroundings: Surroundings) -> Callable[..., Part]:
    def start(domain: str, part: str, *peer: str) -> Part:
        return Part(compiled("pair"), part, surroundings(domain), *peer)

    return start


#: Who is connected to, who connects, and what they prove.
PAIRS = {
    ("pong", "ping"): "messages of any length arrive whole at another program",
    ("answer", "ask"): "contexts, probes and truncation are the same between programs",
    ("watched", "watcher"): "the handler sees what other programs send, in order",
    ("poster", "mailer"): "the handler posts receives and connects",
}


@pytest.mark.parametrize("parts", PAIRS, ids=PAIRS.__getitem__)
@pytest.mark.parametrize("domains", ["ab", "aa"], ids=["two domains", "one domain"])
def test_of_two_programs(start: Callable[..., Part], parts: tuple[str, str], domains: str) -> None:
    with start(domains[0], parts[0]) as first, start(domains[1], parts[1], *first.where()) as second:
        second.check()
        first.check()


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with Nodes() as nodes:
        yield nodes


@pytest.mark.system
@pytest.mark.parametrize("parts", PAIRS, ids=PAIRS.__getitem__)
def test_of_two_programs_of_two_nodes(
    nodes: Nodes, compiled: Compiled, surroundings: Surroundings, parts: tuple[str, str]
) -> None:
    left, right = (surroundings("a", ISTHMUS_DOOR=nodes.doors[domain]) for domain in "ac")
    binary = compiled("pair")
    with Part(binary, parts[0], left) as first, Part(binary, parts[1], right, *first.where()) as second:
        second.check()
        first.check()


@pytest.mark.system
def test_a_request_has_a_timeout_of_its_own(
    nodes: Nodes, compiled: Compiled, surroundings: Surroundings
) -> None:
    left, right = (surroundings("a", ISTHMUS_DOOR=nodes.doors[domain]) for domain in "ac")
    with Part(compiled("pair"), "stay", left) as first:
        where = (*first.where(), str(first.process.pid))
        with Part(compiled("pair"), "impatient", right, *where) as second:
            second.check()


@pytest.mark.system
@pytest.mark.parametrize("name", ["MX_MAX_RETRIES", "OMX_RESENDS_MAX"])
def test_the_environment_says_how_long_a_peer_is_waited_for(
    nodes: Nodes, compiled: Compiled, surroundings: Surroundings, name: str
) -> None:
    left, right = (surroundings("a", ISTHMUS_DOOR=nodes.doors[domain], **{name: "2"}) for domain in "ac")
    with Part(compiled("pair"), "stay", left) as first:
        where = (*first.where(), str(first.process.pid))
        before = time.monotonic()
        with Part(compiled("pair"), "patient", right, *where) as second:
            second.check()
        assert 1 < time.monotonic() - before < SOON_S


def test_a_receiver_keeps_no_more_than_it_said(start: Callable[..., Part]) -> None:
    with start("a", "held") as first, start("b", "flood", *first.where()) as second:
        first.check()
        second.check()


def test_endpoints_of_one_program_keep_their_own_of_one_peer(start: Callable[..., Part]) -> None:
    with start("a", "stay") as first, start("b", "rails", *first.where()) as second:
        second.check()


def test_a_connect_says_why_it_failed(start: Callable[..., Part]) -> None:
    with start("a", "stay") as first, start("b", "refused", *first.where()) as second:
        second.check()


def test_one_wakeup_lets_twelve_threads_go(start: Callable[..., Part]) -> None:
    with start("a", "stay") as first:
        where = first.where()
        first.process.send_signal(signal.SIGSTOP)
        with start("b", "woken", *where) as second:
            second.check()


@pytest.mark.parametrize(
    ("left", "dies"),
    [("bereaved_sender", "dying_receiver"), ("bereaved_receiver", "dying_sender")],
    ids=["its receiver", "its sender"],
)
def test_a_message_ends_when_its_other_side_dies(start: Callable[..., Part], left: str, dies: str) -> None:
    with start("a", left) as first, start("b", dies, *first.where()) as second:
        assert second.process.wait(LIMIT_S) == -signal.SIGKILL
        first.check()


def test_c_and_python_understand_each_other(start: Callable[..., Part], broker: PrivateBroker) -> None:
    with start("a", "echo") as first, mx.Endpoint(key=0x12345, node=attach(broker.door("b"))) as endpoint:
        nic, number = first.where()
        peer = endpoint.connect(int(nic, 16), int(number), key=0x12345, timeout=LIMIT_S)
        endpoint.isend(peer, 0x900D, b"").wait(LIMIT_S)
        for length in (1, 128, 32768, 32769, 1 << 19, 0):
            data, back = os.urandom(length), bytearray(length + 1)
            received = endpoint.irecv(0x100 | length, back)
            sent = endpoint.isend(peer, 0x100 | length, data).wait(LIMIT_S)
            assert sent is not None
            status = received.wait(LIMIT_S)
            assert status is not None
            assert (sent.check().transferred, status.check().length) == (length, length + 1)
            assert back == data + b"\x5a"
        first.check()


# --- In the package -----------------------------------------------------------------------------------------


def test_the_command_line_says_how_to_compile(
    library: Path, surroundings: Surroundings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = tmp_path / "_myriexpress"
    monkeypatch.setattr(link_myriexpress, "PACKAGED", shipped)
    monkeypatch.setattr(cli_mx, "MYRIEXPRESS", shipped)
    missing = CliRunner().invoke(root, ["mx", "libs"])
    assert isinstance(missing.exception, Problem)
    assert "make wheel" in missing.exception.message
    for _ in range(2):
        link_myriexpress.package(library)
    flags = [CliRunner().invoke(root, ["mx", what, "--json"]).stdout for what in ("cflags", "libs")]
    program = tmp_path / "program"
    compile_c(*json.loads(flags[0]), str(SOURCES / "messages.c"), *json.loads(flags[1]), f"-o{program}")
    environment = surroundings("a", LD_LIBRARY_PATH="")
    done = subprocess.run([program, "lengths"], env=environment, capture_output=True, timeout=LIMIT_S)
    assert (done.stdout, done.stderr) == (b"ok\n", b"")
    assert f"-L{shipped / 'lib'} " in CliRunner().invoke(root, ["mx", "libs"]).stdout
