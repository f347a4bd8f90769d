"""Shards the layers of the frozen base model over several devices (FSDP2; ZeRO stage 3, arXiv 1910.02054).

A layer is gathered before its forward and its backward pass and resharded after each. A pass therefore needs all
devices: `compute.prefix` makes devices without rows of their own take part. Adapters, embeddings and the output layer,
which passes use outside of layers, are replicated on each device.
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from agl_trainer.model.base_model import decoder_layers
from agl_trainer.model.device import best_device


def shard_layers(model: torch.nn.Module, body: torch.nn.Module) -> None:
    """Shard each layer of the decoder `body`, and move the rest of `model`, to the device of this process.

    `model` is on the CPU and the same in all processes. Raises ConfigError if the layers cannot be identified.
    """
    device = best_device()
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in decoder_layers(body, "fsdp"):
        adapters = {parameter for parameter in layer.parameters() if parameter.requires_grad}
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=adapters)
    # The root module owns no parameters: it only makes FSDP gather the next layer ahead.
    fully_shard(body, mesh=mesh, ignored_params={p for p in body.parameters() if not isinstance(p, DTensor)})
    for tensor in (*model.parameters(), *model.buffers()):
        if not isinstance(tensor, DTensor):
            tensor.data = tensor.data.to(device)
