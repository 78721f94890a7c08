"""Where weights are read from: Hugging Face folders, the hub, the embedded base."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxrl_post.errors import InputError, one_line
from jaxrl_post.models.config import DecoderConfig
from jaxrl_post.models.families import config_from_hf, token_ids
from jaxrl_post.models.tensors import Index

EMBEDDED = {"science_base": Path(__file__).parents[1] / "assets" / "science_base"}
"""Models that come with the package, by name."""

_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
_FLOATS = {"F64", "F32", "F16", "BF16"}


class Checkpoint(Protocol):
    """A config, a tokenizer and named tensors of which parts can be read."""

    @property
    def source(self) -> str:
        """What errors call it."""
        ...

    @property
    def config(self) -> DecoderConfig:
        """The architecture, as the files say it."""
        ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor, under the names that transformers uses."""
        ...

    @property
    def problems(self) -> list[str]:
        """What cannot be read, one line each."""
        ...

    def read(self, name: str, index: Index) -> np.ndarray:
        """The part `index` of a tensor, in the file's precision or better."""
        ...

    def tokenizer(self) -> Any | None:
        """The tokenizer, or None where the files have none."""
        ...


def open_checkpoint(path_or_id: str | os.PathLike[str]) -> Checkpoint:
    """Finds and opens what `models.load` was given; reads no weights yet.

    Raises:
      InputError: nothing is there, or it is no model; the message says what would be.
    """
    name = os.fspath(path_or_id)
    try:
        path = EMBEDDED.get(name, Path(name).expanduser())
        path.exists()
    except (OSError, RuntimeError) as error:  # too long a name, no such home
        raise InputError(f"{name} is no path of a model: {error}") from error
    if name.endswith(".gguf"):
        from jaxrl_post.models.gguf import GGUFFile

        if not path.is_file():
            raise InputError(
                f"{name}: no such file. scripts/get_smollm2.py fetches SmolLM2 as "
                "models/SmolLM2-135M-Instruct.gguf; other models need their own path."
            )
        return GGUFFile(path)
    if not path.exists():
        path = _download(name)
    if not (path / "config.json").is_file():
        raise InputError(
            f"{name} is no model: a folder with config.json and model.safetensors, a "
            f".gguf file, a hub id or one of {', '.join(EMBEDDED)} is needed."
        )
    return HuggingFaceFolder(path)


class HuggingFaceFolder:
    """``config.json`` and ``model.safetensors``, or several files and their index."""

    def __init__(self, path: Path) -> None:
        self.source = str(path)
        self.path = path
        config = config_from_hf(self._json("config.json"), str(path / "config.json"))
        generation = self._json("generation_config.json")
        try:
            stop = token_ids(generation.get("eos_token_id")) or config.stop_token_ids
        except (TypeError, ValueError) as error:
            raise InputError(f"{path / 'generation_config.json'}: {error}") from error
        self.config = replace(config, stop_token_ids=stop)

    @cached_property
    def _tensors(self) -> dict[str, tuple[Path, tuple[int, ...], str]]:
        """Of every tensor, by name: its file, shape and dtype."""
        from safetensors import SafetensorError

        tensors: dict[str, tuple[Path, tuple[int, ...], str]] = {}
        for file in self._files():
            path = self.path / file
            if not path.is_file():
                pickle = next(self.path.glob("*.bin"), None)
                raise InputError(
                    f"{path}: no such file; weights are read from safetensors only "
                    "(transformers' save_pretrained writes them)."
                    + (
                        f" {pickle.name} is a pickle, which may run code, and is not "
                        "opened."
                        if pickle
                        else ""
                    )
                )
            try:
                with _open(path) as handle:
                    for name in handle.keys():
                        part = handle.get_slice(name)
                        shape = tuple(part.get_shape())
                        tensors[name] = path, shape, part.get_dtype()
            except (SafetensorError, OSError) as error:
                raise InputError(f"{path} cannot be read: {error}") from error
        return tensors

    def _files(self) -> list[str]:
        """Names of the files with weights, all of them in this folder."""
        name = "model.safetensors.index.json"
        files = self._json(name).get("weight_map", {})
        files = [*files.values()] if isinstance(files, dict) else [files]
        for file in files:
            if not isinstance(file, str) or not re.fullmatch(
                r"[\w.-]+\.safetensors", file
            ):
                raise InputError(
                    f"{self.path / name}: weight_map names {file!r}, which is no "
                    "safetensors file of this folder."
                )
        return sorted({*files}) or ["model.safetensors"]

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: shape for name, (_, shape, _) in self._tensors.items()}

    @cached_property
    def problems(self) -> list[str]:
        return [
            f"dtype {dtype} of {name} (supported: {', '.join(sorted(_FLOATS))})"
            for name, (_, _, dtype) in self._tensors.items()
            if dtype not in _FLOATS
        ]

    def read(self, name: str, index: Index) -> np.ndarray:
        # Opened for each: what has been read through a memory map counts as this
        # process's memory for as long as the map lives.
        with _open(self._tensors[name][0]) as handle:
            return handle.get_slice(name)[index]

    def tokenizer(self) -> Any | None:
        if not any((self.path / file).is_file() for file in _TOKENIZER_FILES):
            return None
        with quiet_import():
            from transformers import AutoTokenizer
        try:
            # Python files in the folder stay what they are: files.
            return AutoTokenizer.from_pretrained(
                self.path, trust_remote_code=False, local_files_only=True
            )
        except Exception as error:  # transformers raises a dozen unrelated types
            raise InputError(
                f"{self.source}: the tokenizer cannot be loaded "
                f"({one_line(error)}). Tokenizers that bring code are not run."
            ) from error

    def _json(self, name: str) -> dict[str, Any]:
        path = self.path / name
        if not path.is_file():
            return {}
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{path} is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise InputError(f"{path} holds no JSON object.")
        return values


def _open(path: Path) -> Any:
    """A safetensors file of which parts can be read."""
    from safetensors import safe_open

    return safe_open(str(path), framework="np")


@contextlib.contextmanager
def quiet_import() -> Iterator[None]:
    """Keeps transformers from advising, on its import, to install torch.

    Those who set how much it says hear it.
    """
    key = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    if key in os.environ or "TRANSFORMERS_VERBOSITY" in os.environ:
        yield
        return
    os.environ[key] = "1"
    try:
        yield
    finally:
        del os.environ[key]


def _download(name: str) -> Path:
    """The local folder of a hub id, fetched where it is not in the cache."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        known = ", ".join(EMBEDDED)
        raise InputError(
            f"{name}: no such file or folder, no hub id (owner/name), and none of the "
            f"embedded models ({known})."
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except Exception as error:  # the hub's client raises a dozen unrelated types
        raise InputError(
            f"{name} is no local folder, and fetching it from the Hugging Face hub "
            f"failed ({one_line(error)}). Check the name and the "
            "connection, or give the path of a folder."
        ) from error
