"""A policy with its model card, sent to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, constants

from agents.runs.model_card import write_card


def push(
    directory: Path, repo: str, private: bool = False, message: str | None = None, endpoint: str | None = None
) -> str:
    """Upload a policy, and nothing else of its run. The card is written anew before, with what is known by now.

    :param directory: the directory of a run, or of a policy.
    :param repo: the repository, ``"owner/name"``, which is made if there is none.
    :param private: whether a repository that is made is private.
    :param message: the message of the commit.
    :param endpoint: the address of the Hub; None: as huggingface_hub has it.
    :return: the address of the commit.
    :raises FileNotFoundError: if there is no policy.
    :raises ConnectionError: if the Hub is not to be reached, or refuses.
    """
    policy = directory / "policy" if (directory / "config.yaml").is_file() else directory
    if not (policy / "config.json").is_file() and not (policy / "adapter_config.json").is_file():
        raise FileNotFoundError(
            f"Expected the directory of a run or of a policy; found no model in {policy}. A run has one once an "
            "update is finished and the run has ended."
        )
    if constants.HF_HUB_OFFLINE:
        raise ConnectionError("HF_HUB_OFFLINE is set, so that nothing can be pushed. Unset it, and try again.")
    place = policy.absolute()  # which has names also for "."
    of_run = place.name == "policy" and (place.parent / "config.yaml").is_file()
    if of_run:
        write_card(place.parent)
    name = place.parent.name if of_run else place.name
    api = HfApi(endpoint=endpoint)
    try:
        made = api.create_repo(repo, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=made.repo_id, folder_path=policy, commit_message=message or f"A policy of {name}"
        )
    except Exception as error:  # what it raises without a network depends on the library that speaks HTTP for it
        raise ConnectionError(
            f"{repo!r} could not be pushed to {api.endpoint}: {error} `hf auth login` says who you are, and a "
            "repository of somebody else's takes nothing."
        ) from error
    return str(commit.commit_url)
