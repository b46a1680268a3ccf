"""What every command prints, for people and for scripts; errors and exit statuses."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import click
import pytest
import yaml

from agent.cli import main, output
from agent.cli.output import (
    emit_done,
    emit_list,
    emit_object,
    host_option,
    output_option,
    wait_option,
)
from agent.errors import Conflict, NoAgent, NotFound, VxmeshError

ROWS = [
    {"name": "web", "subnets": ["10.1.0.0/24", "fd00:1::/64"], "internal": False, "state": "alive"},
    {"name": "db-long", "subnets": [], "internal": True, "state": "suspect"},
]
COLUMNS = [
    ("NAME", "name"),
    ("STATE", "state"),
    ("SUBNETS", "subnets"),
    ("INTERNAL", lambda row: row["internal"]),
]


@click.command()
@click.argument("name")
@wait_option
@host_option
@output_option
def probe(name: str, wait: float, host: str, output: str) -> None:
    """What the common options give a command."""
    if name in FAILURES:
        raise FAILURES[name]
    click.echo(json.dumps({"name": name, "wait": wait, "host": host, "output": output}))


FAILURES: dict[str, BaseException] = {
    "missing": NotFound("network missing", "does not exist", "See 'vxmesh network ls'"),
    "taken": Conflict("network taken", "exists"),
    "dead": NoAgent("agent", "does not answer", "Start one"),
    "plain": VxmeshError("it", "failed"),
    "interrupt": KeyboardInterrupt(),
}

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def vxmesh(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line, where `probe` is one of the nouns; status, stdout, stderr."""
    monkeypatch.setitem(main.NOUNS, "probe", (f"{__name__}:probe", "A probe."))

    def run(*arguments: str) -> tuple[int, str, str]:
        status = main.run(arguments)
        out, err = capsys.readouterr()
        return status, out, err

    return run


def python(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], text=True, capture_output=True, timeout=60, **options
    )


def on_terminal(code: str, **environment: str) -> str:
    """What `code` writes to a terminal that is its stdout and stderr."""
    leader, follower = pty.openpty()
    env = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "TERM")}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.DEVNULL,
        stdout=follower,
        stderr=follower,
        env={**env, "TERM": "xterm", **environment},
    )
    os.close(follower)
    written = b""

    def read() -> None:
        nonlocal written
        try:
            while piece := os.read(leader, 4096):
                written += piece
        except OSError:  # EIO: the last writer has gone
            pass

    reader = threading.Thread(target=read)
    reader.start()
    assert process.wait(30) == 0
    reader.join()
    os.close(leader)
    return written.decode()


def test_a_table_is_aligned_and_plain_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    emit_list(ROWS, COLUMNS, "table")
    assert capsys.readouterr().out.splitlines() == [
        "NAME      STATE     SUBNETS                    INTERNAL",
        "web       alive     10.1.0.0/24, fd00:1::/64   no",
        "db-long   suspect   -                          yes",
    ]


def test_an_empty_list_is_a_heading_or_an_empty_array(capsys: pytest.CaptureFixture[str]) -> None:
    emit_list([], COLUMNS, "table")
    assert capsys.readouterr().out == "NAME   STATE   SUBNETS   INTERNAL\n"
    emit_list([], COLUMNS, "json")
    assert json.loads(capsys.readouterr().out) == []


def test_json_and_yaml_have_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    emit_list(ROWS, COLUMNS[:1], "json")
    assert json.loads(capsys.readouterr().out) == ROWS
    emit_list(ROWS, COLUMNS[:1], "yaml")
    assert yaml.safe_load(capsys.readouterr().out) == ROWS
    emit_object(ROWS[0], "json")
    assert json.loads(capsys.readouterr().out) == ROWS[0]
    emit_done("made", ROWS[0], "yaml")
    assert yaml.safe_load(capsys.readouterr().out) == ROWS[0]


