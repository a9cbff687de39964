"""Sparse models on disk: one bit a weight for where, four bytes a weight that is left for what.

    config.json            the model's config
    sparse.safetensors     <layer>.bitmap  uint8 [ceil(out * in / 8)], row by row of [out, in], from the top bit down
                           <layer>.values  float32 [nnz], in the same order
                           <layer>.bias    float32 [out], zeros where the layer has none
                           and the embeddings, LayerNorms and head as they are; the backends are in the metadata

Of a model that ``embeddings.quantize`` has rounded, values are int8, and <layer>.scale float32 [out] is what a row's
values are multiplied by; embeddings are int8 and float32 in the same way.

The round trip is exact to the bit for every weight that is left, NaN and denormals included. A weight of zero counts
as pruned, so that -0.0 comes back as 0.0.
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from nbhelpers.models import load_config
from nbhelpers.sparse.decoder import empty_like
from nbhelpers.sparse.formats import mask_to_csr, row_numbers, to_mask
from nbhelpers.sparse.gpt2 import fill
from nbhelpers.sparse.layers import SparseLinear, sparse_names

FILE = "sparse.safetensors"


def save_sparse(model: nn.Module, folder: str | Path) -> Path:
    """Write a sparse model into a folder, which is made where it is missing. Raises ``TypeError`` for a dense model."""
    if not sparse_names(model):
        raise TypeError(f"save_sparse takes a model that convert_to_sparse has made, not a {type(model).__name__}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in outside(model).items()}
    backends = {}
    for name in sparse_names(model):
        layer = model.get_submodule(name)
        tensors |= {f"{name}.{part}": tensor for part, tensor in pack_layer(layer).items()}
        backends[name] = layer.backend
    save_file(tensors, folder / FILE, metadata={"backends": json.dumps(backends)})
    model.config.save_pretrained(folder)
    return folder


def load_sparse(folder: str | Path) -> nn.Module:
    """The model that ``save_sparse`` wrote, each layer with the backend that it had.

    Raises ``ValueError`` that names the file when it is missing, damaged or incomplete.
    """
    path = Path(folder) / FILE
    config_path = Path(folder) / "config.json"
    try:
        model = empty_like(load_config(Path(folder)))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{config_path} is missing or damaged: {error}") from error
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            backends = json.loads((file.metadata() or {}).get("backends", "{}"))
        for name in sparse_names(model):
            parts = {part: tensors[f"{name}.{part}"] for part in ("bitmap", "values", "bias")}
            parts |= {"scale": tensors[f"{name}.scale"]} if f"{name}.scale" in tensors else {}
            empty = model.get_submodule(name)
            model.set_submodule(name, unpack_layer(parts, empty.in_features, backends.get(name, "auto")))
        wanted = outside(model)
        for name, like in wanted.items():
            if (tensors[name].shape, tensors[name].dtype) != (like.shape, like.dtype):
                found, right = ((list(tensor.shape), tensor.dtype) for tensor in (tensors[name], like))
                raise ValueError(f"{name} is {found[0]} {found[1]} instead of {right[0]} {right[1]}")
    except KeyError as error:
        raise ValueError(f"{path} is incomplete: it has no tensor {error}") from error
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{path} is missing or damaged: {error}") from error
    fill(model, {name: tensors[name] for name in wanted})
    return model


def outside(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters and buffers of a model outside of its sparse layers."""
    layers = tuple(f"{name}." for name in sparse_names(model))
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(layers)}


def pack_layer(layer: SparseLinear) -> dict[str, torch.Tensor]:
    """The tensors that hold a sparse layer: three, or four of one in eight bits."""
    values, _, starts, bias = matrix = tuple(tensor.cpu() for tensor in layer.csr())
    bits = np.packbits(to_mask(matrix, layer.in_features).numpy().reshape(-1))
    parts = {"bitmap": torch.from_numpy(bits), "values": values, "bias": bias}
    if layer.scale is not None:
        scale = layer.scale.cpu()
        parts |= {"values": (values / scale[row_numbers(starts)]).round().to(torch.int8), "scale": scale}
    return parts


def unpack_layer(parts: dict[str, torch.Tensor], in_features: int, backend: str) -> SparseLinear:
    """The layer that ``pack_layer`` packed. Raises ``ValueError`` when its tensors do not fit together."""
    values, bias, scale = parts["values"], parts["bias"], parts.get("scale")
    shape = (len(bias), in_features)
    if parts["bitmap"].numel() != -(-shape[0] * shape[1] // 8):
        raise ValueError(f"a bitmap of {parts['bitmap'].numel()} bytes does not cover {shape[0]} x {shape[1]} weights")
    bits = np.unpackbits(parts["bitmap"].numpy(), count=shape[0] * shape[1])
    mask = torch.from_numpy(bits.reshape(shape)).bool()
    if int(mask.sum()) != len(values):
        raise ValueError(f"a bitmap has {int(mask.sum())} weights and {len(values)} values")
    if (values.dtype == torch.int8) != (scale is not None) or (scale is not None and scale.shape != bias.shape):
        raise ValueError("values in eight bits and a scale for each row belong together")
    values, columns, starts = mask_to_csr(mask, values)
    if scale is not None:
        values = values * scale[row_numbers(starts)]
    layer = SparseLinear.from_csr(values, columns, starts, bias, in_features, backend)
    layer.scale = scale
    return layer
