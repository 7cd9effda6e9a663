#!/usr/bin/env bash
# One command that turns a Hopper GPU into evidence: benchmarks/on_gpu.sh OUTPUT [--parts ...] [--quick] [--wheels FOLDER] ...
# $PYTHON chooses the interpreter; default: this repository's .venv if it has one that runs, else python3. It needs PyTorch.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-}"
if [[ -z "$python" ]]; then
  python=python3
  if "$root/.venv/bin/python" -c "import torch" 2>/dev/null; then python="$root/.venv/bin/python"; fi
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m benchmarks.on_gpu "$@"
