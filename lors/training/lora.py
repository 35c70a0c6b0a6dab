"""LoRA experts (Hu et al. 2021, section 4.1): W + alpha / rank * B A with W fixed, merged into W after the training.

The layers come from PEFT, the `lora` extra. They are put into the model itself, without PEFT's wrapper, so whatever
trains or decodes the plain model works on it too.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from lors.errors import ConfigError, InputError
from lors.training.settings import Lora

__all__ = ["add_lora", "merge_lora"]


def add_lora(model: Any, settings: Lora, seed: int) -> Any:
    """`model` with LoRA updates in its linear layers, in place; only these are trainable after.

    The updates start at zero: A is drawn by `seed`, B is 0. The global random state stays as it is.

    Raises:
        InputError: PEFT is not installed.
        ConfigError: a target fits no linear layer. A layer whose weight is tied to another is none: its update would
            change both.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise InputError("finetune.lora needs PEFT: install the extra, `pip install 'lors[lora]'`") from error
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and owners[id(module.weight)] == 1
    ]
    chosen: set[str] = set()
    for target in settings.targets:
        found = [name for name in linear if f".{name}".endswith(f".{target}")]
        if not found:
            raise ConfigError(
                f"finetune.lora.targets: {target!r} ends the name of no linear layer that can have an update; the base "
                f"has {', '.join(sorted({name.rpartition('.')[2] for name in linear}))}"
            )
        chosen.update(found)
    # PEFT takes a float for alpha, whatever its annotation says.
    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=sorted(chosen)
    )
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        return inject_adapter_in_model(config, model)


def merge_lora(model: Any) -> Any:
    """The plain model that `add_lora` was given, in place, with the updates merged into its weights.

    Names of parameters are those of before; expert minus base is exactly alpha / rank * B A, but for the rounding of
    one float32 sum, and zero elsewhere. All parameters stay as trainable or frozen as `add_lora` left them.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
        for name, layer in layers:
            layer.merge()
            model.set_submodule(name, layer.get_base_layer())
    del model.peft_config
    return model
