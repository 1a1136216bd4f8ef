#!/usr/bin/env bash
# bash bench/gpu.sh OUTPUT_DIR [--seconds N] [--stages a,b] [--ops a,b] [--library FILE] [--dry-run]
# Builds arcore for this machine's GPU, tests, sanitizes and measures it: one JSON for bench/results/, a table at the end.
# Needs torch with CUDA, numpy, pytest, nvcc, g++, cmake and ninja; no network. PYTHON names another interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python3}" bench/gpu/battery.py "$@"
