"""``asyncguard run``, as it is typed: in processes of its own, with real requests."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from tests.raw_client import Connection, Truncated, get
from tests.servers import HOST, ROOT, Server, eventually, free_port, start

pytestmark = pytest.mark.e2e

MODULE = ["asyncguard"]
SCRIPT = [str(Path(sys.executable).with_name("asyncguard"))]


@contextmanager
def running(
    *arguments: str,
    cwd: Path,
    command: Sequence[str] = MODULE,
) -> Iterator[Server]:
    """Serve with ``asyncguard run``; by default on uvicorn's asyncio loop."""
    port = free_port()
    options = ["--host", HOST, "--port", str(port), "--timeout-graceful-shutdown", "1"]
    if "--loop" not in arguments:
        options += ["--loop", "asyncio"]
    with start([*command, "run", *options, *arguments], port, cwd=cwd) as server:
        server.await_port()
        yield server


def asyncguard(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a command that ends by itself."""
    return subprocess.run(
        [sys.executable, "-m", "asyncguard", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "COLUMNS": "100"},
    )


def line_of(file: Path, comment: str) -> int:
    (found,) = (n for n, line in enumerate(file.read_text().splitlines(), 1) if line.endswith(f"# {comment}"))
    return found


def row(line: str) -> list[str]:
    """The cells of a row of the closing table."""
    return re.split(r"  +", line.strip())


# -- what it shows ---------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [MODULE, SCRIPT], ids=["module", "script"])
def test_stall_is_shown_as_it_happens_and_in_the_table(project: Path, command: Sequence[str]) -> None:
    place = f"main.py:{line_of(project / 'main.py', 'blocks')} in slow"
    arguments = ["main:app"] if command is MODULE else ["main:app", "--app-dir", "."]
    with running(*arguments, cwd=project, command=command) as server:
        assert get(server.port, "/slow/1").body == b"done"
        server.await_stderr("(cures/#sleep)")
        shown = server.stderr[server.stderr.index("\nBLOCKED") :]
        assert re.match(
            r"""
BLOCKED  GET /slow/\{name\} blocked the loop for (\d+) ms \(waiting in sleep\)
    line  (main\.py:\d+ in slow)
          time\.sleep\(0\.25\)  # blocks
    call  time\.sleep
  waited  (nobody|1 request waited .*)
    cure  Use `await anyio\.sleep\(\.\.\.\)`, which lets the loop run other requests meanwhile
          \(cures/#sleep\)
""",
            shown,
        ), shown
        assert f"\n    line  {place}\n" in shown
        assert "lines blocked" not in server.stderr
        assert get(server.port, "/slow/2").body == b"done"
        assert server.interrupt() == 0
        title, *_, heading, rule, cells = server.stderr[server.stderr.index("\nasyncguard: ") :].split("\n")[
            1:6
        ]
        assert title == "asyncguard: 1 line blocked the event loop, in 2 stalls"
        assert row(heading) == ["total ms", "worst ms", "stalls", "waited", "call", "request", "line"]
        assert set(rule) == {"-", " "}
        total, worst, stalls, _, *rest = row(cells)
        assert 500 <= int(total) <= 2 * int(worst) + 2  # both are rounded
        assert [stalls, *rest] == ["2", "time.sleep", "GET /slow/{name}", place]
        assert "Traceback" not in server.stderr


def test_requests_in_flight_are_listed_with_the_line_they_await(project: Path) -> None:
    place = f"main.py:{line_of(project / 'main.py', 'awaits')} in endless"
    with running("main:app", cwd=project) as server, Connection(server.port) as connection:
        connection.send("/endless/1")
        eventually((project / "arrived").exists, "the request has begun")
        server.interrupt()
        closing = server.stderr[server.stderr.index("\nasyncguard: ") :]
    assert re.match(
        r"""
asyncguard: nothing blocked the event loop\.
Still waiting when the service was stopped:
 +\d+\.\d s  GET /endless/\{name\}
 +(.*): await asyncio\.Event\(\)\.wait\(\)  # awaits
""",
        closing,
    ), closing
    assert place in closing


def test_threshold(project: Path) -> None:
    with running("main:app", "--threshold", "20", cwd=project) as server:
        assert get(server.port, "/slow/1").body == b"done"
        assert server.interrupt() == 0
        assert "asyncguard: nothing blocked the event loop." in server.stderr
        assert "BLOCKED" not in server.stderr


def test_project_root_says_whose_lines_count(project: Path) -> None:
    with running("main:app", "--project-root", "shop", cwd=project) as server:
        assert get(server.port, "/slow/1").body == b"done"
        server.await_stderr("waited")
        assert "endpoint  main.py" in server.stderr
        assert "time.sleep(0.25)" not in server.stderr


def test_table_is_shown_at_the_end_by_a_supervisor_too(project: Path) -> None:
    with running("main:app", cwd=project) as server:
        assert get(server.port, "/slow/1").body == b"done"
        server.terminate()
        assert "asyncguard: 1 line blocked the event loop, in 1 stall\n" in server.stderr
        assert server.stderr.count("asyncguard: ") == 1


# -- what it can serve -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["main:create"],
        ["main:create", "--factory"],
        ["main:Made", "--factory"],
        ["main:nested.app"],
        ["shop.web.main:app"],
    ],
    ids=" ".join,
)
def test_serves(project: Path, arguments: list[str]) -> None:
    with running(*arguments, cwd=project) as server:
        assert get(server.port, "/slow/1").body == b"done"
        server.await_stderr("time.sleep(0.25)  # blocks")
        assert server.interrupt() == 0


def test_app_dir(project: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    with running("main:app", "--app-dir", str(project), cwd=elsewhere) as server:
        assert get(server.port, "/slow/1").body == b"done"
        server.await_stderr(f"    line  {project / 'main.py'}:")


# -- uvicorn's own options -------------------------------------------------------------------------


@pytest.mark.parametrize(("loop", "module"), [("asyncio", "asyncio."), ("uvloop", "uvloop")])
def test_loop_is_passed_on(project: Path, loop: str, module: str) -> None:
    with running("main:app", "--loop", loop, cwd=project) as server:
        assert get(server.port, "/hello").body.decode().startswith(module)


def test_host_is_passed_on(project: Path) -> None:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6) as probe:
            port = probe.getsockname()[1]
    except OSError:
        pytest.skip("this machine has no IPv6")
    command = ["asyncguard", "run", "main:app", "--host", "::1", "--port", str(port)]
    with start(command, port, cwd=project) as server:
        server.await_stderr(f"http://[::1]:{port}")
        with Connection(socket.create_connection(("::1", port))) as connection:
            assert connection.get("/hello").status == 200


def test_workers(project: Path) -> None:
    with running("main:app", "--workers", "2", cwd=project) as server:

        def pids() -> set[bytes]:
            # While one worker is blocked, the other takes the next connection.
            with ExitStack() as stack:
                connections = [stack.enter_context(Connection(server.port)) for _ in range(4)]
                for connection in connections[:2]:
                    connection.send("/slow/1")
                for connection in connections[2:]:
                    connection.send("/hello")
                bodies = [connection.receive().body for connection in connections]
            seen.update(body.split()[1] for body in bodies[2:])
            return seen

        seen: set[bytes] = set()
        eventually(lambda: len(pids()) == 2, "answers of both workers")
        server.await_stderr("BLOCKED  GET /slow/{name}")
        assert server.interrupt() == 0
        closings = re.findall(r"asyncguard: (nothing|\d+ lines?) blocked the event loop", server.stderr)
        assert len(closings) == 2
        eventually(lambda: not server.remnants(), "the workers have ended as well")


def test_reload(project: Path) -> None:
    with running("main:app", "--reload", "--reload-delay", "0.05", cwd=project) as server:
        first = get(server.port, "/hello").body.split()[1]
        assert get(server.port, "/slow/1").body == b"done"
        server.await_stderr("BLOCKED  GET /slow/{name}")
        source = project / "main.py"
        source.write_text(source.read_text().replace('"done"', '"changed"'))
        os.utime(source, (2e9, 2e9))

        def restarted() -> bool:
            # A request may reach the old process while that ends.
            with suppress(Truncated, ConnectionError):
                return get(server.port, "/hello").body.split()[1] != first
            return False

        eventually(restarted, "a new process answers")
        assert get(server.port, "/slow/1").body == b"changed"
        eventually(lambda: server.stderr.count("BLOCKED  GET /slow/{name}") == 2, "another stall is shown")


# -- what it refuses -------------------------------------------------------------------------------

REFUSALS = [
    (["main"], "'main' is no import string: write module:attribute, such as main:app"),
    ([".main:app"], "'.main:app' is no import string"),
    (["nowhere:app"], "there is no module 'nowhere' here: .*--app-dir"),
    (["shop.nowhere:app"], "there is no module 'shop.nowhere' here"),
    (["main:ap"], "the module 'main' has no attribute 'ap'; it has app, .*nested"),
    (["shop:app"], "the module 'shop' has no attribute 'app'$"),
    (["main:things"], r"'main:things' is no ASGI application but a list \(\[<starlette"),
    (["main:takes_arguments"], r"'main:takes_arguments' is no ASGI application but a function"),
    (["main:Made"], r"'main:Made' is no ASGI application but a type \(<class 'main.Made'>\)"),
    (["main:things", "--factory"], "'main:things' is no application factory but a list"),
    (["main:garbage"], r"the factory 'main:garbage' returned no ASGI application but an? int \(42\)"),
    (["main:app", "--threshold", "0"], "--threshold must be .* at least 0.001, not 0.0"),
    (["main:app", "--threshold", "nan"], "--threshold must be .* at least 0.001, not nan"),
    (
        ["main:app", "--project-root", "nowhere"],
        "--project-root must be an existing directory, not 'nowhere'",
    ),
    (["main:app", "--port", "99999"], "--port must be between 0 and 65535, not 99999"),
    (
        ["main:app", "--uds", "nowhere/socket"],
        "--uds must be a path in an existing directory, not 'nowhere/socket'",
    ),
    (["main:app", "--host", "host.invalid"], "cannot listen on host.invalid port 8000: .* --host and --port"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSALS, ids=[" ".join(each) for each, _ in REFUSALS])
def test_refusal_is_one_line(project: Path, arguments: list[str], message: str) -> None:
    done = asyncguard("run", *arguments, cwd=project)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.match(f"asyncguard: {message}", done.stderr), done.stderr
    assert done.stderr.count("\n") == 1


def test_candidates_are_applications(project: Path) -> None:
    done = asyncguard("run", "main:ap", cwd=project)
    assert done.stderr == "asyncguard: the module 'main' has no attribute 'ap'; it has app, nested\n"


def test_taken_port_is_one_line(project: Path) -> None:
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        done = asyncguard("run", "main:app", "--host", HOST, "--port", str(port), cwd=project)
    assert done.returncode == 2
    assert done.stderr == (
        f"asyncguard: cannot listen on {HOST} port {port}: address already in use; "
        "choose another with --host and --port\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["main:app", "--threshold", "soon"], "Invalid value for '--threshold': 'soon' is not a valid float"),
        (["main:app", "--no-such-option"], "No such option '?--no-such-option"),
        ([], "Missing argument 'APP'"),
    ],
)
def test_usage_error(project: Path, arguments: list[str], message: str) -> None:
    done = asyncguard("run", *arguments, cwd=project)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.search(f"^Error: {message}", done.stderr, re.MULTILINE), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (
            "broken:app",
            """\
Traceback (most recent call last):
  File "{project}/broken.py", line 5, in <module>
    read()
  File "{project}/broken.py", line 2, in read
    raise LookupError("no file")
LookupError: no file
asyncguard: importing 'broken' failed: LookupError: no file
""",
        ),
        (
            "wants:app",
            """\
Traceback (most recent call last):
  File "{project}/wants.py", line 1, in <module>
    import no_such_library
ModuleNotFoundError: No module named 'no_such_library'
asyncguard: importing 'wants' failed: ModuleNotFoundError: No module named 'no_such_library'
""",
        ),
        (
            "main:failing",
            """\
Traceback (most recent call last):
  File "{project}/main.py", line {raise}, in failing
    raise LookupError("no settings")
LookupError: no settings
asyncguard: the factory 'main:failing' failed: LookupError: no settings
""",
        ),
    ],
)
def test_error_of_the_applications_own_starts_in_its_own_file(
    project: Path, target: str, expected: str
) -> None:
    done = asyncguard("run", target, cwd=project)
    lines = (project / "main.py").read_text().splitlines()
    number = lines.index('    raise LookupError("no settings")') + 1
    assert done.returncode == 2
    # Newer versions of Python underline the failing expression.
    shown = re.sub(r"^ +[~^]+\n", "", done.stderr, flags=re.MULTILINE)
    assert shown == expected.replace("{project}", str(project)).replace("{raise}", str(number))


def test_syntax_error_of_the_applications_own(project: Path) -> None:
    done = asyncguard("run", "unfinished:app", cwd=project)
    assert done.returncode == 2
    assert f'File "{project}/unfinished.py", line 1' in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("asyncguard: importing 'unfinished' failed: SyntaxError: ")


WITHOUT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
from asyncguard.cli import main
main()
"""


@pytest.mark.parametrize("arguments", [["run", "main:app"], ["demo"], ["--help"]], ids=" ".join)
def test_without_uvicorn(project: Path, arguments: list[str]) -> None:
    done = without("uvicorn", arguments, project)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "asyncguard: the command needs uvicorn, which is not installed: pip install 'asyncguard[uvicorn]'\n"
    )


def test_missing_part_of_asyncguard_is_not_put_down_to_uvicorn(project: Path) -> None:
    done = without("asyncguard._demo", ["--help"], project)
    assert done.returncode == 1
    assert "No module named 'asyncguard._demo'" in done.stderr
    assert "uvicorn, which" not in done.stderr


def without(name: str, arguments: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the command where a module is not installed."""
    return subprocess.run(
        [sys.executable, "-c", WITHOUT.format(name=name), *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


# -- help ------------------------------------------------------------------------------------------


def test_version() -> None:
    done = asyncguard("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"asyncguard, version \d+\.\d+\.\d+\n", done.stdout)


def test_help() -> None:
    done = asyncguard("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Usage: asyncguard [OPTIONS] COMMAND [ARGS]...")
    assert re.findall(r"^  (\w+)  ", done.stdout.partition("Commands:")[2], re.MULTILINE) == ["demo", "run"]


def test_help_of_run_names_the_options_of_uvicorn_too() -> None:
    done = asyncguard("run", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    options = set(re.findall(r"^  (--[\w-]+)", done.stdout, re.MULTILINE))
    uvicorns = {
        "--host",
        "--port",
        "--loop",
        "--workers",
        "--reload",
        "--factory",
        "--app-dir",
        "--log-level",
    }
    assert uvicorns | {"--threshold", "--project-root"} <= options
    assert "--version" not in options


def test_no_command() -> None:
    done = asyncguard()
    assert done.returncode == 2
    assert "Usage: asyncguard [OPTIONS] COMMAND" in done.stdout + done.stderr


def test_unknown_command() -> None:
    done = asyncguard("serve")
    assert done.returncode == 2
    assert "No such command 'serve'" in done.stderr
