"""What asyncguard costs, next to what else could be installed. Run it as `scripts/bench overhead`.

Four measurements, each of which compares within one run:

- under uvicorn: the CPU of a server, for the same requests, over that of a bare one. There is a process
  for each variant; they all run at once, and take turns of a few dozen requests;
- idle: the CPU of the same servers while nobody asks them anything, all at once;
- in process: microseconds per request without a server, see `benchmarks.inprocess`;
- the import of asyncguard where FastAPI is imported already, in fresh interpreters, compiled beforehand.

All of it runs on one core: where it had two, half of the rounds of two equal servers differed by up to
12 % on a shared machine, instead of 2 %. And the servers are started anew a few times, since two processes
that do the same may differ by 2 % for as long as they live.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.apps import LEFT_OUT, VARIANTS, Variant
from benchmarks.servers import CONNECTIONS, Failed, Server, serve
from benchmarks.summary import Budget, Spread, differences, ratios, table

MOST_RATIO = 1.05
MOST_MICROSECONDS = 2.5
MOST_IDLE = 0.5
MOST_IMPORT = 25.0

_ROOT = Path(__file__).parents[1]
_SETTLING = 2.0  # seconds until what a server does once has been done
_SUBPROCESS_TIMEOUT = 600.0

_IMPORT = "import time, fastapi; t = time.perf_counter(); import asyncguard; print(time.perf_counter() - t)"


@dataclass
class Results:
    """What was measured, as it was measured: `--json` writes it."""

    machine: dict[str, str]
    load: dict[str, list[float]] = field(default_factory=dict)
    idle: dict[str, float] = field(default_factory=dict)
    in_process: dict[str, dict[str, dict[str, list[float]]]] = field(default_factory=dict)
    imports: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.round % CONNECTIONS:
        parser.error(f"--round: takes a multiple of {CONNECTIONS}")
    names = _chosen(options.only)
    results = Results(_machine(options.http))
    print("\n".join(f"{name}: {value}" for name, value in results.machine.items()), flush=True)
    for name in list(names):
        needed = VARIANTS[name].distribution
        if needed and not _version(needed):
            print(f"left out: {name}, which is not installed on Python {platform.python_version()}")
            names.remove(name)
    for name, why in LEFT_OUT.items():
        print(f"left out: {name}; {why}")

    budgets: list[Budget] = []
    with _on_one_core():
        _measure_servers(results, names, options)
        budgets += _show_load(results, options)
        budgets += _show_idle(results, options.idle)
        _measure_in_process(results, options.in_process)
        budgets += _show_in_process(results)
        _measure_imports(results, options.imports)
        budgets += _show_imports(results)

    print("\nBudgets of asyncguard\n", *budgets, sep="\n")
    for failure in results.failures:
        print(f"\nfailed: {failure}")
    if options.json:
        budget_list = [{**asdict(budget), "met": budget.met} for budget in budgets]
        options.json.write_text(json.dumps({**asdict(results), "budgets": budget_list}, indent=1) + "\n")
    missed = options.check and not all(budget.met for budget in budgets)
    return 1 if results.failures or missed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/bench overhead",
        description="What asyncguard costs, next to what else could be installed.",
    )
    parser.add_argument("--requests", type=_positive, default=10_000, help="to each server (%(default)s)")
    parser.add_argument("--round", type=_positive, default=50, help="of how many requests (%(default)s)")
    parser.add_argument("--starts", type=_positive, default=4, help="of each server (%(default)s)")
    parser.add_argument("--idle", type=float, default=30.0, help="seconds without a request (%(default)s)")
    parser.add_argument(
        "--in-process", type=_positive, default=300, metavar="ROUNDS", help="per variant (%(default)s)"
    )
    parser.add_argument("--imports", type=_positive, default=15, help="how many (%(default)s)")
    parser.add_argument("--only", metavar="NAME,...", help=f"of: {', '.join(VARIANTS)}")
    parser.add_argument("--http", choices=["h11", "httptools"], default="h11", help="uvicorn's parser")
    parser.add_argument("--check", action="store_true", help="fail when a budget is missed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample to FILE")
    quick = {"requests": 2000, "starts": 1, "idle": 5.0, "in_process": 50, "imports": 5}
    parser.add_argument(
        "--quick", action=_Quick, nargs=0, const=quick, help="fewer of everything; give it first"
    )
    return parser


class _Quick(argparse.Action):
    """Sets several options at once."""

    def __call__(self, _: object, namespace: argparse.Namespace, *__: object) -> None:
        vars(namespace).update(self.const)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def _chosen(only: str | None) -> list[str]:
    """The variants to measure; a baseline comes with what is compared with it."""
    if only is None:
        return list(VARIANTS)
    wanted = only.split(",")
    if unknown := [name for name in wanted if name not in VARIANTS]:
        raise SystemExit(f"no such variant: {', '.join(unknown)}")
    needed = {*wanted, *(VARIANTS[name].baseline for name in wanted)}
    return [name for name in VARIANTS if name in needed]


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _machine(http: str) -> dict[str, str]:
    packages = ["asyncguard", "fastapi", "starlette", "uvicorn", "uvloop", http]
    packages += dict.fromkeys(variant.distribution for variant in VARIANTS.values() if variant.distribution)
    versions = [f"{package} {version}" for package in packages if (version := _version(package))]
    return {
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "cores": f"{os.cpu_count()}, of which one is used",
        "packages": ", ".join(versions),
    }


@contextmanager
def _on_one_core() -> Iterator[None]:
    """Keep this process, and those that it starts, on one core."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(allowed)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


