"""Opens files that others wrote so that no code in them can run.

The formats are safetensors, PyTorch's (with ``weights_only``), JSON and YAML.
"""

from __future__ import annotations

import argparse
import pathlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mar.errors import UserError
from mar.safe_input import MOST_YAML_BYTES, parse_yaml, read_json

_WRAPPERS = ("model_state", "model", "module", "state_dict", "model_state_dict")
"""The keys under which checkpoints hold their tensors: MAR, VideoMAE, deepspeed, Lightning."""
_V_JEPA_ENCODERS = ("ema_encoder", "target_encoder")
"""The keys under which V-JEPA's files have the encoder that is meant to be used: the average over
the training's steps. The others are the encoder as it was trained, and a predictor."""
_PREFIXES = ("module.", "_orig_mod.", "model.")
"""The prefixes that DistributedDataParallel, torch.compile and Lightning add to every name."""
_NEWER_PICKLE = (0x8C, 0x8D, 0x8E, 0x8F, 0x90, 0x91, 0x92, 0x93, 0x94, 0x95, 0x96, 0x97, 0x98)
"""Pickle's operations of protocol 4 and later, which ``weights_only`` does not know."""


def _numpy_scalars() -> list[Any]:
    """Return what a pickled number of NumPy names: the function that makes it, and its types."""
    codes = ("e", "f", "d", "b", "h", "i", "l", "B", "H", "I", "L", "?")
    types = [type(np.dtype(code)) for code in codes]
    # Before NumPy 2 the module had another name, which files still have.
    scalar = np.float64(0).__reduce__()[0]
    return [scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype, *types]


def _plain_dict(*_: object) -> dict[Any, Any]:
    """Stand for ``defaultdict``, which PyTorch's careful reader cannot fill."""
    return {}


_HARMLESS: list[Any] = [
    # VideoMAE's files have their command's arguments in it; it holds plain data.
    argparse.Namespace,
    # Losses, accuracies, paths and counters that trainers save beside the weights.
    *_numpy_scalars(),
    pathlib.PosixPath,
    (_plain_dict, "collections.defaultdict"),
    list,
    dict,
    int,
    float,
]
"""What a checkpoint may name beside tensors: none of it can run code or open a file."""


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors of one file, unwrapped and without prefixes.

    Raises:
        UserError: the file is unsafe, damaged, or no checkpoint.
    """
    # This format has no code: only the header and the sizes can be wrong.
    if file.suffix == ".safetensors":
        try:
            return _without_prefix(load_file(file))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: not a whole safetensors file: {error}") from None
    start = _first_bytes(file)
    if start.startswith(b"version https://git-lfs"):
        raise UserError(
            f"{file}: a git-LFS pointer, not the weights themselves: fetch them with git lfs pull"
        )
    # A failed download is often a web page. A safetensors file begins with eight bytes of length
    # and the JSON of its header.
    if start[:1] == b"<" or start[8:9] == b"{":
        if start[:1] == b"<":
            what = "a web page"
        else:
            what = "a safetensors file: name it so (.safetensors)"
        raise UserError(f"{file}: not a PyTorch checkpoint but {what}")
    is_archive = _is_archive(file)
    if is_archive and _is_compressed(file):
        raise UserError(
            f"{file}: refused, because it is compressed, which PyTorch does not do: it may be "
            "larger than memory"
        )
    try:
        with (
            warnings.catch_warnings(),
            torch.serialization.safe_globals(_HARMLESS),
        ):
            # torch warns of pickles of other protocols, which it then refuses.
            warnings.simplefilter("ignore")
            # Only an archive can be mapped: tensors that are not used are then never read.
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=is_archive)
    except Exception as error:
        # A damaged file can raise nearly any exception in the unpickler.
        raise UserError(f"{file}: {_why_not(error)}") from None
    return _without_prefix(_tensors(content, file))


def _first_bytes(file: Path) -> bytes:
    """Return the first bytes of a file, enough to recognise what it is."""
    try:
        with file.open("rb") as stream:
            return stream.read(64)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from None


def _is_archive(file: Path) -> bool:
    """Whether a file is an archive.

    Raises:
        UserError: its end says that it is one of several parts.
    """
    try:
        return zipfile.is_zipfile(file)
    # is_zipfile() answers for a file without an archive's end, and raises for a damaged end.
    except Exception as error:
        raise UserError(f"{file}: {_why_not(error)}") from None


def _is_compressed(file: Path) -> bool:
    """Whether an archive's content is larger than the archive.

    Raises:
        UserError: its list of contents cannot be read.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            return sum(each.file_size for each in archive.infolist()) > file.stat().st_size
    # A damaged list raises many kinds of errors; one that names a later version of the format,
    # NotImplementedError. PyTorch reads archives by itself, and must not get one that could not be
    # checked here.
    except Exception as error:
        raise UserError(f"{file}: {_why_not(error)}") from None


