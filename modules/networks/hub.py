"""Upload a folder to the Hugging Face hub."""

import re
from pathlib import Path

from trunkline import TrunklineError
from trunkline.names import hub_reachable

REPOSITORY = re.compile(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]{0,95}")


def upload(folder: str | Path, repository: str, private: bool | None = None, token: str | None = None) -> str:
    """Upload the files of a folder to a repository of models on the hub, which is created if missing.

    Args:
        folder: the folder.
        repository: `owner/name`, or a name of your own account.
        private: of a repository that is created: whether others cannot see it. None is the account's setting.
        token: of the hub; None takes that of the environment (`HF_TOKEN`) or of `hf auth login`.

    Returns:
        the repository's address.

    Raises:
        TrunklineError: if the name is none of a repository, there is no token, or the hub cannot be reached or refuses.
    """
    check_repository(repository)
    from huggingface_hub import HfApi, get_token

    token = token or get_token()
    if token is None:
        raise TrunklineError(
            f"cannot upload to {repository}: there is no token of the Hugging Face hub; set HF_TOKEN, or log in with "
            "`hf auth login`"
        )
    if not hub_reachable():
        raise TrunklineError(f"cannot upload to {repository}: the Hugging Face hub cannot be reached from here")
    api = HfApi(token=token)
    try:
        created = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=created.repo_id, folder_path=folder, commit_message="Upload of Trunkline")
    except Exception as error:  # the hub's client raises many kinds
        raise TrunklineError(f"the hub did not take the upload to {repository}: {error}") from error
    return str(created)


def check_repository(name: str) -> None:
    """Refuse a name that no repository can have.

    Raises:
        TrunklineError: if it is one.
    """
    if not REPOSITORY.fullmatch(name) or "--" in name or ".." in name or name.endswith((".git", "-", ".")):
        raise TrunklineError(
            f"'{name}' is no name of a repository on the hub; give owner/name of letters, digits, '-', '_' and '.'"
        )
