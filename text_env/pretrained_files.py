"""Loading directories and hub repositories of models with transformers, such that none of their files is run.

transformers would run code in three cases: if a file names Python code of the repository (``auto_map``) and somebody
types ``y`` at the terminal, if weights are pickles, and if the config names an attention kernel that is downloaded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack")
"""The endings of files of weights that are not read."""


def load_pretrained(kind: Any, name: str | Path, new_head: bool = False, **options: Any) -> Any:
    """Call ``kind.from_pretrained(name, **options)`` such that no code comes with the files.

    :param kind: one of transformers' classes: a model, which is read from safetensors or GGUF files alone, a tokenizer
        or a config.
    :param name: a directory or a hub name.
    :param new_head: whether weights that the files don't hold may be random, as those of a head that is yet to be
        trained.
    :param options: further arguments.
    :return: what was loaded.
    :raises ValueError: if a file would have run code, if the weights are pickles, or if some are missing.
    """
    if "gguf_file" not in options and _is_model(kind):
        if Path(name).is_dir():
            _check_weights(Path(name), "model")
        _check_kernels(name)
        options["use_safetensors"] = True
    try:
        if not _is_model(kind):
            return kind.from_pretrained(str(name), trust_remote_code=False, **options)
        model, report = kind.from_pretrained(str(name), trust_remote_code=False, output_loading_info=True, **options)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"Expected {str(name)!r} to be of a kind that transformers knows; its files name Python code of its own "
            "(auto_map), which is never run here. Load it in Python, after reading that code, and give the live object."
        ) from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise ValueError(f"The weights in {str(name)!r} are damaged, or no safetensors at all: {error}") from error
    # Of an adapter, the report is about its base alone.
    if not new_head and not getattr(model, "_hf_peft_config_loaded", False):
        _check_complete(name, model, sorted(report["missing_keys"]))
    return model


def _check_complete(name: str | Path, model: Any, missing: list[str]) -> None:
    """Refuse a model of which some weights would be random numbers, as the head of a reward model that is none."""
    if missing:
        saved = ", ".join(model.config.architectures or ()) or "another model"
        raise ValueError(
            f"Expected {str(name)!r} to hold all weights of a {type(model).__name__}, got those of {saved}, without "
            f"{', '.join(missing[:3])}: these would be random numbers. Name a model of the right kind; `textrlhf "
            "reward-model` trains the head of a reward model."
        )


def not_loaded(name: str | Path, reason: str) -> str:
    """
    :param name: a directory or a hub name, which could not be loaded.
    :param reason: why not.
    :return: the end of a sentence that says so. transformers asks the hub for whatever is no directory, and complains
        of the network where somebody has misspelt one.
    """
    if Path(name).exists():
        return f"which could not be loaded: {reason}"
    line = reason.strip().partition("\n")[0]
    return f"which is no directory here, and could not be loaded from the hub or its cache: {line}"


def check_adapter_files(name: str | Path) -> None:
    """Refuse a PEFT adapter whose files would run code: pickles, and a config that names a module to import.

    :param name: a directory or a hub name.
    :raises ValueError: if they would, or if there is no adapter.
    """
    from transformers.utils.hub import cached_file

    if Path(name).is_dir():
        _check_weights(Path(name), "adapter_model")
    try:
        files = [cached_file(str(name), f"adapter_{file}") for file in ("config.json", "model.safetensors")]
    except OSError as error:
        raise ValueError(f"Expected {str(name)!r} to hold an adapter as safetensors: {error}") from error
    config = read_json(Path(str(files[0])))
    if config.get("megatron_config"):
        raise ValueError(
            f"{files[0]} has a megatron_config, for which PEFT would import the module "
            f"{config.get('megatron_core')!r}: it is not loaded. Take that entry out of the file."
        )


def read_json(path: Path) -> dict[str, Any]:
    """
    :param path: a JSON file.
    :return: the object in it.
    :raises ValueError: if it is no JSON, or holds no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"Expected {path} to be a JSON file, but it cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"Expected {path} to be a JSON object, got a {type(content).__name__}.")
    return content


def _is_model(kind: Any) -> bool:
    return "Model" in kind.__name__


def _check_kernels(name: str | Path) -> None:
    """Refuse a config that names attention kernels of the hub, which are programs."""
    from transformers.utils.hub import cached_file

    try:
        path = cached_file(str(name), "config.json")
    except Exception:  # no such file or place: from_pretrained says so better
        return
    todo: list[Any] = [] if path is None else [read_json(Path(path))]
    while todo:
        part = todo.pop()
        for key, value in part.items() if isinstance(part, dict) else ():
            todo.append(value)
            if "implementation" in str(key) and _names_kernel(value):
                raise ValueError(
                    f"{path} names the kernel {value!r} as its {key!r}. Such kernels are programs that are downloaded, "
                    "so it is not loaded: take that entry out of the file; transformers' own attention does the same."
                )


def _names_kernel(value: Any) -> bool:
    return (
        any(map(_names_kernel, value.values())) if isinstance(value, dict) else isinstance(value, str) and "/" in value
    )


def _check_weights(directory: Path, stem: str) -> None:
    """Refuse weights in pickles.

    :param directory: the directory.
    :param stem: how the names of the weights' files begin.
    :raises ValueError: if there are no weights but pickles, or if the index of the weights names other files.
    """
    index = directory / f"{stem}.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        files = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()
        wrong = sorted(file for file in files if not file.endswith(".safetensors"))
    elif any(directory.glob(f"{stem}*.safetensors")):
        wrong = []
    else:
        wrong = sorted(path.name for path in directory.iterdir() if path.suffix in PICKLES and path.is_file())
        wrong = [file for file in wrong if file != "training_args.bin"]
    if wrong:
        raise ValueError(
            f"Expected the weights in {directory} to be safetensors, got {wrong[:3]}: such files can run code when "
            "they are loaded, so they are not. If you trust them, convert them once in Python: model = "
            f"AutoModelForCausalLM.from_pretrained({str(directory)!r}); model.save_pretrained(NEW_DIRECTORY)."
        )
