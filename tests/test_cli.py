"""The command line, as a person or a script meets it."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from broker_client import Node
from click.testing import CliRunner

from isthmus.cli import app, doctor, status
from isthmus.cli.output import Problem, size


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    policy = (
        '[[domain]]\nname = "declared"\n'
        '[[rule]]\nfrom = "a"\nto = "b"\nports = 22\naction = "refuse"\n'
        '[[rule]]\nfrom = "a"\nto = "b"\naction = "accept"\nweight = 3\n'
        '[[rule]]\nfrom = "b"\nto = "a"\nports = "5-9"\naction = "accept"\nstrict = true\n'
    )
    with Node(tmp_path / "run", policy) as node:
        yield node


def isthmus(
    *arguments: str, where: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if not key.startswith("ISTHMUS_")}
    env.update(environment)
    if where is not None:
        env["ISTHMUS_DIR"] = str(where)
    command = [sys.executable, "-c", "from isthmus.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=60, check=False)


def test_domains_are_added_listed_and_removed(node: Node) -> None:
    added = isthmus("domain", "add", "a", where=node.directory)
    assert (added.returncode, added.stderr) == (0, "")
    assert Path(added.stdout.strip()) == node.door("a").parent
    made = json.loads(isthmus("domain", "add", "b", "--group", "g", "--json", where=node.directory).stdout)
    assert (made["name"], made["group"], made["origin"]) == ("b", "g", "operator")
    assert Path(made["door"], "door").is_socket()
    listed = json.loads(isthmus("--json", "domain", "list", where=node.directory).stdout)
    assert [(d["name"], d["origin"]) for d in listed] == [
        ("declared", "policy"),
        ("a", "operator"),
        ("b", "operator"),
    ]
    assert "declared" in isthmus("domain", "list", where=node.directory).stdout
    assert (
        isthmus("domain", "remove", "a", where=node.directory).stdout
        == "a is removed; 0 connections were cut\n"
    )
    assert not node.door("a").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["domain", "add", "declared"], 1, "domain declared: exists already"),
        (["domain", "add", "Bad"], 1, "name \"Bad\": 'B' is not allowed in a name"),
        (["domain", "remove", "declared"], 1, "the policy file declares it; remove it there"),
        (["domain", "remove", "nobody"], 1, "domain nobody: there is none; see `isthmus domain list`"),
        (["explain", "declared", "x"], 1, "domain x: there is none"),
        (["status", "x"], 1, "domain x: there is none"),
        (["explain", "declared"], 2, "Missing argument 'TO'"),
        (["domain", "add", "a", "--uid", "me"], 2, "'me' is not a valid integer"),
        (["fly"], 2, "No such command 'fly'"),
        (["broker", "--metrics-http", "0.0.0.0:1"], 2, "loopback only"),
    ],
)
def test_errors_are_one_line_with_their_exit_code(
    node: Node, arguments: list[str], code: int, says: str
) -> None:
    done = isthmus(*arguments, where=node.directory)
    assert done.returncode == code
    assert done.stdout == ""
    assert says in done.stderr
    if code == 1:
        assert done.stderr.count("\n") == 1
        as_json = isthmus("--json", *arguments, where=node.directory)
        assert as_json.returncode == code
        assert says in json.loads(as_json.stdout)["error"]


@pytest.mark.parametrize(
    "command", [["status"], ["domain", "list"], ["reload"], ["metrics"], ["explain", "a", "b"]]
)
def test_without_a_broker_the_exit_code_is_three(tmp_path: Path, command: list[str]) -> None:
    done = isthmus(*command, where=tmp_path)
    assert done.returncode == 3
    assert done.stderr == f"isthmus: {tmp_path}/operator: no broker serves there; start one: isthmus broker\n"


def test_a_broker_that_cannot_start_says_why_in_one_line(node: Node, tmp_path: Path) -> None:
    second = isthmus("broker", "--dir", str(node.directory))
    assert second.returncode == 1
    assert "another broker" in second.stderr
    broken = tmp_path / "broken.toml"
    broken.write_text("\nrule = 1")
    done = isthmus("broker", "--dir", str(tmp_path / "other"), "--policy", str(broken))
    assert (done.returncode, done.stderr) == (
        1,
        f"isthmus: {broken}:2: rule: write [[rule]] above each one\n",
    )
    done = isthmus("broker", "--dir", str(tmp_path / "other"), "--policy", str(tmp_path / "none"))
    assert done.stderr == f"isthmus: {tmp_path}/none: No such file or directory\n"


def test_explain_names_the_path_the_rule_and_the_reason(node: Node) -> None:
    node.add("a", "b", "c")
    both = isthmus("explain", "a", "b", where=node.directory)
    assert both.returncode == 0
    assert "a -> b:22: refuse\n  because rule 1 refuses\n" in both.stdout
    assert "rule 2 would accept it, but rule 1 comes first" in both.stdout
    assert "a -> b:23-4294967295: path sealed\n  because rule 2 accepts\n" in both.stdout
    assert "weight of rule 2 not enforced here" in both.stdout
    strict = json.loads(isthmus("explain", "b", "a", "--port", "5", "--json", where=node.directory).stdout)
    (entry,) = strict["ranges"]
    assert (entry["path"], entry["rule"], entry["action"]) == ("put", 3, "accept")
    assert any("rule 3 says strict" in note for note in entry["notes"])
    assert any("nobody listens at a:5" in note for note in entry["notes"])
    with node.attach("a") as program:
        program.bind(5)
        listening = isthmus("explain", "b", "a", "--port", "5", where=node.directory).stdout
        assert f"process {os.getpid()} listens there (stream)" in listening
    closed = isthmus("explain", "c", "a", where=node.directory)
    assert closed.returncode == 1
    assert "because no rule accepts it" in closed.stdout
    assert '[[rule]]\nfrom = "c"\nto = "a"\naction = "accept"' in closed.stdout


def test_status_of_the_node_and_of_one_domain(node: Node) -> None:
    node.add("a", "b")
    with node.attach("a") as a, node.attach("b") as b:
        b.bind(5000)
        ours, _ = a.connect("b", 5000, b)
        whole = json.loads(isthmus("status", "--json", where=node.directory).stdout)
        assert whole["connections_total"] == 1
        assert whole["connections"][0]["domain"] == "a"
        assert whole["connections"][0]["path"] == "sealed"
        assert [d["domain"] for d in whole["domains"]] == ["declared", "a", "b"]
        assert any("weight not enforced" in note for note in whole["notes"])
        text = isthmus("status", where=node.directory, COLUMNS="200").stdout
        assert f"a:{ours.fields['from_port']}" in text
        assert "same kernel; rule 2 accepts; not strict" in text
        one = json.loads(isthmus("status", "b", "--json", where=node.directory).stdout)["domain"]
        assert one["ports"][0]["port"] == 5000
        assert "anybody" in isthmus("status", "b", where=node.directory).stdout


def test_a_tenant_asks_through_its_door(node: Node, tmp_path: Path) -> None:
    node.add("a", "b")
    nowhere = tmp_path / "nowhere"
    for door in (node.door("a"), node.door("a").parent):
        done = isthmus("status", "--json", where=nowhere, ISTHMUS_DOOR=str(door))
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["domain"]["domain"] == "a"
    assert "domain a (" in isthmus("status", where=nowhere, ISTHMUS_DOOR=str(node.door("a"))).stdout
    other = isthmus("status", "b", where=nowhere, ISTHMUS_DOOR=str(node.door("a")))
    assert other.returncode == 1
    assert "only domain a can be seen" in other.stderr
    gone = isthmus("status", where=nowhere, ISTHMUS_DOOR=str(nowhere))
    assert gone.returncode == 3
    assert "no broker behind this door" in gone.stderr


def test_a_tenant_asks_through_the_door_in_its_usual_place(
    node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.add("a", "b")
    monkeypatch.delenv("ISTHMUS_DOOR", raising=False)
    monkeypatch.setattr("isthmus.node.DOOR_DEFAULT", str(node.door("a")))
    ask = functools.partial(CliRunner().invoke, status.status)
    seen = ask(["--dir", str(tmp_path / "nowhere")])
    assert (seen.exit_code, seen.output.partition(" (")[0]) == (0, "domain a")
    # Who is the operator remains it, and a door that was named comes first.
    assert ask(["--dir", str(node.directory)]).output.startswith("node ")
    monkeypatch.setenv("ISTHMUS_DOOR", str(node.door("b")))
    assert ask(["--dir", str(tmp_path / "nowhere")]).output.startswith("domain b ")
    monkeypatch.delenv("ISTHMUS_DOOR")
    monkeypatch.setattr("isthmus.node.DOOR_DEFAULT", str(tmp_path / "none"))
    none = ask(["--dir", str(tmp_path / "nowhere")])
    assert isinstance(none.exception, Problem)
    assert "no broker serves there" in str(none.exception)


def test_a_policy_is_reloaded_or_left_alone(node: Node) -> None:
    done = isthmus("reload", where=node.directory)
    assert done.returncode == 0
    assert "is in force; 0 connections were cut" in done.stdout
    assert "note: rule 2: weight not enforced inside a node" in done.stdout
    assert node.policy_path is not None
    node.policy_path.write_text("[[rule]]\n")
    done = isthmus("reload", where=node.directory)
    assert done.returncode == 1
    assert done.stderr.endswith("run.toml:1: rule 1: a rule needs 'from'\n")
    assert "NOT IN FORCE" in isthmus("status", where=node.directory).stdout


def test_figures_as_text_and_as_json(node: Node) -> None:
    assert (
        "# TYPE isthmus_domains gauge\nisthmus_domains 1\n" in isthmus("metrics", where=node.directory).stdout
    )
    assert json.loads(isthmus("metrics", "--json", where=node.directory).stdout)["isthmus_domains"] == 1


def test_help_needs_no_command_to_be_imported() -> None:
    heavy = ("rich", "asyncio", "numpy", "isthmus.broker", *(f"isthmus.cli.{name}" for name in app.COMMANDS))
    code = (
        "import sys; sys.argv = ['isthmus', '--help']; from isthmus.cli.app import root\n"
        "try: root.main(standalone_mode=False)\n"
        f"finally: print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    for name in app.COMMANDS:
        assert f"\n  {name} " in done.stdout


def test_every_command_of_this_package_has_help_and_a_version_is_told() -> None:
    for name, (place, _) in app.COMMANDS.items():
        if place.startswith("isthmus.cli."):
            done = isthmus(name, "--help")
            assert done.returncode == 0, done.stderr
            assert done.stdout.startswith("Usage: isthmus")
    assert isthmus("--version").stdout.startswith("isthmus ")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_complete(shell: str) -> None:
    script = isthmus("completion", shell).stdout
    assert "_ISTHMUS_COMPLETE" in script
    done = isthmus(_ISTHMUS_COMPLETE="bash_complete", COMP_WORDS="isthmus do", COMP_CWORD="1")
    assert [line.partition(",")[2] for line in done.stdout.split()] == ["domain", "doctor"]


def test_missing_extras_are_named(tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text("raise ModuleNotFoundError('no click', name='click')")
    done = isthmus("status", PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stderr) == (
        1,
        "isthmus: click is not installed; pip install 'isthmus[cli]'\n",
    )


def test_the_doctor_examines_everything_and_never_breaks(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ISTHMUS_DOOR", raising=False)
    found = {finding.check: finding for finding in doctor.examine(node.directory)}
    assert {"kernel", "memfd", "huge pages", "shmem_enabled", "thp", "open files", "/proc", "broker"} <= set(
        found
    )
    assert found["broker"].state == "ok"
    assert all(f.do for f in found.values() if f.state != "ok"), "what is wrong comes with what to do"
    done = isthmus("doctor", "--json", where=node.directory)
    assert {f["check"] for f in json.loads(done.stdout)} == set(found)
    assert done.returncode == int(any(f.state == "fail" for f in found.values()))


def test_the_doctor_looks_behind_the_door(
    node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.add("a")
    monkeypatch.setenv("ISTHMUS_DOOR", str(node.door("a")))
    broker, door = doctor.check_broker(tmp_path)
    assert broker.state == "ok"
    assert (door.state, door.what) == ("ok", f"{node.door('a')}: domain a on node {os.uname().nodename}")
    monkeypatch.setenv("ISTHMUS_DOOR", str(tmp_path / "none"))
    assert [f.state for f in doctor.check_broker(tmp_path)] == ["ok", "fail"]


@pytest.mark.parametrize("allowed", ["0", "1"])
def test_the_doctor_knows_how_a_receiver_could_hold_up_its_sender(
    monkeypatch: pytest.MonkeyPatch, allowed: str
) -> None:
    monkeypatch.delenv("ISTHMUS_DOOR", raising=False)
    monkeypatch.setattr(doctor, "_read", lambda _: allowed)
    assert [f.state for f in doctor.check_stalls()] == ["warn" if allowed == "1" else "ok"]
    monkeypatch.setenv("ISTHMUS_DOOR", "/doors/a")
    monkeypatch.setattr(os, "access", lambda path, _: path == "/dev/fuse")
    assert "/dev/fuse" in [*doctor.check_stalls()][-1].what


def test_the_doctor_outlives_a_check_that_breaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check_nothing() -> Iterator[doctor.Finding]:
        raise PermissionError("not here")
        yield

    monkeypatch.setattr(doctor, "CHECKS", (check_nothing,))
    first = doctor.examine(tmp_path)[0]
    assert (first.check, first.state, first.what) == ("nothing", "warn", "could not be checked: not here")


def test_sizes_are_readable() -> None:
    assert [size(n) for n in (0, 1023, 1024, 1536, 8 << 30, 5 << 40)] == [
        "0 B", "1023 B", "1.0 KiB", "1.5 KiB", "8.0 GiB", "5.0 TiB",
    ]  # fmt: skip