def test_an_object_has_a_line_a_field(capsys: pytest.CaptureFixture[str]) -> None:
    fields = {
        "id": "0a",
        "labels": {"a": "b", "c": ""},
        "ports": [{"port": 1}, {"port": 2}],
        "none": None,
    }
    emit_object(fields, "table")
    assert capsys.readouterr().out.splitlines() == [
        "id       0a",
        "labels   a=b, c=-",
        "ports    port=1",
        "         port=2",
        "none     -",
    ]


def test_done_prints_its_text_and_nothing_for_none(capsys: pytest.CaptureFixture[str]) -> None:
    emit_done("0a1b", {}, "table")
    emit_done("", {}, "table")
    assert capsys.readouterr().out == "0a1b\n"


def test_control_characters_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    emit_list([{"label": "a\x1b[2Jb\nc\x9b"}], [("LABEL", "label")], "table")
    assert capsys.readouterr().out == "LABEL\na\ufffd[2Jb\ufffdc\ufffd\n"


DRAW = (
    "from agent.cli.output import emit_list;"
    "emit_list([{'name': 'a', 'state': 'alive'}, {'name': 'bb', 'state': 'unreachable'}],"
    "[('NAME', 'name'), ('STATE', 'state')], 'table')"
)


def test_colour_on_a_terminal() -> None:
    shown = on_terminal(DRAW)
    assert "\x1b[32malive\x1b[0m" in shown
    assert "\x1b[31munreachable\x1b[0m" in shown
    plain = click.unstyle(shown).splitlines()
    assert plain == ["NAME   STATE", "a      alive", "bb     unreachable"]


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_no_colour_for_those_who_do_not_want_it(environment: dict[str, str]) -> None:
    assert "\x1b" not in on_terminal(DRAW, **environment)


def test_no_colour_in_a_pipe() -> None:
    assert "\x1b" not in python("-c", DRAW).stdout


WORK = (
    "import time; from agent.cli import output; output.PROGRESS_DELAY = {delay};"
    "ctx = output.progress('announcing', 10);"
    "advance = ctx.__enter__(); advance(5); time.sleep({work}); advance(5);"
    "ctx.__exit__(None, None, None)"
)


def test_progress_is_drawn_when_work_takes_long() -> None:
    assert "announcing" in on_terminal(WORK.format(delay=0.01, work=1))


def test_progress_is_not_drawn_when_work_is_short_or_in_a_pipe() -> None:
    assert on_terminal(WORK.format(delay=20, work=0)) == ""
    done = python("-c", WORK.format(delay=0.01, work=0.5))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("arguments", "wait"),
    [
        (["web"], 0.0),
        (["--wait", "web"], output.WAIT_DEFAULT),
        (["web", "--wait"], output.WAIT_DEFAULT),
        (["--wait=2.5", "web"], 2.5),
        (["web", "--wait=0"], 0.0),
    ],
)
def test_wait_has_an_optional_value(vxmesh: Run, arguments: list[str], wait: float) -> None:
    status, out, _ = vxmesh("probe", *arguments)
    assert status == 0
    found = json.loads(out)
    assert (found["name"], found["wait"]) == ("web", wait)


@pytest.mark.parametrize("value", ["x", "-1", "nan", "inf", ""])
def test_wait_wants_seconds(vxmesh: Run, value: str) -> None:
    status, out, err = vxmesh("probe", f"--wait={value}", "web")
    assert (status, out) == (2, "")
    assert "is not a number of seconds" in err


def test_the_roots_options_hold_unless_the_leaf_has_its_own(vxmesh: Run) -> None:
    def found(*arguments: str) -> tuple[str, str]:
        answer = json.loads(vxmesh(*arguments)[1])
        return answer["host"], answer["output"]

    assert found("probe", "web") == ("", "table")
    assert found("--host", "unix:///a", "-o", "yaml", "probe", "web") == ("unix:///a", "yaml")
    assert found("--host", "unix:///a", "probe", "web", "--host", "b") == ("b", "table")
    assert found("-o", "yaml", "probe", "-o", "json", "web") == ("", "json")


