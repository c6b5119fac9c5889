# Sourced by the other scripts. Sets $root, the checkout. `environment LOCK [VERSION]` makes, where
# need be, and activates an environment that holds requirements/LOCK.txt and the checkout.

unset PYTHONHOME PYTHONPATH
scripts=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
root=$(dirname -- "$scripts")

# A free-threaded build ("t") will not do: much of what is locked has no wheels for it.
is_wanted='
import sys
version = "%d.%d" % sys.version_info[:2]
right_version = version == sys.argv[1] if sys.argv[1] else sys.version_info >= (3, 11)
sys.exit(not right_version or sys.implementation.name != "cpython" or "t" in sys.abiflags)
'

# Prints the path of the first CPython >= 3.11, or of VERSION. To be there is not enough: it has
# to run, since a pyenv shim may stand in PATH for a Python that is not switched on.
find_python() { (
    set -f
    IFS=:
    for directory in $PATH; do
        for name in python3 python python3.11 python3.12 python3.13 python3.14 python3.15; do
            try_python "$directory/$name" "${1-}" && exit
        done
    done
    set +f
    for candidate in "${PYENV_ROOT:-${HOME-}/.pyenv}"/versions/3.*/bin/python; do
        try_python "$candidate" "${1-}" && exit
    done
    exit 1
) }

try_python() {
    [ -x "$1" ] && "$1" -c "$is_wanted" "$2" >/dev/null 2>&1 && echo "$1"
}

environment() {
    python=$(find_python "${2-}") || {
        echo "$0: needs CPython ${2:-3.11 or newer}, and found none on this machine" >&2
        exit 2
    }
    VIRTUAL_ENV=$("$python" "$scripts/_env.py" "$@") || exit
    PATH=$VIRTUAL_ENV/bin:$PATH
    export VIRTUAL_ENV PATH
}
