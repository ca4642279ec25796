"""The optimiser of several ranks: DeepSpeed ZeRO behind the same few calls as engine.TorchEngine.

A mini-batch may take any number of micro-batches, so accumulation is ours to end: DeepSpeed's own counting is switched
off (`managed_gradient_accumulation`) and every `step` is a boundary. DeepSpeed averages gradients over ranks, our loss
is a sum over them, so losses are multiplied by their number.

The optimiser's state goes to disk parameter by parameter, each rank writing its share of the parameters in full
precision. So any number of ranks can resume from a checkpoint.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..config import Config
from ..errors import ConfigError, NonFiniteError, RunError
from ..model import adapters
from ..model.loading import pick_device
from ..model.logprobs import check_model, token_logprobs
from ..model.packing import MicroBatch, deal
from ..model.saving import TensorFiles, describe
from ..sampling.ranks import Ranks, wait_alike
from .engine import adamw, check_finite, learning_rate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BUCKET_BYTES = 1 << 30  # of parameters that are whole at once when a sharded model is read
Weight = tuple[str, list[nn.Parameter], Any]  # as adapters.whole has them
MOMENTS = ("exp_avg", "exp_avg_sq")
STATE = "optimizer"  # a folder of its own: whatever loads the model may take every .safetensors beside it


class Policy(nn.Module):
    """The model with the policy's log-probs as its forward pass: DeepSpeed's hooks want to see the whole of it."""

    def __init__(self, model: PreTrainedModel, config: Config) -> None:
        super().__init__()
        self.model = model
        self.config = config

    def forward(self, batch: MicroBatch | None) -> tuple[Tensor, Tensor] | None:
        if batch is None:
            return check_model(self.model)
        return token_logprobs(
            self.model,
            batch,
            temperature=self.config.sampling.temperature,
            chunk_size=self.config.update.logits_chunk_size,
        )


def settings(config: Config) -> dict[str, Any]:
    """DeepSpeed's own configuration."""
    return {
        "train_micro_batch_size_per_gpu": 1,  # it only counts samples with this
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.update.max_grad_norm,
        "bf16": {"enabled": config.engine.precision == "bfloat16"},
        # many small micro-batches, or ranks, would vanish in bfloat16
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": {
            "stage": config.engine.zero_stage,
            "overlap_comm": False,
            "offload_optimizer": {"device": "cpu" if config.engine.offload_optimizer else "none", "pin_memory": False},
        },
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW needs no compiler, and its state has one layout
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
    }


@contextmanager
def sharded(config: Config) -> Iterator[None]:
    """Within it transformers loads a model weight by weight into ZeRO-3's shares of all ranks: no rank ever holds the
    whole. All ranks must load together."""
    import_deepspeed(config)
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    kept = HfDeepSpeedConfig(settings(config))  # transformers has a weak reference only
    try:
        yield
    finally:
        del kept
        unset_hf_deepspeed_config()


def import_deepspeed(config: Config) -> Any:
    """The package, set to the device. Raises ConfigError if it is not installed."""
    on_cpu = pick_device(config.engine.device).type == "cpu"
    if on_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError('engine deepspeed needs the extra: pip install "luffy[deepspeed]"') from error
    if on_cpu:  # would be compiled at first use, for a minute and a half
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it also where there is no launcher
    return deepspeed


