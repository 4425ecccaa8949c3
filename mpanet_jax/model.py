"""A trained network that turns images into vectors: what `mpanet_jax.load` returns."""

import dataclasses
import hashlib
import json
import os
import re
import tempfile
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

from mpanet_jax.checkpoint import latest_step
from mpanet_jax.errors import ArgumentError, UserError, first_line
from mpanet_jax.evaluation.calibration import Calibration
from mpanet_jax.evaluation.extract import Embed, make_embed, whole_variables
from mpanet_jax.evaluation.given_images import GivenImage, SkippedImage, listed_images, rows_of_images
from mpanet_jax.evaluation.pair_score import PairScore, calibration_path, score_pair
from mpanet_jax.files import write_whole, write_whole_folder
from mpanet_jax.methods import make_method
from mpanet_jax.methods.method import Method, compute_dtype
from mpanet_jax.modality import UNKNOWN, Modality, modality_numbers
from mpanet_jax.model_card import model_card
from mpanet_jax.row_norms import l2_normalize
from mpanet_jax.run_files import METRICS_FILES
from mpanet_jax.settings import Settings, replace, to_dict
from mpanet_jax.weights.convert import read_weights
from mpanet_jax.weights.files import METRICS_KEY, read_metadata, write_state_dict
from mpanet_jax.weights.hub import CALIBRATION_FILE, MODEL_FILE, resolve
from mpanet_jax.weights.names import Variables, to_state_dict

NUM_IDS = 1  # that the classifiers of a model tell apart: they are not used