@pytest.mark.parametrize(
    ("name", "status", "line"),
    [
        (
            "missing",
            4,
            "vxmesh: network missing: does not exist. See 'vxmesh network ls'\n",
        ),
        ("taken", 5, "vxmesh: network taken: exists\n"),
        ("dead", 3, "vxmesh: agent: does not answer. Start one\n"),
        ("plain", 1, "vxmesh: it: failed\n"),
    ],
)
def test_an_error_is_one_line_and_a_status(vxmesh: Run, name: str, status: int, line: str) -> None:
    assert vxmesh("probe", name) == (status, "", line)


@pytest.mark.parametrize(
    "arguments", [["-o", "json", "probe", "missing"], ["probe", "missing", "-ojson"]]
)
def test_an_error_is_an_object_with_json(vxmesh: Run, arguments: list[str]) -> None:
    status, out, err = vxmesh(*arguments)
    assert (status, out) == (4, "")
    message = "network missing: does not exist. See 'vxmesh network ls'"
    assert json.loads(err) == {"error": {"code": "NOT_FOUND", "message": message}}


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["nodes"], "vxmesh: the command line: no such command 'nodes'. See 'vxmesh --help'"),
        (["probe"], "vxmesh: probe: missing argument 'NAME'. See 'vxmesh probe --help'"),
        (["probe", "--x"], "vxmesh: probe: no such option '--x'. See 'vxmesh probe --help'"),
        (
            ["probe", "a", "b"],
            "vxmesh: probe: got unexpected extra argument (b). See 'vxmesh probe --help'",
        ),
    ],
)
def test_wrong_usage_says_where_help_is(vxmesh: Run, arguments: list[str], line: str) -> None:
    status, out, err = vxmesh(*arguments)
    assert (status, out) == (2, "")
    # click words some of these differently from version to version
    assert err.replace("option: --x", "option '--x'").replace("No such", "no such").strip() == line


@pytest.mark.parametrize(
    "arguments",
    [
        ["probe", "--unknown", "-o", "json"],  # fails before -o is looked at
        ["probe", "--output=json"],
        ["-o", "json", "probe"],
        ["-o", "json", "nodes"],
    ],
)
def test_wrong_usage_is_an_object_with_json(vxmesh: Run, arguments: list[str]) -> None:
    status, _, err = vxmesh(*arguments)
    assert status == 2
    assert json.loads(err)["error"]["code"] == "INVALID_ARGUMENT"


def test_what_follows_two_hyphens_is_not_ours(vxmesh: Run) -> None:
    _, _, err = vxmesh("probe", "--unknown", "--", "-o", "json")
    assert err.startswith("vxmesh: probe: ")


def test_an_interrupt_is_130(vxmesh: Run) -> None:
    status, out, err = vxmesh("probe", "interrupt")
    assert (status, out, err.strip()) == (130, "", "")


def test_a_group_without_a_verb_shows_its_help(vxmesh: Run) -> None:
    status, out, err = vxmesh("testbed")
    assert (status, out) == (2, "")
    assert "Commands:" in err


def test_help_imports_nothing_heavy() -> None:
    heavy = {"grpc", "msgspec", "rich", "yaml", "asyncio", "agent.client", "agent.cli.testbed"}
    done = python(
        "-c",
        "import sys; from agent.cli import main; main.run(['--help']);"
        "print(*sys.modules, file=sys.stderr)",
    )
    assert done.stdout.startswith("Usage: vxmesh")
    assert heavy & set(done.stderr.split()) == set()


def test_help_names_every_noun() -> None:
    """How fast it does is a benchmark's to say: on a busy machine a clock tells of the others."""
    done = python("-m", "agent", "--help")
    assert done.returncode == 0
    assert all(noun in done.stdout for noun in main.NOUNS)


def test_every_noun_can_be_loaded() -> None:
    group = main.root
    assert isinstance(group, click.Group)
    context = click.Context(group)
    for noun in main.NOUNS:
        command = group.get_command(context, noun)
        assert isinstance(command, click.Command), noun


def test_a_reader_that_goes_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "agent", "--help"],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")
