"""Cut a snapshot into buckets for a broadcast: tensors of one dtype, one after the other, up to a size."""

from dataclasses import dataclass
from pathlib import Path

from agentrl.errors import WeightSyncError
from agentrl.weights.tensor_files import TensorEntry, read_header

TORCH_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "I16": "int16",
    "F16": "float16", "BF16": "bfloat16", "I32": "int32", "F32": "float32", "I64": "int64", "F64": "float64",
}  # fmt: skip
"""Name in a safetensors file -> name in torch, which is what SGLang is told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """What travels in one broadcast: the bytes of ``pieces`` in this order, nothing between them."""

    names: list[str]
    dtypes: list[str]
    """Torch's names; one dtype per bucket, so that every tensor is aligned where it begins."""
    shapes: list[list[int]]
    pieces: list[tuple[str, int, int]]
    """(file, first byte, bytes) per tensor."""

    @property
    def num_bytes(self) -> int:
        return sum(size for _, _, size in self.pieces)


def plan_buckets(directory: str | Path, *, max_bytes: int) -> list[Bucket]:
    """Every tensor of a full Hugging Face directory, once. A tensor larger than ``max_bytes`` has a bucket of its own.

    Raises:
        WeightSyncError: no weight files, one that is torn, or a dtype that torch has no name for.
    """
    files = sorted(Path(directory).glob("*.safetensors"))
    if not files:
        raise WeightSyncError(f"{directory} holds no *.safetensors file: there is nothing to broadcast. Check the path.")
    by_dtype: dict[str, list[tuple[Path, TensorEntry]]] = {}
    for file in files:
        for tensor in sorted(read_header(file)[1], key=lambda tensor: tensor.begin):
            by_dtype.setdefault(tensor.dtype, []).append((file, tensor))
    buckets: list[Bucket] = []
    for dtype, tensors in by_dtype.items():
        if dtype not in TORCH_DTYPES:
            raise WeightSyncError(
                f"{directory} holds {tensors[0][1].name} as {dtype}, which cannot be broadcast: load from disk."
            )
        room = -1
        for file, tensor in tensors:
            size = tensor.end - tensor.begin
            if size > room:
                buckets.append(Bucket(names=[], dtypes=[], shapes=[], pieces=[]))
                room = max_bytes
            bucket = buckets[-1]
            bucket.names.append(tensor.name)
            bucket.dtypes.append(TORCH_DTYPES[dtype])
            bucket.shapes.append(list(tensor.shape))
            bucket.pieces.append((str(file), tensor.begin, size))
            room -= size
    return buckets
