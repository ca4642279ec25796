"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) on a frozen model, by `peft`: W x + (alpha / r) B A x.

Only A and B are trained, so that gradients and the optimiser's state are those of a thousandth of the weights. Whoever
samples gets whole weights, W + (alpha / r) B A; the reference of a KL term is the model with its adapters off; a
checkpoint holds A and B and the name of the model that they belong to.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..config import EngineOptions

NAME = "default"
SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter without a model."""
    return (Path(folder) / SETTINGS).is_file() and not (Path(folder) / "config.json").is_file()


def base_of(folder: str | Path) -> str:
    """The model that an adapter belongs to. Raises ConfigError if its settings do not say."""
    base = json.loads((Path(folder) / SETTINGS).read_text()).get("base_model_name_or_path")
    if not base:
        raise ConfigError(f"{folder} holds an adapter that does not say to which model it belongs")
    return str(base)


def add(model: PreTrainedModel, options: EngineOptions, base: str, seed: int) -> None:
    """Freezes a model and gives its linear layers (not the output head's) adapters that change nothing yet: B is zero,
    A drawn from the seed. Raises ConfigError if none of its layers is among lora_target_modules."""
    from peft import LoraConfig, inject_adapter_in_model

    known = sorted({name.rpartition(".")[2] for name, _ in _linear(model)})
    targets = list(options.lora_target_modules) or known
    if unknown := [name for name in targets if name not in known]:
        raise ConfigError(f"lora_target_modules {unknown}: the model has {', '.join(known)}")
    settings = LoraConfig(
        r=options.lora_r, lora_alpha=options.lora_alpha, lora_dropout=0.0, target_modules=targets,
        task_type="CAUSAL_LM", base_model_name_or_path=base,
    )  # fmt: skip
    if Path(base).is_dir():
        settings.base_model_name_or_path = str(Path(base).absolute())
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(settings, model, NAME)
        for layer in _adapted(model):
            _draw(layer)
    model.peft_config = {NAME: settings}  # type: ignore[dict-item]


def _draw(layer: Any) -> None:
    """A as peft draws it, but on the CPU: the same numbers on every device; both in float32."""
    first, second = layer.lora_A[NAME], layer.lora_B[NAME]
    values = torch.empty(first.weight.shape)
    nn.init.kaiming_uniform_(values, a=5**0.5)
    first.weight.data = values.to(first.weight.device)
    second.weight.data = torch.zeros(second.weight.shape, device=second.weight.device)


def trained(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """A model's A and B, by the names that peft's files have for them."""
    return {
        f"base_model.model.{name.replace(f'.{NAME}.', '.')}": parameter
        for name, parameter in model.named_parameters()
        if ".lora_" in name
    }


def save(model: PreTrainedModel, folder: Path) -> None:
    """Writes a model's adapter in peft's layout."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    model.peft_config[NAME].save_pretrained(folder)
    # (copies: the optimiser may keep them all in one storage)
    save_file({name: parameter.detach().cpu().clone() for name, parameter in trained(model).items()}, folder / WEIGHTS)


@torch.no_grad()
def load(model: PreTrainedModel, folder: Path) -> None:
    """Fills a model's adapters from what `save`, or peft, has written. Raises ConfigError if they are others."""
    from safetensors.torch import load_file

    saved = load_file(folder / WEIGHTS)
    own = trained(model)
    wrong = [name for name in own.keys() | saved.keys() if name not in own or name not in saved]
    wrong += [name for name in own.keys() & saved.keys() if own[name].shape != saved[name].shape]
    if wrong:
        raise ConfigError(f"the adapter in {folder} is of another model or rank, as {min(wrong)} shows")
    for name, parameter in own.items():
        parameter.copy_(saved[name])


def attach(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Merges an adapter into the model's weights permanently. Raises ConfigError for what plain LoRA does not have."""
    from peft import LoraConfig, inject_adapter_in_model

    settings = LoraConfig.from_pretrained(str(folder))
    settings.lora_dropout = 0.0
    if settings.lora_bias or settings.bias != "none" or settings.use_dora or settings.modules_to_save:
        raise ConfigError(f"the adapter in {folder} has biases, magnitudes (DoRA) or whole modules: merge it with peft")
    inject_adapter_in_model(settings, model, NAME)
    load(model, folder)
    with torch.no_grad():
        for layer in _adapted(model):
            layer.get_base_layer().weight.copy_(merged(layer))
    return removed(model)


def removed(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its adapters, in place."""
    for name, layer in list(model.named_modules()):
        if hasattr(layer, "lora_A"):
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, layer.get_base_layer())
    return model.requires_grad_(True)


def merged(layer: Any) -> Tensor:
    """The whole weight, (out, in), of a linear layer, summed in float32 and in the layer's own precision."""
    if not hasattr(layer, "lora_A"):
        return layer.weight  # type: ignore[no-any-return]
    from peft.utils.integrations import dequantize_module_weight

    weight = dequantize_module_weight(layer.get_base_layer())
    change = layer.lora_B[NAME].weight.float() @ layer.lora_A[NAME].weight.float()
    return (weight.float() + layer.scaling[NAME] * change).to(weight.dtype)


def whole(model: PreTrainedModel) -> Iterator[tuple[str, list[nn.Parameter], Any]]:
    """The weights of a model as it is without adapters: for each its name, the parameters that it is made of, and what
    makes it of them once they are there. A weight that two layers share comes once."""
    seen: set[int] = set()
    for path, layer in model.named_modules():
        prefix = f"{path}." if path else ""
        if hasattr(layer, "lora_A"):
            base = layer.get_base_layer()
            parts = [base.weight, layer.lora_A[NAME].weight, layer.lora_B[NAME].weight]
            yield f"{prefix}weight", parts, lambda layer=layer: merged(layer).detach()
            if base.bias is not None:
                yield f"{prefix}bias", [base.bias], base.bias.detach
        elif not {"base_layer", "lora_A", "lora_B"} & set(path.split(".")):
            for name, parameter in layer.named_parameters(recurse=False):
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield prefix + name, [parameter], parameter.detach


@contextmanager
def off(model: PreTrainedModel) -> Iterator[None]:
    """The model as it was before its adapters."""
    layers = list(_adapted(model))
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def _linear(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    for name, layer in model.base_model.named_modules():
        if isinstance(layer, nn.Linear):
            yield name, layer


def _adapted(model: PreTrainedModel) -> Iterator[Any]:
    return (layer for layer in model.modules() if hasattr(layer, "lora_A"))
