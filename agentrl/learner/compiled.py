"""``torch.compile`` for decoder layers: their norms, projections and activations fused; attention stays the kernel that it is.

Only each layer's ``forward`` is compiled: FSDP's hooks stay outside, and parameter names as they are. Lengths are dynamic and
parameters are inputs, so rows of all sizes and all layers share a handful of programs.
"""

import logging
import random
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from agentrl.errors import ConfigError
from agentrl.learner.attention import register_packed_attention

logger = logging.getLogger(__name__)


def compile_layers(layers: Iterable[Any], device: torch.device) -> None:
    """Compile the layers in place; the first passes through them take the time that this costs.

    Raises:
        ConfigError: nothing can be compiled on this machine.
    """
    check_compiler(device)
    # Its shapes depend on the data (and with sequence parallelism it communicates): compiled code calls it as it is.
    register_packed_attention(torch.compiler.disable)
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=True)


def check_compiler(device: torch.device) -> None:
    """Compile and run something small that no cache has.

    Raises:
        ConfigError: it failed, with the reason.
    """
    fresh = random.SystemRandom().randrange(1 << 30)

    def probe(values: Tensor) -> Tensor:
        return (values + fresh).sin()

    try:
        torch.compile(probe, dynamic=False)(torch.zeros(8, device=device))
    except (RuntimeError, ImportError, OSError) as error:
        needed = "a C++ compiler (g++ or clang++, or name one in CXX)" if device.type == "cpu" else "triton and a C compiler"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise ConfigError(
            f"learn.compile=true but nothing can be compiled for {device.type} here: {type(error).__name__}: {reason} "
            f"Install {needed}, or set learn.compile=false."
        ) from error
