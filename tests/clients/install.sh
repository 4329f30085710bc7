#!/usr/bin/env bash
# Make .venv-clients and .venv-clients-apart, with the libraries that the tests in this folder are about, and the trackers.
#   tests/clients/install.sh [PYTHON]      (default: python3)
# Two, since RLlib wants an older Gymnasium to the digit, and AgileRL an older tensordict than TorchRL.
set -euo pipefail
cd "$(dirname "$0")/../.."
python="${1:-python3}"

make_environment() {  # FOLDER CONSTRAINTS PACKAGE...
    local pip=("$1/bin/python" -m pip install --quiet --disable-pip-version-check -c "$2")
    [ -x "$1/bin/python" ] || "$python" -m venv "$1"
    "${pip[@]}" torch
    "${pip[@]}" hypothesis pytest "${@:3}"
}

make_environment .venv-clients constraints.txt -e ".[wandb,trackio,mlflow,study]" rl-zoo3 tianshou torchrl
mkdir -p .venv-clients-apart
grep -v '^gymnasium==' constraints.txt > .venv-clients-apart/constraints.txt
make_environment .venv-clients-apart .venv-clients-apart/constraints.txt -e . agilerl "ray[rllib]"
