#!/usr/bin/env bash
# Makes a virtual environment with a Python whose `venv` cannot (Debian ships ensurepip in another package).
# Usage: venv_without_ensurepip.sh PYTHON FOLDER
set -euo pipefail
python=$1 folder=$2
bootstrap=$(mktemp -d)
trap 'rm -rf "$bootstrap"' EXIT
rm -rf "$folder"
if ! "$python" -m pip install --quiet --disable-pip-version-check --target "$bootstrap" virtualenv; then
  echo "arcore: could not make a virtual environment; install Python's venv module (Debian: apt install python3-venv)" >&2
  exit 1
fi
PYTHONPATH=$bootstrap "$python" -m virtualenv --quiet "$folder"