# -- servers ---------------------------------------------------------------------------------------


def _measure_servers(results: Results, names: list[str], options: argparse.Namespace) -> None:
    names = list(names)
    for start in range(options.starts):
        idle = options.idle if start == options.starts - 1 else 0.0
        _measure_one_start(results, names, options, idle)


def _measure_one_start(results: Results, names: list[str], options: argparse.Namespace, idle: float) -> None:
    """Measure each variant; one that fails is taken out of `names` and of the results."""

    def drop(server: Server, failure: Failed) -> None:
        name = server.variant.name
        results.failures.append(str(failure))
        results.load.pop(name, None)
        names.remove(name)
        servers.remove(server)

    with ExitStack() as stack:
        servers = [stack.enter_context(serve(VARIANTS[name], http=options.http)) for name in names]
        for server in list(servers):
            try:
                server.await_answer()
                server.connect()
                server.load(options.round)
            except Failed as failure:
                drop(server, failure)
        for number in range(max(1, options.requests // options.starts // options.round)):
            # Both ways round: what one server leaves in the caches is not always left to the same one.
            for server in _turned(servers, number):
                try:
                    used = server.load(options.round)
                except Failed as failure:
                    drop(server, failure)
                else:
                    results.load.setdefault(server.variant.name, []).append(used / 1e9)
        for server in servers:
            server.disconnect()
        if idle > 0:
            _measure_idle(results, servers, idle)


def _turned(servers: list[Server], number: int) -> list[Server]:
    """The servers from another one on in each round, and backwards in every other one."""
    first = number // 2 % max(1, len(servers))
    turned = servers[first:] + servers[:first]
    return turned[::-1] if number % 2 else turned


def _measure_idle(results: Results, servers: list[Server], seconds: float) -> None:
    time.sleep(_SETTLING)
    began = time.monotonic()
    before = {server: server.cpu_time for server in servers}
    time.sleep(seconds)
    for server in servers:
        used = (server.cpu_time - before[server]) / 1e9
        results.idle[server.variant.name] = 100 * used / (time.monotonic() - began)


def _show_load(results: Results, options: argparse.Namespace) -> list[Budget]:
    rows, budgets = [], []
    for name, samples in results.load.items():
        seconds = 10_000 * Spread.of(samples).median / options.round
        baseline = VARIANTS[name].baseline
        if name == baseline or baseline not in results.load:
            rows.append([name, f"{seconds:.2f} s", "1"])
            continue
        spread = Spread.of(ratios(samples, results.load[baseline]))
        rows.append([name, f"{seconds:.2f} s", spread.show(3)])
        if _is_ours(VARIANTS[name]):
            budgets.append(Budget(f"{name}: CPU under uvicorn", MOST_RATIO, spread.median, " x bare"))
    title = (
        f"\nUnder uvicorn ({options.http}), FastAPI hello world: {options.requests} requests to each, "
        f"in rounds of {options.round} on {CONNECTIONS} connections; started {options.starts} times.\n"
        "How far 'bare again' is from 1 is how exact this run is."
    )
    print(table(title, ["", "CPU per 10,000 requests", "over bare (quartiles)"], rows), flush=True)
    return budgets


def _show_idle(results: Results, seconds: float) -> list[Budget]:
    if not results.idle:
        return []
    rows = [[name, f"{share:.2f} %"] for name, share in results.idle.items()]
    print(table(f"\nIdle: {seconds:g} s without a request, all servers at once", ["", "of a core"], rows))
    return [
        Budget(f"{name}: more CPU while idle", MOST_IDLE, share - results.idle[baseline], " % of a core")
        for name, share in results.idle.items()
        if _is_ours(VARIANTS[name]) and (baseline := VARIANTS[name].baseline) in results.idle
    ]


def _is_ours(variant: Variant) -> bool:
    return variant.name.startswith("asyncguard")


# -- in process ------------------------------------------------------------------------------------


def _measure_in_process(results: Results, rounds: int) -> None:
    for loop in ("asyncio", "uvloop"):
        command = ["-m", "benchmarks.inprocess", "--loop", loop, "--rounds", str(rounds)]
        try:
            results.in_process[loop] = json.loads(_output_of(command))
        except Failed as failure:
            results.failures.append(str(failure))


def _show_in_process(results: Results) -> list[Budget]:
    rows, budgets = [], []
    for loop, apps in results.in_process.items():
        for app, variants in apps.items():
            for name, samples in variants.items():
                more = Spread.of(differences(samples, variants["bare"]))
                total = f"{Spread.of(samples).median:.2f}"
                shown = "" if name == "bare" else more.show(2)
                rows.append([f"{app}, {loop}: {name}", total, shown])
                if name == "asyncguard":
                    what = f"{app}, {loop}: more CPU per request in process"
                    budgets.append(Budget(what, MOST_MICROSECONDS, more.median, " us"))
    heads = ["", "us per request", "more than bare (quartiles)"]
    print(table("\nIn process, without a server", heads, rows), flush=True)
    return budgets


# -- import ----------------------------------------------------------------------------------------


def _measure_imports(results: Results, times: int) -> None:
    """Measure it as it is after an installation, for which pip compiles every module."""
    with tempfile.TemporaryDirectory(prefix="asyncguard-bench-") as compiled:
        environment = {"PYTHONPYCACHEPREFIX": compiled, "PYTHONDONTWRITEBYTECODE": ""}
        try:
            _output_of(["-c", _IMPORT], **environment)
            for _ in range(times):
                results.imports.append(1000 * float(_output_of(["-c", _IMPORT], **environment)))
        except Failed as failure:
            results.failures.append(str(failure))


def _show_imports(results: Results) -> list[Budget]:
    if not results.imports:
        return []
    spread = Spread.of(results.imports)
    rows = [["import asyncguard", f"{spread.show(1)} ms"]]
    title = f"\nImport after FastAPI, in {len(results.imports)} fresh interpreters"
    print(table(title, ["", "median (quartiles)"], rows), flush=True)
    return [Budget("import after FastAPI", MOST_IMPORT, spread.median, " ms")]


def _output_of(arguments: list[str], **environment: str) -> Any:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=_ROOT,
        env={**os.environ, "PYTHONHASHSEED": "0", **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_SUBPROCESS_TIMEOUT,
        check=False,
    )
    if done.returncode:
        raise Failed(f"{' '.join(arguments)}:\n{done.stderr}")
    return done.stdout


def _end(*_: object) -> None:
    raise SystemExit(143)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _end)  # so that the servers are ended too
    sys.exit(main())
