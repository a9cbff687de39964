#!/usr/bin/env bash
# Set up .venv where that is needed, then run the notebooks:  ./run_all.sh --help  lists the options.
# ./run_all.sh test [pytest options]  runs the tests.
#
# On Linux x86_64, pip's torch is the CUDA build, several GB large. For the CPU build, before the first run:
#   python3 -m venv .venv, then .venv/bin/pip install torch==2.13.0 --index-url followed by the address of PyTorch's
#   own CPU wheels (pytorch.org, "Get started"); this script then finds torch installed and leaves it alone.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv="$root/.venv"
recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

if ! recent "$venv/bin/python"; then
    for python in python3 python3.14 python3.13 python3.12 python3.11 python ""; do
        if [ -z "$python" ]; then
            echo "error: Python 3.11 or newer is needed and none is on the PATH (python3, python3.11 ...)" >&2
            exit 2
        fi
        if recent "$python"; then break; fi
    done
    echo "making $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv"
fi

# The stamp is written after the install, so an interrupted one is repeated.
wanted=$(cksum <"$root/requirements.txt")
if [ "$(cat "$venv/requirements.stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "installing requirements.txt into .venv (once; minutes, since PyTorch is large)"
    rm -f "$venv/requirements.stamp"
    if ! "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$root/requirements.txt"; then
        echo "error: the installation failed; call ./run_all.sh again to repeat it" >&2
        exit 2
    fi
    echo "$wanted" >"$venv/requirements.stamp"
fi

# A path file: the package is found by notebooks in JupyterLab, from any folder.
packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "$root" >"$packages/model-compression-lab.pth"

if [ "${1:-}" = test ]; then
    shift
    cd "$root"
    exec "$venv/bin/python" -m pytest "$@"
fi
# -P: nothing in the folder where this is called is taken for the package.
exec "$venv/bin/python" -P -m nbhelpers.pipeline "$@"
