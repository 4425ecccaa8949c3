"""Weights from Hugging Face: its cache first, then the network."""

import contextlib
from pathlib import Path

from mpanet_jax.errors import UserError

MODEL_FILE = "model.safetensors"  # of a saved model's folder, and of a repository
CALIBRATION_FILE = "calibration.json"  # beside it, where there is one


def resolve(source: str) -> Path:
    """The local path of `source`: itself, or the model.safetensors of a saved model's folder or of `hf:owner/name`.

    The last comes from Hugging Face's cache, or is fetched into it. A run's workdir stays one, whatever lies in it.

    Raises:
      UserError: not in the cache and not to be had; holds the command that gets it.
    """
    if not source.startswith("hf:"):
        path = Path(source)
        is_saved_model = (path / MODEL_FILE).is_file() and not (path / "checkpoints").exists()
        return path / MODEL_FILE if is_saved_model else path
    import huggingface_hub  # slow to import, and needed here only

    repository = source.removeprefix("hf:")
    try:
        try:
            # The cache first: no network traffic, and no wait for it to fail, where the file is there.
            return Path(huggingface_hub.hf_hub_download(repository, MODEL_FILE, local_files_only=True))
        except huggingface_hub.errors.LocalEntryNotFoundError:
            huggingface_hub.logging.set_verbosity_error()  # its retries; the error below says all there is to say
            path = Path(huggingface_hub.hf_hub_download(repository, MODEL_FILE))
            with contextlib.suppress(huggingface_hub.errors.EntryNotFoundError):  # not every model has one
                huggingface_hub.hf_hub_download(repository, CALIBRATION_FILE)
            return path
    except Exception as error:  # no network, no such repository, no permission, no space: all have the same cure
        raise UserError(
            f"{source}: cannot be had ({type(error).__name__}); where there is a network, run: "
            f"hf download {repository} {MODEL_FILE}"
        ) from error