class DeepSpeedEngine:
    """AdamW over one model in all ranks, its state (ZeRO 1), gradients (2) and weights (3) sharded over them.

    Weights are float32, or bfloat16 with float32 master weights.
    """

    def __init__(self, model: PreTrainedModel, config: Config, total_updates: int, ranks: Ranks) -> None:
        deepspeed = import_deepspeed(config)
        self.model = model
        self.config = config
        self.ranks = ranks
        self.total_updates = total_updates
        self.updates = 0
        self.names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        optimizer = adamw(model, config, fused=config.engine.offload_optimizer)
        self.engine, *_ = deepspeed.initialize(
            model=Policy(model, config), optimizer=optimizer, config=settings(config), dist_init_required=False
        )
        wait_alike()
        if config.engine.zero_stage == 3:  # its weights are whole only in a forward pass of DeepSpeed's
            self.engine.eval()
            try:
                self.engine(None)
            except ValueError as error:
                raise ConfigError(f"{config.model}: {error}") from error

    def token_logprobs(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies of a micro-batch's tokens, as `token_logprobs`; all ranks must call it."""
        self.engine.train(self.config.engine.gradient_checkpointing and torch.is_grad_enabled())
        return self.engine(batch)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of one micro-batch's share of the loss; all ranks must call it equally often. Raises
        NonFiniteError."""
        if not torch.isfinite(loss):
            raise NonFiniteError(f"the loss is {loss.item()}")
        self.engine.backward(loss * self.ranks.size)

    def step(self) -> dict[str, float]:
        """As TorchEngine.step. A gradient that is not finite is every rank's."""
        rate = learning_rate(self.config, self.updates, self.total_updates)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        self.engine.step()
        self.engine.eval()
        grad_norm = float(self.engine.get_global_grad_norm())
        if not math.isfinite(grad_norm):
            raise NonFiniteError(f"the gradient's norm is {grad_norm}; the last checkpoint is from before")
        self.updates += 1
        return {"grad_norm": grad_norm, "lr": rate}

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The weights by their Hugging Face names, whole; those of a sharded model are gathered bucket by bucket, and
        only hold until the next is asked for. All ranks must iterate to the end."""
        from deepspeed import zero

        for bucket in _buckets(list(adapters.whole(self.model)), BUCKET_BYTES):
            parts = [parameter for _, parameters, _ in bucket for parameter in parameters]
            with zero.GatheredParameters(parts, enabled=self.config.engine.zero_stage == 3):
                for name, _, make in bucket:
                    yield name, make()

    def save(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Writes the model in Hugging Face layout with its tokenizer (first rank), and every rank its share of the
        optimiser's state. All ranks must call it."""
        check_finite(self.model)
        self.save_model(folder, tokenizer)
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        parameters = dict(self.model.named_parameters())
        shares = deal([_numel(parameters[name]) for name in self.names], self.ranks.size)
        mine = {self.names[i] for i in shares[self.ranks.rank]}
        files = TensorFiles(folder / STATE, f"rank{self.ranks.rank}", {"updates": str(self.updates)})
        for name in self.names:
            whole = {"fp32": safe_get_full_fp32_param(parameters[name])}
            whole |= {moment: safe_get_full_optimizer_state(parameters[name], moment) for moment in MOMENTS}
            if name in mine:
                for kind, tensor in whole.items():
                    files.add(f"{name}/{kind}", tensor)
        files.close()

    def save_model(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Writes a consolidated Hugging Face folder. All ranks must call it."""
        if self.config.engine.lora_r:
            from deepspeed import zero

            parts = list(adapters.trained(self.model).values())
            with zero.GatheredParameters(parts, enabled=self.config.engine.zero_stage == 3):
                if self.ranks.first:
                    adapters.save(self.model, folder)
        else:
            files = TensorFiles(folder, "model") if self.ranks.first else None
            for name, tensor in self.weights():
                if files:
                    files.add(name, tensor)
            if files:
                files.close()
                describe(self.model, folder)
        if self.ranks.first:
            tokenizer.save_pretrained(folder)

    def load_optimizer(self, folder: Path) -> None:
        """Restores what `save` wrote, by however many ranks. Raises RunError if it is not all there."""
        from safetensors import safe_open

        files = [safe_open(path, "pt") for path in sorted((folder / STATE).glob("*.safetensors"))]
        where = {key: file for file in files for key in file.keys()}  # noqa: SIM118 (it is not a dict)
        missing = [name for name in self.names for kind in ("fp32", *MOMENTS) if f"{name}/{kind}" not in where]
        if missing:
            raise RunError(f"{folder} has no optimiser state of {missing[0]} and {len(missing) - 1} other tensors")
        self.updates = int(files[0].metadata()["updates"])
        self._create_moments()
        parameters = dict(self.model.named_parameters())
        for name in self.names:
            for kind in ("fp32", *MOMENTS):
                key = f"{name}/{kind}"
                self._set(parameters[name], kind, where[key].get_tensor(key))

    def close(self) -> None:
        """Empties the weights and the optimiser's state: DeepSpeed's hooks keep references to them for good."""
        inner = self.engine.optimizer.optimizer
        tensors = [t for p in self.model.parameters() for t in (p.data, getattr(p, "ds_tensor", None))]
        tensors += [p for group in inner.param_groups for p in group["params"]]
        tensors += getattr(self.engine.optimizer, "fp32_partitioned_groups_flat", [])
        tensors += [value for state in inner.state.values() for value in state.values()]
        for tensor in tensors:
            # (frozen weights may still be in the file that they were loaded from)
            if isinstance(tensor, Tensor) and tensor.untyped_storage().resizable():
                tensor.untyped_storage().resize_(0)

    def _create_moments(self) -> None:
        """Gives the optimiser the state that it would have had after its first step, for `_set` to fill."""
        inner = self.engine.optimizer.optimizer
        flat = getattr(self.engine.optimizer, "fp32_partitioned_groups_flat", None)
        for tensor in flat or [p for group in inner.param_groups for p in group["params"]]:
            step = torch.tensor(float(self.updates), device=tensor.device if inner.defaults["fused"] else "cpu")
            inner.state[tensor] = {"step": step, **{moment: torch.zeros_like(tensor) for moment in MOMENTS}}
        if flat is None:
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _set(self, parameter: Tensor, kind: str, value: Tensor) -> None:
        from deepspeed import utils

        state = [] if kind == "fp32" else [kind]
        what = "optimizer_state" if state else "fp32_param"
        if self.config.engine.zero_stage < 3:
            getattr(utils, f"safe_set_full_{what}")(parameter, value.to(parameter.device), *state)
            return
        # A rank's part of a parameter is padded where the ranks do not divide its size.
        part = getattr(utils, f"safe_get_local_{what}")(parameter, *state)
        whole = nn.functional.pad(value.flatten(), (0, part.numel() * self.ranks.size - value.numel()))
        mine = whole.narrow(0, part.numel() * self.ranks.rank, part.numel())
        getattr(utils, f"safe_set_local_{what}")(parameter, mine.to(part.device), *state)


def _numel(parameter: Tensor) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())


def _buckets(weights: list[Weight], limit: int) -> list[list[Weight]]:
    """The weights in order, in runs of at most `limit` bytes, one at least."""
    buckets: list[list[Weight]] = []
    size = 0
    for weight in weights:
        bytes_ = sum(_numel(parameter) * parameter.element_size() for parameter in weight[1])
        if not buckets or size + bytes_ > limit:
            buckets.append([])
            size = 0
        buckets[-1].append(weight)
        size += bytes_
    return buckets
