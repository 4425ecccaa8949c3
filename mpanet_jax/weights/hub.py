"""Weights from Hugging Face, out of its cache or else from the network, and models sent there."""

import contextlib
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

from mpanet_jax.errors import ArgumentError, UserError, first_line

MODEL_FILE = "model.safetensors"  # in a repository, and in the folder of a saved model
CALIBRATION_FILE = "calibration.json"  # beside it, if the model was calibrated


def resolve(source: str) -> Path:
    """The local path of weights.

    Args:
      source: a path, or `hf:owner/name`, a repository on Hugging Face.

    Returns:
      For a repository its model.safetensors, from Hugging Face's cache or downloaded into it; for the folder of a saved
      model the model.safetensors in it; for anything else, a run's workdir too, the path itself.

    Raises:
      UserError: the repository is not in the cache and cannot be downloaded; the message has the command that does it.
    """
    if not source.startswith("hf:"):
        path = Path(source)
        is_saved_model = (path / MODEL_FILE).is_file() and not (path / "checkpoints").exists()
        return path / MODEL_FILE if is_saved_model else path
    import huggingface_hub  # slow to import, and only needed here

    repository = source.removeprefix("hf:")
    try:
        try:
            # The cache first: if the file is there, no network is needed.
            return Path(huggingface_hub.hf_hub_download(repository, MODEL_FILE, local_files_only=True))
        except huggingface_hub.errors.LocalEntryNotFoundError:
            huggingface_hub.logging.set_verbosity_error()  # not its retries: the error below says enough
            path = Path(huggingface_hub.hf_hub_download(repository, MODEL_FILE))
            with contextlib.suppress(huggingface_hub.errors.EntryNotFoundError):  # not every model has one
                huggingface_hub.hf_hub_download(repository, CALIBRATION_FILE)
            return path
    except Exception as error:  # no network, repository, permission or space: the advice is the same
        raise UserError(
            f"{source}: cannot be downloaded ({type(error).__name__}); on a machine with a network, run: "
            f"hf download {repository} {MODEL_FILE}"
        ) from error


def upload(
    repository: str, write: Callable[[Path], None], *, private: bool | None = None, token: str | None = None
) -> str:
    """Uploads a saved model to a repository on Hugging Face, which is made if need be; returns its address.

    Args:
      repository: 'owner/name'.
      write: writes the model's files into a folder.
      private, token: as for `Model.push_to_hub`.

    Raises:
      ArgumentError: `repository` is not of the form 'owner/name'.
      UserError: it cannot be reached, or the account may not write there.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ArgumentError("repository", f"= {repository!r}: expected 'owner/name'")
    import huggingface_hub

    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        try:
            api = huggingface_hub.HfApi(token=token)
            address = api.create_repo(repository, private=private, exist_ok=True)
            api.upload_folder(
                repo_id=repository,
                folder_path=folder,
                commit_message="Upload model",
                delete_patterns=[CALIBRATION_FILE],  # an old one may be of other weights
            )
        except Exception as error:  # no network, no token, no permission: many types
            raise UserError(
                f"{repository}: cannot be pushed to ({type(error).__name__}: {first_line(error)}); give a token "
                "that may write there, or log in with: hf auth login"
            ) from error
    return str(address)
