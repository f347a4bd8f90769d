"""Layers of the frozen base model of which each device holds a part (FSDP2; ZeRO stage 3, arXiv 1910.02054).

A layer is gathered when a pass comes to it and given up behind it, forward and backward. So a pass is a matter of all
devices: `trunk` has those without rows of their own take part. Adapters, embeddings and the output layer, which passes
use outside of layers, stay whole on each device.
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from agl_trainer.model.base_model import decoder_layers


def shard_layers(model: torch.nn.Module, body: torch.nn.Module) -> None:
    """Keep a part of each layer of the decoder `body`, and the rest of `model` whole, on the device of this process.

    `model`, the same on all devices, is on the CPU. Raises ConfigError where `body` has no layers that are marked.
    """
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(kind, (dist.get_world_size(),))
    for layer in decoder_layers(body, "fsdp"):
        adapters = {parameter for parameter in layer.parameters() if parameter.requires_grad}
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=adapters)
    # The root of all: it has layers gathered one ahead, and nothing of its own.
    fully_shard(body, mesh=mesh, ignored_params={p for p in body.parameters() if not isinstance(p, DTensor)})
    for tensor in (*model.parameters(), *model.buffers()):
        if not isinstance(tensor, DTensor):
            tensor.data = tensor.data.to(kind)
