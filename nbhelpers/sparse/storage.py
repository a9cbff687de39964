"""Sparse models on disk: one bit per weight for its position, four bytes per weight that is left for its value.

    config.json            the model's config
    sparse.safetensors     <layer>.bitmap  uint8 [ceil(out * in / 8)], row by row of [out, in], from the top bit down
                           <layer>.values  float32 [nnz], in the same order
                           <layer>.bias    float32 [out], zeros where the layer has none
                           and the embeddings, LayerNorms and head as they are

In a model that ``embeddings.quantize`` has rounded, values are int8 and each row's are multiplied by its <layer>.scale,
float32 [out]; embeddings are int8 and float32 in the same way.

A file does not name an engine: the machine that loads a model chooses the fastest one that it has. (Older files name
one in their metadata, which is ignored.) The round trip is exact to the bit for every weight that is left, NaN and
denormals included. A weight of zero counts as pruned, so that -0.0 comes back as 0.0.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from nbhelpers.models import load_config
from nbhelpers.sparse.decoder import empty_like
from nbhelpers.sparse.formats import mask_to_csr, row_numbers, to_mask
from nbhelpers.sparse.gpt2 import fill
from nbhelpers.sparse.layers import SparseLinear, sparse_names

FILE = "sparse.safetensors"


def save_sparse(model: nn.Module, folder: str | Path) -> Path:
    """Write a sparse model into a folder, made if missing, and return it. Raises ``TypeError`` for a dense model."""
    if not sparse_names(model):
        raise TypeError(f"`model` must be a model that convert_to_sparse has made (got {type(model).__name__})")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in outside(model).items()}
    for name in sparse_names(model):
        tensors |= {f"{name}.{part}": tensor for part, tensor in pack_layer(model.get_submodule(name)).items()}
    save_file(tensors, folder / FILE)
    model.config.save_pretrained(folder)
    return folder


def load_sparse(folder: str | Path, backend: str = "auto") -> nn.Module:
    """Return the model that ``save_sparse`` wrote; backend: see ``SparseLinear.from_dense``.

    Raises ``ValueError`` that names the file when it is missing, damaged or incomplete.
    """
    path = Path(folder) / FILE
    config_path = Path(folder) / "config.json"
    try:
        model = empty_like(load_config(Path(folder)))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{config_path} is missing or damaged: {error}") from error
    try:
        tensors = load_file(path)
        for name in sparse_names(model):
            parts = {part: tensors[f"{name}.{part}"] for part in ("bitmap", "values", "bias")}
            parts |= {"scale": tensors[f"{name}.scale"]} if f"{name}.scale" in tensors else {}
            empty = model.get_submodule(name)
            model.set_submodule(name, unpack_layer(parts, empty.in_features, backend))
        expected = outside(model)
        for name, like in expected.items():
            found = tensors[name]
            if (found.shape, found.dtype) != (like.shape, like.dtype):
                raise ValueError(
                    f"{name} must be {list(like.shape)} {like.dtype} (got {list(found.shape)} {found.dtype})"
                )
    except KeyError as error:
        raise ValueError(f"{path} is incomplete: it has no tensor {error}") from error
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{path} is missing or damaged: {error}") from error
    fill(model, {name: tensors[name] for name in expected})
    return model


def outside(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers of a model outside of its sparse layers."""
    layers = tuple(f"{name}." for name in sparse_names(model))
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(layers)}


def pack_layer(layer: SparseLinear) -> dict[str, torch.Tensor]:
    """Return the tensors that store a sparse layer: three, or four for a layer in eight bits."""
    values, _, starts, bias = matrix = tuple(tensor.cpu() for tensor in layer.csr())
    bits = np.packbits(to_mask(matrix, layer.in_features).numpy().reshape(-1))
    parts = {"bitmap": torch.from_numpy(bits), "values": values, "bias": bias}
    if layer.scale is not None:
        scale = layer.scale.cpu()
        parts |= {"values": (values / scale[row_numbers(starts)]).round().to(torch.int8), "scale": scale}
    return parts


def unpack_layer(parts: dict[str, torch.Tensor], in_features: int, backend: str) -> SparseLinear:
    """Return the layer that ``pack_layer`` packed. Raises ``ValueError`` when its tensors do not fit together."""
    values, bias, scale = parts["values"], parts["bias"], parts.get("scale")
    shape = (len(bias), in_features)
    if parts["bitmap"].numel() != -(-shape[0] * shape[1] // 8):
        raise ValueError(f"the bitmap must cover {shape[0]} x {shape[1]} weights (got {parts['bitmap'].numel()} bytes)")
    bits = np.unpackbits(parts["bitmap"].numpy(), count=shape[0] * shape[1])
    mask = torch.from_numpy(bits.reshape(shape)).bool()
    if int(mask.sum()) != len(values):
        raise ValueError(f"the bitmap must have a bit per value (got {int(mask.sum())} bits, {len(values)} values)")
    if (values.dtype == torch.int8) != (scale is not None) or (scale is not None and scale.shape != bias.shape):
        raise ValueError("values in eight bits must come with a scale per row")
    values, columns, starts = mask_to_csr(mask, values)
    if scale is not None:
        values = values * scale[row_numbers(starts)]
    return SparseLinear.from_csr(values, columns, starts, bias, in_features, backend, scale=scale)
