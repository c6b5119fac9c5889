"""Makes the environment that a script runs in, once, and prints its folder.

    python scripts/_env.py LOCK [VERSION]

The environment is `.envs/LOCK` (or `.envs/LOCK-VERSION`): the packages of `requirements/LOCK.txt`,
each checked against its hash, and the checkout itself, editable. It is made anew when the lock,
the project's metadata or the checkout's place has changed, when its interpreter is gone, and when
it was never finished. Needs nothing but the standard library of Python 3.11.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# What a user may say to pip about where packages come from. Any other setting could send them
# to another place than the environment (PIP_USER, PIP_TARGET, PIP_PREFIX, ...).
PIP_SETTINGS = {
    f"PIP_{name}"
    for name in (
        *("CONFIG_FILE", "INDEX_URL", "EXTRA_INDEX_URL", "FIND_LINKS", "NO_INDEX", "TRUSTED_HOST"),
        *("CERT", "CLIENT_CERT", "PROXY", "KEYRING_PROVIDER", "TIMEOUT", "DEFAULT_TIMEOUT"),
        *("RETRIES", "CACHE_DIR", "NO_CACHE_DIR"),
    )
}


class SetupError(Exception):
    """Raised when a step of making the environment failed; says which and why."""


def fingerprint(lock: Path) -> str:
    """What the environment depends on, apart from its interpreter."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    metadata = {name: project[name] for name in ("build-system", "project")}
    files = [path.read_text("utf-8") for path in (lock, Path(__file__))]
    parts = [str(ROOT), json.dumps(metadata), *files]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def runs(python: Path, *arguments: str) -> bool:
    """Whether this interpreter is there and gets through these arguments."""
    try:
        return not subprocess.run([python, *arguments], capture_output=True, check=False).returncode
    except OSError:
        return False


def run(*command: str | Path) -> None:
    """Runs a command silently, unless it fails."""
    variables = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("PIP_") or name in PIP_SETTINGS
    }
    variables |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", "PIP_USER": "0"}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=variables,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if done.returncode:
        raise SetupError(f"{done.stdout}\nfailed: {' '.join(map(str, command))}")


def bootstrap_pip(environment: Path, python: Path, pip_lock: Path) -> None:
    """Puts some pip into an environment that has none, by whatever the machine offers."""
    install = ("install", "--require-hashes", "--requirement", pip_lock)
    if runs(python, "-m", "ensurepip"):  # Debian has it in a package of its own
        return
    if runs(Path(sys.executable), "-m", "pip", "--version"):
        run(sys.executable, "-m", "pip", "--python", python, *install)
    elif uv := shutil.which("uv"):
        run(uv, "pip", *install, "--python", python)
    elif virtualenv := shutil.which("virtualenv"):
        run(virtualenv, "--python", sys.executable, environment)
    else:
        raise SetupError(
            f"{sys.executable} has neither ensurepip nor pip: "
            "install python3-venv (Debian, Ubuntu), uv or virtualenv"
        )


def make(environment: Path, python: Path, lock: Path) -> None:
    """Makes the environment from scratch."""
    venv.EnvBuilder(clear=True, symlinks=True).create(environment)
    # The pip of the lock comes first, alone: an old one may not understand the rest.
    pip_lock = environment / "pip.txt"
    pip_lock.write_text(
        "".join(re.findall(r"^pip==.*\n(?: .*\n)+", lock.read_text("utf-8"), re.MULTILINE)), "utf-8"
    )
    bootstrap_pip(environment, python, pip_lock)
    pip = (python, "-m", "pip", "--quiet", "install")
    run(*pip, "--require-hashes", "--requirement", pip_lock)
    run(*pip, "--require-hashes", "--requirement", lock)
    run(*pip, "--no-deps", "--no-build-isolation", "--editable", ROOT)


def main(lock_name: str, *version: str) -> None:
    """Prints the folder of the environment, which is made first where need be."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends this without a traceback
    name = "-".join((lock_name, *version))
    lock = ROOT / "requirements" / f"{lock_name}.txt"
    environment = ROOT / ".envs" / name
    python = environment / "bin" / "python"
    stamp = environment / "asyncguard.stamp"  # written last: without it nothing is finished

    environment.parent.mkdir(exist_ok=True)
    with (environment.parent / f"{name}.lock").open("w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)  # two scripts may start at once
        wanted = fingerprint(lock)
        finished = stamp.exists() and stamp.read_text("utf-8") == wanted
        if not (finished and runs(python, "-c", "import pip")):
            print(f"making the {name} environment (once)...", file=sys.stderr, flush=True)
            try:
                make(environment, python, lock)
            except SetupError as error:
                sys.exit(str(error))
            stamp.write_text(wanted, "utf-8")
    print(environment)


if __name__ == "__main__":
    main(*sys.argv[1:])