class Model:
    """A trained network, ready to embed images on all devices of this process.

        model = mpanet_jax.load("runs/sysu")
        embeddings = model.embed(["a.jpg", "b.jpg"])  # float32[2, D]
        similarity = embeddings @ embeddings.T

    Attributes:
      settings: of the run that trained it.
      source: where it comes from.
      method: the method that the settings are of.
      variables: {"params", "batch_stats"} of `network`; the classifiers, which only training needs, are zeros.
      metrics: what was measured with these weights, as a run's metrics.json has it; None: nothing, or nobody stored it.
    """

    def __init__(
        self,
        settings: Settings,
        variables: Variables,
        source: str | Path,
        metrics: Mapping[str, Mapping[str, Any]] | None = None,
    ):
        """Of a network's variables, with or without classifiers; `load` reads them.

        Raises:
          UserError: they are of a backbone alone, which has no embedding.
        """
        self.settings, self.source, self.metrics = settings, str(source), metrics
        self._calibration_path = calibration_path(source)  # now: the current folder may be another one later
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
        """The network that `variables` are of, for one identity, in the form that `settings.model.fused` asks for."""
        return self.method.build(NUM_IDS)

    @cached_property
    def size(self) -> int:
        """D, the length of an embedding."""
        return self._row_shape(self.method.embed)[0]

    def _row_shape(self, function: Callable[..., Any]) -> tuple[int, ...]:
        """The shape of what `make_embed` gives for one image."""
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
        """SHA-256, in hex, of all that decides an embedding but the precision.

        That is the arrays without the classifiers, the method, `settings.model` but `fused`, the size of the images,
        the filter of their resize, and `settings.eval.flip`. A run and what `save` made of it have the same.
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
        """The arrays by PyTorch's names, without the classifiers."""
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
        """The embeddings of images, one row an image, in their order.

        Args:
          images: any number of them, also none, each a path, an image of Pillow's or an array uint8[H, W, 3] or
            uint8[H, W], of any size; grey ones are taken as three equal channels. They are resized as in training.
          modality: 'visible' or 'infrared' of all images, or a list with one for each. MPANet does not need it; AGW and
            CAJ do.
          normalize: give rows of length 1, whose products are cosines. False: as the network gives them.
          batch_size: images at once; None: `settings.eval.batch_size`.
          errors: what to do with images that cannot be read: 'raise' an error, or 'skip' them.

        Returns:
          float32[N, D]; with errors='skip' a pair of that, for the images that could be read, and the list of the
          others: (position, name, reason) of each.

        Raises:
          UserError: with errors='raise', an image cannot be read; the message names it.
          ArgumentError: `images` is not a list of images, `modality` is missing where the method needs it, or an
            argument has a value that there isn't.
        """
        blocks, skipped = self._rows(self._embed, images, modality, batch_size, errors)
        rows = np.concatenate([np.zeros((0, self.size), np.float32), *blocks])  # there may be no block
        if normalize:
            rows = l2_normalize(rows)
        return (rows, skipped) if errors == "skip" else rows

    def pattern_maps(
        self, images: Iterable[GivenImage], *, modality: Modality | None = None
    ) -> Float32[np.ndarray, "n l h w"]:
        """The pattern maps of images: where each of the L patterns looks, from 0 to 1 (eq. 4 of the paper).

        Args:
          images, modality: as of `embed`.

        Returns:
          float32[N, L, H', W'], at the resolution of the network's last stage, a sixteenth of the resized image.

        Raises:
          UserError: the network makes none, or an image cannot be read.
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
        """Whether two images show the same person: the similarity, and with a calibration a probability.

        Args:
          a, b: each as one of `embed`.
          modality: of both images, or a pair. A calibration differs between pairs of one modality and of two, so there
            is no probability without it.
          prior: the share of pairs of the same person that is assumed; None: the calibration's.
          calibration: of this model, or its file; None: calibration.json in the model's folder, or beside its file, if
            it is there (scripts/calibrate.py writes it).

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
        """Writes the model into a new folder, which `load` reads: model.safetensors and a model card, README.md.

        With them goes calibration.json, if the model has one. The settings are in the file's metadata, but for the
        paths of this machine. All of it is written, or nothing.

        Raises:
          UserError: the folder is there and is not empty, or the calibration cannot be read.
        """
        with write_whole_folder(folder) as whole:
            name = Path(folder).resolve().name
            self._write(whole, name, name)

    def push_to_hub(self, repository: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Puts what `save` writes into a repository on Hugging Face, which is made if need be, and returns its address.

        Args:
          repository: 'owner/name'; `load("hf:owner/name")` reads it from there.
          private: whether a new repository is for its owner alone; None: as the owner's account has it.
          token: of an account that may write there; None: that of `hf auth login`, or of HF_TOKEN.

        Raises:
          ArgumentError: no such name can be.
          UserError: it cannot be reached, or the account may not write there.
        """
        repository = repository.removeprefix("hf:")
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
            raise ArgumentError("repository", f"= {repository!r}: expected 'owner/name'")
        import huggingface_hub  # slow to import, and needed here only

        with tempfile.TemporaryDirectory() as folder:
            self._write(Path(folder), repository.rpartition("/")[2], f"hf:{repository}")
            try:
                api = huggingface_hub.HfApi(token=token)
                address = api.create_repo(repository, private=private, exist_ok=True)
                api.upload_folder(
                    repo_id=repository,
                    folder_path=folder,
                    commit_message="Upload model",
                    delete_patterns=[CALIBRATION_FILE],  # that of other weights, where these have none
                )
            except Exception as error:  # no network, no token, no permission: libraries under it raise many types
                raise UserError(
                    f"{repository}: cannot be pushed to ({type(error).__name__}: {first_line(error)}); give a token "
                    "that may write there, or log in with: hf auth login"
                ) from error
        return str(address)

    def _write(self, folder: Path, name: str, source: str) -> None:
        settings = _without_paths(self.settings)
        write_state_dict(folder / MODEL_FILE, self.state_dict(), to_dict(settings), self.metrics)
        card = model_card(
            name,
            settings,
            source=source,
            size=self.size,
            needs_modality=self.method.needs_modality,
            fingerprint=self.fingerprint,
            metrics=self.metrics,
        )
        with write_whole(folder / "README.md") as file:
            file.write(card)
        if self._calibration_path.is_file():
            calibration = Calibration.read(self._calibration_path)
            if calibration.fingerprint == self.fingerprint:  # not of weights that have been trained on since
                dataclasses.replace(calibration, model=name).write(folder / CALIBRATION_FILE)

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
                f"is missing: method {self.settings.method!r} has to know it; expected 'visible' or 'infrared', or a "
                "list with one of them for each image",
            )
        size = self.settings.eval.batch_size if batch_size is None else batch_size
        return rows_of_images(function, listed, numbers, self.settings.data, batch_size=size, errors=errors)


def _without_paths(settings: Settings) -> Settings:
    """The settings without the paths of the machine that they come from; of weights there the name stays."""
    changes = {"dataset.source": "", "dataset.data_dir": type(settings)().dataset.data_dir}
    if not settings.init_from.startswith("hf:"):
        changes["init_from"] = Path(settings.init_from).name
    return replace(settings, changes)


def _stored_metrics(path: Path) -> dict[str, Any] | None:
    """What was measured with the weights at `path`: with a run's last checkpoint, or as a file's metadata say."""
    if path.is_file():
        return read_metadata(path, METRICS_KEY)
    try:
        metrics = json.loads((path / METRICS_FILES["last"]).read_text())
        is_current = all(values["step"] == latest_step(path) for values in metrics.values())
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return None  # there is none, or it was written by hand
    return metrics if is_current else None


def load(source: str | Path, *, dtype: str | None = None, settings: Settings | None = None) -> Model:
    """A trained model, from wherever it is.

    Args:
      source: a run's workdir (its last checkpoint), a `.safetensors` or `.pth` file, a folder that `Model.save` or
        scripts/convert_weights.py wrote, or `hf:owner/name` for a repository on Hugging Face: its cache first, then the
        network.
      dtype: the precision of convolutions and matrix products, 'float32', 'bfloat16' or 'auto' (bfloat16 on
        accelerators, float32 on CPU); None: as trained.
      settings: of the network, for weights that carry none, such as the published program's; None takes the paper's.

    Raises:
      UserError: it is not there, not readable, not of this network, or a backbone alone; the message says which, and
        for a repository that cannot be reached the command that fetches it.
    """
    if not str(source).startswith("hf:") and not Path(source).exists():
        raise UserError(
            f"{source}: no such file or folder; expected a run's workdir, a .safetensors or .pth file, the folder of a "
            "saved model, or hf:owner/name"
        )
    found, variables, _ = read_weights(source, settings=settings, drop_classifiers=True)
    found = found if dtype is None else replace(found, {"dtype": dtype})
    return Model(found, variables, source, _stored_metrics(resolve(str(source))))
