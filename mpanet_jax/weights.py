"""Weights in and out: one name map between the published PyTorch names and the Flax tree, both directions.

The published names are METHOD.md's ("Weights"): torchvision's ResNet-50 under `backbone.`, MAM's layers as 1×1
convolutions, `spatial_attention`, `bn_neck` and the five classifiers. Files are `.safetensors` (no torch needed) or
PyTorch's `.pth`; nothing in a file is ever executed. A *state dict* here is a dict of NumPy arrays.
"""

import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict
from orbax.checkpoint import v1 as ocp

from mpanet_jax.checkpoint import load_model
from mpanet_jax.errors import UserError
from mpanet_jax.models.mpanet import CLASSIFIERS, MODALITY_CLASSIFIERS, MPANet
from mpanet_jax.state import init_variables

StateDict = dict[str, np.ndarray]
Variables = dict[str, Any]  # {"params", "batch_stats", "mean_classifiers"}, nested

RESNET50 = (3, 4, 6, 3)
TORCH_SUFFIXES = (".pth", ".pt", ".bin")
FILE_SUFFIXES = (".safetensors", *TORCH_SUFFIXES)
CLASSIFIER = re.compile(r"(visible_|infrared_)?classifier_?\.weight")  # with the mean classifiers

# Flax path → published name, "/" for "."; applied one after the other.
NAME_MAP = (
    (r"^stem/", "backbone/"),
    (r"^stage(\d)/block(\d+)/", r"backbone/layer\1/\2/"),
    (r"/downsample_conv/", "/downsample/0/"),
    (r"/downsample_bn/", "/downsample/1/"),
    (r"^mam(\d)/mask/", r"backbone/MAM\1/channel_attention/"),
    (r"^cbam(\d)/mask/", r"backbone/CBAM\1/mlp/"),
    (r"^cbam(\d)/", r"backbone/CBAM\1/"),
    (r"/w1$", "/0/weight"),
    (r"/w2$", "/2/weight"),
    (r"^pam/", "spatial_attention/"),
    (r"^neck/", "bn_neck/"),
    (r"classifier_?$", r"\g<0>/weight"),
    (r"/(kernel|scale)$", "/weight"),
    (r"/mean$", "/running_mean"),
    (r"/var$", "/running_var"),
)


def _published_name(path: tuple[str, ...]) -> str:
    collection, *rest = path
    name = "/".join(rest) + ("_" if collection == "mean_classifiers" else "")
    for pattern, replacement in NAME_MAP:
        name = re.sub(pattern, replacement, name)
    return name.replace("/", ".")


def _to_published(name: str, array: np.ndarray) -> np.ndarray:
    """HWIO → OIHW; [in, out] → [out, in], as a 1×1 convolution where the published layer is one."""
    if array.ndim == 4:
        return array.transpose(3, 2, 0, 1)
    if array.ndim == 2:
        return array.T if CLASSIFIER.fullmatch(name) else array.T[:, :, None, None]
    return array


def _from_published(array: np.ndarray, ndim: int) -> np.ndarray:
    if ndim == 4:
        return array.transpose(2, 3, 1, 0)
    if ndim == 2:
        return array.reshape(array.shape[:2]).T
    return array


def _is_backbone(path: tuple[str, ...]) -> bool:
    return path[1].startswith(("stem", "stage"))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]


# Files


