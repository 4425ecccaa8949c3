"""Weights from Hugging Face: its cache first, then the network."""

from pathlib import Path

from mpanet_jax.errors import UserError


def resolve(source: str) -> Path:
    """The local path of `source`: itself, or for `hf:owner/repository` that repository's model.safetensors.

    The latter comes from Hugging Face's cache, or is fetched into it.

    Raises:
      UserError: not in the cache and not to be had; holds the command that gets it.
    """
    if not source.startswith("hf:"):
        return Path(source)
    import huggingface_hub  # slow to import, and needed here only

    repository = source.removeprefix("hf:")
    try:
        try:
            # The cache first: no network traffic, and no wait for it to fail, where the file is there.
            return Path(huggingface_hub.hf_hub_download(repository, "model.safetensors", local_files_only=True))
        except huggingface_hub.errors.LocalEntryNotFoundError:
            huggingface_hub.logging.set_verbosity_error()  # its retries; the error below says all there is to say
            return Path(huggingface_hub.hf_hub_download(repository, "model.safetensors"))
    except Exception as error:  # no network, no such repository, no permission, no space: all have the same cure
        raise UserError(
            f"{source}: cannot be had ({type(error).__name__}); where there is a network, run: "
            f"hf download {repository} model.safetensors"
        ) from error
