"""A trained network that turns images into vectors: what `mpanet_jax.load` returns."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, overload

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float32

from mpanet_jax.errors import ArgumentError, UserError
from mpanet_jax.evaluation.calibration import Calibration
from mpanet_jax.evaluation.extract import Embed, make_embed, whole_variables
from mpanet_jax.evaluation.given_images import GivenImage, SkippedImage, listed_images, rows_of_images
from mpanet_jax.evaluation.pair_score import PairScore, calibration_path, score_pair
from mpanet_jax.files import write_whole_folder
from mpanet_jax.methods import make_method
from mpanet_jax.methods.method import Method, compute_dtype
from mpanet_jax.modality import UNKNOWN, Modality, modality_numbers
from mpanet_jax.model_folder import write_model
from mpanet_jax.row_norms import l2_normalize
from mpanet_jax.settings import Settings
from mpanet_jax.settings_base import replace, to_dict
from mpanet_jax.weights.convert import metrics_of_weights, read_weights
from mpanet_jax.weights.hub import upload
from mpanet_jax.weights.names import Variables, to_state_dict

NUM_IDS = 1  # identities of a model's classifiers, which nothing uses


class Model:
    """A trained network, ready to embed images on all devices of this process.

        model = mpanet_jax.load("runs/sysu")
        embeddings = model.embed(["a.jpg", "b.jpg"])  # float32[2, D]
        similarity = embeddings @ embeddings.T

    Attributes:
      settings: of the run that trained it.
      source: where the weights come from; messages and model cards name it.
      method: the method that it was trained by.
      variables: {"params", "batch_stats"} of `network`; the classifiers, which only training needs, are zeros.
      metrics: the figures that were measured with these weights, in the form of a run's metrics.json; None: unknown.
    """

    def __init__(
        self,
        settings: Settings,
        variables: Variables,
        source: str | Path,
        metrics: Mapping[str, Mapping[str, Any]] | None = None,
    ):
        """Makes a model from variables; `load` reads them from files.

        Args:
          settings, source, metrics: as the attributes.
          variables: {"params", "batch_stats"}, with or without classifiers.

        Raises:
          UserError: the variables are those of a backbone alone, which has no embedding.
        """
        self.settings, self.source, self.metrics = settings, str(source), metrics
        self._calibration_path = calibration_path(source)  # absolute, as the current folder may change
        self.method: Method = make_method(settings)
        names = self.method.names()
        flat: dict[tuple[str, ...], Any] = flatten_dict({name: variables[name] for name in ("params", "batch_stats")})
        needed = {path: leaf for path, leaf in flat.items() if not names.is_classifier(names.name(path))}
        self.variables: Variables = whole_variables(self.method, unflatten_dict(needed), source)[1]

    def __repr__(self) -> str:
        data, model = self.settings.data, self.settings.model
        return (
            f"Model({self.source!r}: method {self.settings.method!r}, {model.backbone}, "
            f"images {data.height}×{data.width}, D = {self.size})"
        )

    @cached_property
    def network(self) -> nn.Module:
        """The network of the `variables`, for one identity, in the plain or fused form that the settings ask for."""
        return self.method.build(NUM_IDS)

    @cached_property
    def size(self) -> int:
        """D, the length of an embedding."""
        return self._row_shape(self.method.embed)[0]

    def _row_shape(self, function: Callable[..., Any]) -> tuple[int, ...]:
        """The shape of a row that `function` (see `make_embed`) computes for an image."""
        data = self.settings.data
        images = jax.ShapeDtypeStruct((1, data.height, data.width, 3), jnp.uint8)
        modality = jax.ShapeDtypeStruct((1,), jnp.int32)
        return jax.eval_shape(partial(function, self.network), self.variables, images, modality).shape[1:]

    @property
    def dtype(self) -> str:
        """The type in which convolutions and matrix products are computed here: `settings.dtype`, 'auto' resolved."""
        return compute_dtype(self.settings.dtype).name

    @cached_property
    def fingerprint(self) -> str:
        """A SHA-256, in hex, of everything that decides an embedding except the precision.

        That is the arrays without the classifiers, the method, `settings.model` without `fused`, the images' size, the
        filter of their resize, and `settings.eval.flip`. A run and a model that was saved from it have the same one.
        """
        settings = to_dict(self.settings)
        decides = {
            "method": settings["method"],
            "model": {name: value for name, value in settings["model"].items() if name != "fused"},
            "data": {name: settings["data"][name] for name in ("height", "width", "resize")},
            "flip": settings["eval"]["flip"],
        }
        digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode())
        for name, array in sorted(self.state_dict().items()):
            digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
            digest.update(array.tobytes())
        return digest.hexdigest()

    def state_dict(self) -> dict[str, np.ndarray]:
        """The arrays by the published program's names in PyTorch, without the classifiers."""
        names = self.method.names()
        arrays = to_state_dict(self.variables, names)
        return {name: array for name, array in arrays.items() if not names.is_classifier(name)}

    @overload
    def embed(
        self,
        images: Iterable[GivenImage],
        *,
        modality: Modality | None = None,
        normalize: bool = True,
        batch_size: int | None = None,
        errors: Literal["raise"] = "raise",
    ) -> Float32[np.ndarray, "n d"]: ...

    @overload
    def embed(
        self,
        images: Iterable[GivenImage],
        *,
        modality: Modality | None = None,
        normalize: bool = True,
        batch_size: int | None = None,
        errors: Literal["skip"],
    ) -> tuple[Float32[np.ndarray, "n d"], list[SkippedImage]]: ...

    def embed(
        self,
        images: Iterable[GivenImage],
        *,
        modality: Modality | None = None,
        normalize: bool = True,
        batch_size: int | None = None,
        errors: str = "raise",
    ) -> Float32[np.ndarray, "n d"] | tuple[Float32[np.ndarray, "n d"], list[SkippedImage]]:
        """Embeds images: one row for each, in their order.

        Args:
          images: any number of images, also none. Each is a path, one of Pillow's images, or an array uint8[H, W, 3]
            (RGB) or uint8[H, W] (grey), of any size. They are resized as in training; grey becomes three equal
            channels.
          modality: 'visible' or 'infrared' for all images, or a list with one for each. AGW and CAJ need it; MPANet
            does not.
          normalize: make rows of length 1, whose products are cosines; False: as the network outputs them.
          batch_size: images at once; None: `settings.eval.batch_size`.
          errors: what to do with images that cannot be read: 'raise' an error, or 'skip' them.

        Returns:
          float32[N, D]. With errors='skip', a pair: float32[M, D] for the images that could be read, and a list with
          the (position, name, reason) of each of the others.

        Raises:
          UserError: an image cannot be read, with errors='raise'; the message names it.
          ArgumentError: `images` is not a list of images, the method needs a `modality` and there is none, or another
            argument has a value that it cannot have.
        """
        blocks, skipped = self._rows(self._embed, images, modality, batch_size, errors)
        rows = np.concatenate([np.zeros((0, self.size), np.float32), *blocks])  # there may be no block
        if normalize:
            rows = l2_normalize(rows)
        return (rows, skipped) if errors == "skip" else rows

    def pattern_maps(
        self, images: Iterable[GivenImage], *, modality: Modality | None = None
    ) -> Float32[np.ndarray, "n l h w"]:
        """Computes the pattern maps of images: where each of the L patterns looks (eq. 4 of the paper).

        Args:
          images, modality: as in `embed`.

        Returns:
          float32[N, L, H', W'], values from 0 to 1. The resolution is that of the network's last stage, a sixteenth of
          the resized image's.

        Raises:
          UserError: the network makes no maps, or an image cannot be read.
          ArgumentError: as `embed`.
        """
        shape = self._row_shape(self.method.pattern_maps)
        blocks, _ = self._rows(self._maps, images, modality, None, "raise")
        return np.concatenate([np.zeros((0, *shape), np.float32), *blocks])

    def compare(
        self,
        a: GivenImage,
        b: GivenImage,
        *,
        modality: Modality | None = None,
        prior: float | None = None,
        calibration: Calibration | str | os.PathLike | None = None,
    ) -> PairScore:
        """Compares two images: their similarity and, if the model is calibrated, the probability of one person.

        Args:
          a, b: the images, each as in `embed`.
          modality: of both images, or a pair. Pairs of one modality and of two are calibrated separately, so without it
            there is no probability.
          prior: the assumed share of pairs that show one person; None: the calibration's.
          calibration: a calibration of this model, or its file; None: calibration.json in the model's folder or beside
            its file, where scripts/calibrate.py writes it, if it is there.

        Returns:
          The similarity, from −1 to 1, and the probability, or why there is none.

        Raises:
          UserError: an image or the calibration cannot be read, or the calibration is of another model.
          ArgumentError: as `embed`, or `prior` is no probability.
        """
        return score_pair(
            self.embed([a, b], modality=modality),
            modality_numbers(modality, 2),
            fingerprint=self.fingerprint,
            source=self.source,
            path=self._calibration_path,
            calibration=calibration,
            prior=prior,
        )

    def save(self, folder: str | Path) -> None:
        """Writes the model into a new folder, which `load` reads; whole or not at all.

        The folder has model.safetensors, a model card, README.md, and the model's calibration.json if there is one. The
        settings are in the first file's metadata, without this machine's paths.

        Raises:
          UserError: the folder exists and is not empty, or the calibration cannot be read.
        """
        with write_whole_folder(folder) as whole:
            name = Path(folder).resolve().name
            self._write(whole, name, name)

    def push_to_hub(self, repository: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Uploads what `save` writes to a repository on Hugging Face, which is made if need be.

        Args:
          repository: 'owner/name'; `load("hf:owner/name")` reads the model from there.
          private: whether a new repository is private; None: the owner's default.
          token: of an account that may write there; None: that of `hf auth login`, or HF_TOKEN.

        Returns:
          The repository's address.

        Raises:
          ArgumentError: `repository` is not of the form 'owner/name'.
          UserError: it cannot be reached, or the account may not write there.
        """
        repository = repository.removeprefix("hf:")
        write = partial(self._write, name=repository.rpartition("/")[2], source=f"hf:{repository}")
        return upload(repository, write, private=private, token=token)

    def _write(self, folder: Path, name: str, source: str) -> None:
        write_model(
            folder,
            name,
            settings=self.settings,
            state_dict=self.state_dict(),
            calibration=self._calibration_path,
            metrics=self.metrics,
            fingerprint=self.fingerprint,
            source=source,
            size=self.size,
            needs_modality=self.method.needs_modality,
        )

    @cached_property
    def _embed(self) -> Embed:
        return make_embed(self.method, NUM_IDS)(self.variables)

    @cached_property
    def _maps(self) -> Embed:
        return make_embed(self.method, NUM_IDS, self.method.pattern_maps)(self.variables)

    def _rows(
        self,
        function: Embed,
        images: Iterable[GivenImage],
        modality: Modality | None,
        batch_size: int | None,
        errors: str,
    ) -> tuple[list[np.ndarray], list[SkippedImage]]:
        listed = listed_images(images)
        numbers = modality_numbers(modality, len(listed))
        if self.method.needs_modality and (numbers == UNKNOWN).any():
            raise ArgumentError(
                "modality",
                f"is missing, and method {self.settings.method!r} needs it; expected 'visible' or 'infrared', or a "
                "list with one of them for each image",
            )
        size = self.settings.eval.batch_size if batch_size is None else batch_size
        return rows_of_images(function, listed, numbers, self.settings.data, batch_size=size, errors=errors)


def load(
    source: str | Path, *, checkpoint: str = "last", dtype: str | None = None, settings: Settings | None = None
) -> Model:
    """Loads a trained model, wherever it is.

    Args:
      source: a run's workdir, a `.safetensors` or `.pth` file, a folder that `Model.save` or scripts/convert_weights.py
        wrote, or `hf:owner/name` for a repository on Hugging Face, from its cache or else from the network.
      checkpoint: which one of a workdir: 'last', 'best' (kept with settings.eval.best), or 'untrained' for the network
        before its first step. Other sources have no choice of checkpoints.
      dtype: the precision of convolutions and matrix products: 'float32', 'bfloat16' or 'auto' (bfloat16 on
        accelerators, float32 on CPUs); None: as trained.
      settings: of the network, for weights that carry none, such as the published program's; None: the paper's.

    Raises:
      UserError: the weights are not there, not readable, not of this network, or of a backbone alone; the message says
        which. For a repository that cannot be reached it has the command that fetches it.
      ArgumentError: `checkpoint` is unknown, or is not 'last' for a source that is no workdir.
    """
    if not str(source).startswith("hf:") and not Path(source).exists():
        raise UserError(
            f"{source}: no such file or folder; expected a run's workdir, a .safetensors or .pth file, the folder of a "
            "saved model, or hf:owner/name"
        )
    found, variables, _ = read_weights(source, settings=settings, checkpoint=checkpoint, drop_classifiers=True)
    found = found if dtype is None else replace(found, {"dtype": dtype})
    return Model(found, variables, source, metrics_of_weights(source, checkpoint))