def read_state_dict(path: str | Path) -> StateDict:
    """Reads a `.safetensors` file (without torch) or a `.pth`/`.pt`/`.bin` file of either PyTorch format.

    Unwraps `{"state_dict": …}`, `{"model": …}` and the `module.` prefix of DataParallel.

    Raises:
      UserError: no such file; truncated, foreign, or with code in its pickle; no torch for a `.pth` file.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such weights file")
    if path.suffix == ".safetensors":
        state_dict = _read_safetensors(path)
    elif path.suffix in TORCH_SUFFIXES:
        state_dict = _read_torch(path)
    else:
        raise UserError(f"{path}: unknown weights format; expected a name ending in {', '.join(FILE_SUFFIXES)}")
    if state_dict and all(name.startswith("module.") for name in state_dict):
        state_dict = {name.removeprefix("module."): array for name, array in state_dict.items()}
    return state_dict


def _read_safetensors(path: Path) -> StateDict:
    try:
        return safetensors.numpy.load_file(path)
    except (safetensors.SafetensorError, OSError, TypeError, KeyError) as error:
        raise UserError(
            f"{path}: truncated, or not a safetensors file ({_one_line(error)}); get the file again"
        ) from error


def _import_torch(path: Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path}: PyTorch files need torch: pip install 'mpanet_jax[torch]', or use a .safetensors file"
        ) from error
    return torch


def _read_torch(path: Path) -> StateDict:
    torch = _import_torch(path)
    try:
        # weights_only: the unpickler builds tensors and containers and refuses everything else.
        content = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # torch raises a different type for every way in which a file can be broken
        code = re.search(r"(?:GLOBAL|global)\s+`?([\w.]+)`?", str(error))
        if code:
            raise UserError(
                f"{path}: refused, its pickle holds code ({code[1]}) besides tensors; "
                "where you trust it, save its state dict alone: torch.save(model.state_dict(), …)"
            ) from error
        raise UserError(f"{path}: truncated, or not a PyTorch file ({_one_line(error)}); get the file again") from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path}: expected a state dict (names and tensors), found {type(content).__name__}")
    foreign = [name for name, value in content.items() if not isinstance(value, torch.Tensor)]
    if foreign:
        raise UserError(
            f"{path}: expected a state dict, but these entries are no tensors: {_listed(map(str, foreign))}"
        )
    return {
        name: (value.float() if value.dtype == torch.bfloat16 else value).detach().numpy()
        for name, value in content.items()
    }


def write_state_dict(path: str | Path, state_dict: StateDict) -> None:
    """Writes a `.safetensors` file, or a PyTorch file (`.pth`, `.pt`, `.bin`; needs torch). Never half a file.

    Raises:
      UserError: unknown ending, or no torch for a PyTorch file.
    """
    path = Path(path)
    if path.suffix not in FILE_SUFFIXES:
        raise UserError(f"{path}: unknown weights format; expected a name ending in {', '.join(FILE_SUFFIXES)}")
    arrays = {name: np.asarray(array, order="C") for name, array in state_dict.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if path.suffix == ".safetensors":
            temporary.write_bytes(safetensors.numpy.save(arrays, metadata={"format": "pt"}))
        else:
            torch = _import_torch(path)
            torch.save({name: torch.from_numpy(array.copy()) for name, array in arrays.items()}, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


# The name map at work


def _listed(names: Iterable[str], most: int = 20) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _stage_sizes(state_dict: StateDict) -> tuple[int, ...]:
    blocks = {
        match.groups() for match in (re.match(r"(?:backbone\.)?layer(\d)\.(\d+)\.", n) for n in state_dict) if match
    }
    return tuple(sum(stage == str(number) for stage, _ in blocks) for number in range(1, 5))


def _entries(variables: Variables) -> Iterator[tuple[tuple[str, ...], str, tuple[int, ...], Any]]:
    """(Flax path, published name, published shape, leaf) of every array."""
    for path, leaf in flatten_dict(variables).items():
        name = _published_name(path)
        yield path, name, _to_published(name, np.broadcast_to(np.float32(0), leaf.shape)).shape, leaf


def to_flax(
    state_dict: StateDict, template: Variables, *, drop_classifiers: bool = False, source: str | Path = "state dict"
) -> tuple[Variables, list[str]]:
    """Published names → Flax.

    Args:
      state_dict: an MPANet, or a torchvision/timm ResNet-50 (names without `backbone.`).
      template: `{"params", "batch_stats"}` of the model (arrays or shapes), whose types the result gets.
      drop_classifiers: leave the classifiers and mean classifiers out, whatever their size.
      source: what to call the state dict in an error.

    Returns:
      `{"params", "batch_stats", "mean_classifiers"}` as NumPy arrays, of a ResNet-50 its part of the first two; and the
      names that were left out: `fc.*`, BN's `num_batches_tracked`, and the dropped classifiers.

    Raises:
      UserError: entries are missing, extra or misshapen, or hold NaN or infinity; each is named.
    """
    whole = any(name.startswith("backbone.") for name in state_dict)
    prefix = "" if whole else "backbone."
    found = {prefix + name: array for name, array in state_dict.items()}
    left_out = {name for name in found if re.match(r"backbone\.fc\.|.*\.num_batches_tracked$", name)}
    if drop_classifiers:
        left_out |= {name for name in found if CLASSIFIER.fullmatch(name)}
    # The neck's bias is no parameter here: it stays 0 (METHOD.md).
    if "bn_neck.bias" in found and not found["bn_neck.bias"].any():
        left_out.add("bn_neck.bias")
    usable = {name: array for name, array in found.items() if name not in left_out}

    template = {"params": template["params"], "batch_stats": template["batch_stats"]}
    if whole:
        owners = template["params"]
        template["mean_classifiers"] = {name: owners[name] for name in MODALITY_CLASSIFIERS if name in owners}
    expected = {
        name: (path, shape, leaf)
        for path, name, shape, leaf in _entries(template)
        if (whole or _is_backbone(path)) and not (drop_classifiers and CLASSIFIER.fullmatch(name))
    }
    misfit = [
        f"{name} is {array.dtype}{list(array.shape)}, expected {list(expected[name][1])}"
        for name, array in usable.items()
        if name in expected and (array.shape != expected[name][1] or not jnp.issubdtype(array.dtype, jnp.floating))
    ]
    missing, extra = sorted(expected.keys() - usable.keys()), sorted(usable.keys() - expected.keys())
    if missing or extra or misfit:
        kinds = {"missing": missing, "not part of the model": extra, "of another shape or type": sorted(misfit)}
        raise UserError(
            f"{source}: does not fit the model{_reason(state_dict, expected, missing + extra + misfit)}; "
            + "; ".join(
                f"{kind}: {_listed(n.removeprefix(prefix) for n in names)}" for kind, names in kinds.items() if names
            )
        )

    broken = [name.removeprefix(prefix) for name in sorted(expected) if not np.isfinite(usable[name]).all()]
    if broken:
        raise UserError(f"{source}: NaN or infinity in {_listed(broken)}; take weights from before training diverged")
    flat = {}
    for name, (path, _, leaf) in expected.items():
        flat[path] = np.ascontiguousarray(_from_published(usable[name], len(leaf.shape)).astype(leaf.dtype, copy=False))
    names = sorted(name.removeprefix(prefix) for name in left_out)
    return unflatten_dict(flat), [name for name in names if name != "bn_neck.bias"]


def _reason(state_dict: StateDict, expected: Iterable[str], problems: Sequence[str]) -> str:
    """What kind of misfit it is, where that can be told, as an insertion into the message."""
    found, wanted = _stage_sizes(state_dict), _stage_sizes(dict.fromkeys(expected))
    if not any(found):
        return ": no ResNet in it (no entry layer1.0.conv1.weight)"
    block = next((n for n in state_dict if re.fullmatch(r"(backbone\.)?layer1\.0\.conv3\.weight", n)), None)
    if block is None:
        return f": another architecture (blocks without conv3, stages of {found}; expected bottlenecks, {wanted})"
    if found != wanted:
        return (
            f": another architecture (stages of {found} blocks, expected {wanted}; convert_weights.py FILE DIR takes "
            "--stage_sizes and --width, and DIR can be loaded)"
        )
    if all(CLASSIFIER.match(problem) for problem in problems):
        return " in its classifiers, another number of identities or missing (--drop-classifiers leaves them out)"
    return ""


def from_flax(variables: Variables) -> StateDict:
    """Flax → published names, the exact inverse of `to_flax`.

    `variables` holds "params", "batch_stats" and, of a whole model, "mean_classifiers". A bare ResNet gets
    torchvision's own names, without `backbone.`. PyTorch's `num_batches_tracked` is not written: `load_state_dict`
    does not ask for it.
    """
    variables = {name: variables[name] for name in ("params", "batch_stats", "mean_classifiers") if name in variables}
    state_dict = {}
    for _, name, _, leaf in _entries(variables):
        state_dict[name] = np.ascontiguousarray(_to_published(name, np.asarray(leaf)))
    if "neck" in variables["params"]:
        state_dict["bn_neck.bias"] = np.zeros_like(state_dict["bn_neck.weight"])
    else:
        state_dict = {name.removeprefix("backbone."): array for name, array in state_dict.items()}
    return state_dict


# Whole jobs


def model_for(state_dict: StateDict, stage_sizes: Sequence[int] = RESNET50, width: int = 64) -> MPANet:
    """The MPANet that a state dict's names speak of: its modules, patterns and number of identities.

    The names of MAM and SE are the same, as are those of IN and no channel module ('mam' and 'none' here). The size of
    the ResNet is not read off the state dict but given, so that another one is refused by `to_flax`.
    """

    def rows(name: str, default: int) -> int:
        return len(state_dict[name]) if name in state_dict and state_dict[name].ndim else default

    channel_module = next(
        (kind for kind in ("mam", "cbam") if any(f".{kind.upper()}3." in n for n in state_dict)), "none"
    )
    pattern_module = "none"
    if any(name.startswith("spatial_attention.") for name in state_dict):
        pattern_module = "pam"
    elif any(name.startswith("non_local.") for name in state_dict):
        pattern_module = "non_local"
    if not any(name.startswith("backbone.") for name in state_dict):
        channel_module, pattern_module = "mam", "pam"  # a ResNet; to_flax reads its part
    return MPANet(
        num_ids=rows("classifier.weight", 1),
        stage_sizes=tuple(stage_sizes),
        width=width,
        channel_module=channel_module,
        pattern_module=pattern_module,
        num_patterns=rows("spatial_attention.bias", 6),
    )


def embedding_network(variables: Variables) -> tuple[MPANet, Variables]:
    """The network whose weights `read_weights` gave, for embeddings, and its `{"params", "batch_stats"}`.

    Its size is read off the arrays. Classifiers that were left out become zeros for one identity: embeddings need none.

    Raises:
      UserError: the weights are of a bare ResNet.
    """
    params = dict(variables["params"])
    if "neck" not in params:
        raise UserError("these weights are a bare ResNet's; an embedding needs those of a trained MPANet")
    for name in CLASSIFIERS:
        params.setdefault(name, np.zeros((len(params["neck"]["scale"]), 1), np.float32))
    complete = {"params": params, "batch_stats": variables["batch_stats"]}
    shapes = {name: np.broadcast_to(np.float32(0), shape) for _, name, shape, _ in _entries(complete)}
    model = model_for(shapes, _stage_sizes(shapes), params["stem"]["conv1"]["kernel"].shape[-1])
    mask = (params.get("mam3") or params.get("cbam3") or {}).get("mask")
    return (model.clone(reduction=len(mask["w1"]) // mask["w1"].shape[1]) if mask else model), complete


def _shapes(model: MPANet) -> Variables:
    return jax.eval_shape(lambda key: init_variables(model, key, 32, 32), jax.random.key(0))


def read_weights(
    source: str | Path,
    *,
    stage_sizes: Sequence[int] = RESNET50,
    width: int = 64,
    num_ids: int | None = None,
    drop_classifiers: bool = False,
) -> tuple[Variables, list[str]]:
    """Reads weights of any kind: a file, `hf:owner/repository`, a workdir, or a folder that `convert` wrote.

    `num_ids` is the number of identities that the classifiers must have; None takes the file's.

    Returns:
      As `to_flax`.

    Raises:
      UserError: not there, not readable, or not an MPANet or ResNet of this size.
    """
    if Path(source).is_dir():
        # A checkpoint of this package is of whatever model it was trained with.
        _, template = load_model(Path(source))
        state_dict = from_flax(template)
        for name in CLASSIFIERS if num_ids is not None else ():
            if name in template["params"]:
                template["params"][name] = jax.ShapeDtypeStruct((len(template["params"][name]), num_ids), jnp.float32)
    else:
        state_dict = read_state_dict(resolve(str(source)))
        model = model_for(state_dict, stage_sizes, width)
        template = _shapes(model if num_ids is None else model.clone(num_ids=num_ids))
    return to_flax(state_dict, template, drop_classifiers=drop_classifiers, source=source)


def convert(source: str | Path, target: str | Path, **options: Any) -> list[str]:
    """Converts weights of any kind (`read_weights`, whose options these are) and returns the names left out.

    `target` ending in .safetensors or .pth gets a state dict in the published names; any other name becomes a folder
    with an orbax checkpoint that `checkpoint.load_model` reads as it reads a workdir.

    Raises:
      UserError: as `read_weights`, or the target folder exists.
    """
    target = Path(target)
    if target.suffix in FILE_SUFFIXES:
        if target.suffix in TORCH_SUFFIXES:
            _import_torch(target)  # before the work, not after it
        variables, left_out = read_weights(source, **options)
        write_state_dict(target, from_flax(variables))
        return left_out
    if target.exists():
        raise UserError(f"{target}: exists already; give a new folder, or a name ending in {', '.join(FILE_SUFFIXES)}")
    variables, left_out = read_weights(source, **options)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with ocp.training.Checkpointer((temporary / "checkpoints").resolve()) as checkpointer:
            checkpointer.save_checkpointables(0, {"model": variables})
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return left_out


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


def load_backbone(init_from: str, params: Any, batch_stats: Any) -> tuple[Any, Any]:
    """Puts pretrained ResNet weights into a model's trees; everything else in them stays.

    Args:
      init_from: `config.init_from`: a `.safetensors` or `.pth` file, or `hf:owner/repository`. Of an MPANet the
        backbone is taken.
      params, batch_stats: the model's trees.

    Returns:
      The two trees with the backbone's leaves replaced, in the types that they had.

    Raises:
      UserError: the weights cannot be had, or are not of this ResNet.
    """
    source = f"config.init_from={init_from}"
    try:
        state_dict = read_state_dict(resolve(init_from))
    except UserError as error:
        raise UserError(f"config.init_from: {error}") from error
    if any(name.startswith("backbone.") for name in state_dict):
        state_dict = {
            name.removeprefix("backbone."): array
            for name, array in state_dict.items()
            if re.match(r"backbone\.(conv1|bn1|layer\d)\.", name)
        }
    variables = {"params": params, "batch_stats": batch_stats}
    loaded, _ = to_flax(state_dict, variables, source=source)
    flat = flatten_dict(variables)
    flat |= {path: jnp.asarray(array) for path, array in flatten_dict(loaded).items()}
    variables = unflatten_dict(flat)
    return variables["params"], variables["batch_stats"]
