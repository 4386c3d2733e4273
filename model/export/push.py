"""Upload an exported folder to the Hugging Face hub.

    check_push("org/name")                                  # before anything is computed
    url = push(folder, "org/name", public=False)            # after the comparison

The token is the one that `hf auth login` stored, or HF_TOKEN. It is sent to the hub and printed nowhere.
"""

from __future__ import annotations

import shlex
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from configs import UserError, one_line

LOG_IN = "log in with a token that may write: hf auth login"
EXISTS = 409
"""HTTP status of the hub for a repository that it has already."""
REFUSED = (401, 403)
"""HTTP statuses of the hub for a missing or insufficient token."""


def check_push(repo: str) -> None:
    """Refuse a name that the hub would refuse, and a missing token.

    Raises:
        UserError: the name is not ORG/NAME, or there is no token.
    """
    try:
        validate_repo_id(repo)
        parts = repo.split("/")
    except HFValidationError as error:
        raise UserError(f"--push {shlex.quote(repo)}: {one_line(error)}") from None
    if len(parts) != 2:
        raise UserError(f"--push {repo}: is not ORG/NAME; give both: --push your-name/{parts[-1]}")
    if huggingface_hub.get_token() is None:
        raise UserError(f"--push {repo}: no token for the hub; {LOG_IN}")


def push(folder: Path, repo: str, *, public: bool) -> str:
    """Create a repository if it does not exist, and upload every file of a folder in one commit.

    Files of other names that the repository has stay there.

    Args:
        folder: the exported model.
        repo: ORG/NAME.
        public: whether everybody may see it.

    Returns:
        The address of the repository.

    Raises:
        UserError: the hub refuses it or cannot be reached, or the repository is public and `public` is false.
    """
    api = huggingface_hub.HfApi()
    again = f"hf upload {repo} {shlex.quote(str(folder))} ."
    try:
        try:
            url = str(api.create_repo(repo, private=not public))
        except HfHubHTTPError as error:
            if error.response.status_code != EXISTS:
                raise
            if not public and not api.model_info(repo).private:
                raise UserError(
                    f"exported to {folder}, but not pushed: {repo} exists and is public; if everybody may "
                    f"see this model: {again}"
                ) from None
            url = f"{api.endpoint}/{repo}"
        api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message="Upload a model exported by nanoMolmo2"
        )
    except UserError:
        raise
    except Exception as error:  # of httpx, of the hub's client or of its storage: no common class
        # An upload that fails is a RuntimeError, which does not say why.
        source = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        what = one_line(getattr(source, "server_message", None) or source)
        response = getattr(source, "response", None)
        refused = response is not None and response.status_code in REFUSED
        after = f"{LOG_IN}, then: {again}" if refused else f"try again: {again}"
        private = "" if public else " --private"
        raise UserError(
            f"exported to {folder}, but not pushed to {repo}: {what}; {after}{private}"
        ) from None
    return url