def _why_not(error: Exception) -> str:
    """Return why a PyTorch file was not opened; torch's own message advises to open it unsafely."""
    advice = (
        "If you trust where it comes from, open it apart from here and save its tensors alone, as "
        "safetensors"
    )
    named = re.search(r"GLOBAL (\S+)", str(error))
    if isinstance(error, pickle.UnpicklingError) and named:
        return (
            f"refused, because opening it could run code: it would call {named.group(1)}. {advice}"
        )
    operand = re.search(r"Unsupported operand (\d+)", str(error))
    if operand and int(operand.group(1)) in _NEWER_PICKLE:
        return (
            "refused, because it is pickled in a way that cannot be checked (protocol 4 or "
            f"later). {advice}"
        )
    return f"not a whole PyTorch checkpoint ({type(error).__name__})"


def _tensors(content: Any, file: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint, unwrapped.

    Raises:
        UserError: it has none, or one that is not an ordinary dense tensor.
    """
    if isinstance(content, Mapping):
        wrapped = next(
            (content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), content
        )
        found = {str(key): value for key, value in wrapped.items() if isinstance(value, Tensor)}
        if any(
            value.is_meta or value.layout is not torch.strided or value.is_quantized
            for value in found.values()
        ):
            raise UserError(
                f"{file}: some of its tensors are sparse, quantised or empty; mar reads dense ones"
            )
        larger = next(
            (key for key, value in found.items() if _is_larger_than_its_data(value)), None
        )
        if larger is not None:
            raise UserError(
                f"{file}: the tensor {larger} asks for more memory than the file has values for"
            )
        if found:
            return found
        if "predictor" in content:
            for key in _V_JEPA_ENCODERS:
                if isinstance(content.get(key), Mapping):
                    inside = _tensors(content[key], file)
                    return {f"{key}.{name}": value for name, value in inside.items()}
        models = [
            str(key)
            for key, value in content.items()
            if isinstance(value, Mapping)
            and any(isinstance(each, Tensor) for each in value.values())
        ]
        if models:
            raise UserError(
                f"{file}: it has {len(models)} state dictionaries: {', '.join(models)}. Save the "
                f"one that you want alone: torch.save(torch.load(FILE)[{models[0]!r}], NEW)"
            )
    raise UserError(f"{file}: no tensors in it, by name or under {', '.join(_WRAPPERS)}")


def _is_larger_than_its_data(tensor: Tensor) -> bool:
    """Whether values are repeated (a stride of 0): 200 bytes could stand for 80 GB."""
    return tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()


def _without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under names without the prefixes that wrappers added."""
    # The counter of ``torch.optim.swa_utils.AveragedModel``: it has no prefix and no use here.
    named = {key: value for key, value in tensors.items() if key != "n_averaged"}
    # Repeated, because wrappers can be nested: "module._orig_mod.encoder…".
    while True:
        stripped = next(filter(None, (_stripped(named, each) for each in _PREFIXES)), None)
        if stripped is None:
            return named
        named = stripped


def _stripped(named: dict[str, Tensor], prefix: str) -> dict[str, Tensor] | None:
    """Return the tensors without a prefix that most of their names have; None if they have not.

    Lightning's files have every module of a training: beside the model perhaps its loss, whose
    names have another prefix. They are kept as they are.
    """
    wrapped = [key for key in named if key.startswith(prefix)]
    if not wrapped or len(wrapped) <= len(named) / 2:
        return None
    changed = {key.removeprefix(prefix): value for key, value in named.items()}
    # Two modules have a tensor of that name: which is the model is not to be guessed.
    return changed if len(changed) == len(named) else None


def read_mapping(file: Path) -> dict[str, Any]:
    """Return the mapping in a JSON or YAML file; an empty one if the file does not exist.

    Raises:
        UserError: the file cannot be read, or has no such mapping.
    """
    if not file.is_file():
        return {}
    try:
        if file.suffix == ".json":
            content = read_json(file)
        # The YAML reader takes seconds for a megabyte: a large file could block the program.
        elif file.stat().st_size > MOST_YAML_BYTES:
            content = None
        else:
            content = parse_yaml(file.read_text(encoding="utf-8"))[0]
    except (OSError, ValueError, yaml.YAMLError):
        content = None
    if not isinstance(content, dict) or not isinstance(content.get("settings", {}), dict):
        raise UserError(f"{file}: not a model's settings; remove it, or fetch the weights again")
    return content
