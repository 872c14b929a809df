"""Finds and reads single tensors of a safetensors checkpoint: one model.safetensors, or shards listed in model.safetensors.index.json.

Owns files, names, shapes and stored dtypes. Knows nothing about experts.
"""

import json
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from megamoe.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

TORCH_DTYPES = {
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.uint8,  # megamoe holds UE8M0 exponents and packed FP4 codes as plain bytes
    "I8": torch.uint8,
    "U8": torch.uint8,
}


def require(condition: bool, what: str, expected: object, got: object, fix: str) -> None:
    """Raise CheckpointError in the form of `megamoe.errors.check` unless `condition` holds."""
    if not condition:
        raise CheckpointError(f"checkpoint: {what} must be {expected}, got {got}; {fix}")


def read_json(path: Path) -> dict:
    """The JSON object in `path`. Raises CheckpointError if the file is absent or is not a JSON object."""
    require(path.is_file(), str(path), "a file", "nothing there", "pass the directory that holds config.json and the weights")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"checkpoint: {path} must be JSON, got {error}; download the file again") from None
    require(isinstance(content, dict), str(path), "a JSON object", type(content).__name__, "download the file again")
    return content


class TensorFiles:
    """The tensors of one checkpoint directory by name. Files are mapped on first use; only what is asked for is read.

    Args:
        path: directory with `model.safetensors`, or with `model.safetensors.index.json` and every shard it lists.

    Raises:
        CheckpointError: neither is there, or a shard is missing or unreadable.
    """

    def __init__(self, path: Path):
        self._open_files = {}
        self._stack = ExitStack()
        self._files = self._locate(path)  # tensor name -> file

    def __enter__(self) -> "TensorFiles":
        return self

    def __exit__(self, *exc) -> None:
        self._stack.close()

    def _locate(self, path: Path) -> dict[str, Path]:
        if (path / SINGLE_FILE).is_file():
            return dict.fromkeys(self._open(path / SINGLE_FILE).keys(), path / SINGLE_FILE)
        others = sorted(file.name for file in path.glob("*.safetensors"))
        require((path / INDEX_FILE).is_file(), str(path), f"a directory with {SINGLE_FILE} or {INDEX_FILE}",
                f"{len(others)} other .safetensors files" if others else "no .safetensors file", "download the whole checkpoint")
        weight_map = read_json(path / INDEX_FILE).get("weight_map")
        require(isinstance(weight_map, dict), f"{path / INDEX_FILE}", "an object with a weight_map", weight_map, "download it again")
        shards = sorted(set(weight_map.values()))
        missing = [shard for shard in shards if not (path / shard).is_file()]
        require(not missing, f"shards in {path}", f"the {len(shards)} files of {INDEX_FILE}",
                f"{len(shards) - len(missing)} of them", f"download {', '.join(missing)}")
        return {name: path / shard for name, shard in weight_map.items()}

    def _open(self, file: Path):
        if file not in self._open_files:
            try:
                self._open_files[file] = self._stack.enter_context(safe_open(file, framework="pt"))
            except SafetensorError as error:
                raise CheckpointError(f"checkpoint: {file} must be a whole safetensors file, got {error}; download it again") from None
        return self._open_files[file]

    def _slice(self, name: str):
        try:
            return self._open(self._files[name]).get_slice(name)
        except SafetensorError:
            raise CheckpointError(f"checkpoint: tensor {name!r} must be in {self._files[name]}, as {INDEX_FILE} says, "
                                  "got a file without it; download both again") from None

    def names_under(self, prefix: str) -> list[str]:
        """Sorted names that start with `prefix`, from the index alone: no shard is opened."""
        return sorted(name for name in self._files if name.startswith(prefix))

    def stored_dtype(self, name: str) -> str:
        """The dtype of a tensor as safetensors spells it, e.g. "BF16" or "F8_E8M0"."""
        return self._slice(name).get_dtype()

    def read(self, name: str, shape: tuple[int, ...], dtype: str, leading: int | None = None) -> torch.Tensor:
        """Read one tensor, or one entry of its leading dimension, after checking what is stored.

        Args:
            name: a name in this checkpoint.
            shape, dtype: of the whole stored tensor; dtype as safetensors spells it.
            leading: read only `[leading]` of the first dimension. None: all of it.

        Returns:
            The tensor with the dtype of TORCH_DTYPES: bytes where torch would have an integer or exponent type of one byte.

        Raises:
            CheckpointError: the stored shape or dtype is another.
        """
        stored = self._slice(name)
        got_shape, got_dtype = tuple(stored.get_shape()), stored.get_dtype()
        require((got_shape, got_dtype) == (shape, dtype), f"tensor {name!r}", f"{list(shape)} {dtype}", f"{list(got_shape)} {got_dtype}",
                "the weights do not fit config.json or the family")
        tensor = stored[:] if leading is None else stored[leading : leading + 1][0]
        return tensor.view(TORCH_DTYPES[dtype])
