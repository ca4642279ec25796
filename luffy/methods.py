"""The nine methods of the paper as data: what each changes in the configuration, and in how many stages.

Paper: Table 1 (On-Policy RL, SFT, RL w/ SFT Loss, SFT+RL, LUFFY) and Table 4 (the ablation).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import config as configs
from .config import METHOD_FIELDS, Config, ConfigError

CLIP = 0.2
CONFIGS = Path(__file__).parent / "configs"

ON_POLICY, SFT = METHOD_FIELDS["on_policy"], METHOD_FIELDS["sft"]
SFT_VALUES: dict[str, Any] = dict(sft_loss_coef=1.0, entropy_coef=0.0, lr_schedule="linear", max_grad_norm=1.0)


@dataclass(frozen=True)
class Method:
    """label: as the paper's tables write it; fixed: the fields that make the method what it is; values: fields it
    sets and that may be changed; first_stage: fields of a stage before it."""

    label: str
    fixed: dict[str, Any] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    first_stage: dict[str, Any] | None = None


METHODS: dict[str, Method] = {
    "on_policy": Method("On-Policy RL", ON_POLICY, dict(epsilon=CLIP)),
    "on_policy_shaping": Method("On-Policy RL + Shaping", ON_POLICY, dict(epsilon=CLIP, on_shaping="regularized")),
    "on_policy_no_clip": Method("On-Policy RL + No Clip", ON_POLICY),
    "mixed": Method("Mixed-Policy RL", METHOD_FIELDS["mixed"], dict(epsilon=CLIP, off_shaping="none")),
    "mixed_shaping": Method("Mixed-Policy RL + Shaping", METHOD_FIELDS["mixed_shaping"], dict(epsilon=CLIP)),
    "luffy": Method("LUFFY", METHOD_FIELDS["luffy"]),  # mixed, shaping, no clip: the defaults
    "sft": Method("SFT", SFT, SFT_VALUES),
    "rl_sft_loss": Method("RL w/ SFT Loss", METHOD_FIELDS["rl_sft_loss"], dict(sft_loss_coef=0.03)),
    "sft_rl": Method("SFT+RL", ON_POLICY, dict(epsilon=CLIP), first_stage={**SFT, **SFT_VALUES}),
}


def get(name: str) -> Method:
    if name not in METHODS:
        raise ConfigError(f"no method {name!r}: there are {', '.join(METHODS)}")
    return METHODS[name]


def make_config(method: str = "luffy", **values: Any) -> Config:
    """The configuration of a method, with `values` over it.

    Raises ConfigError for what does not exist or fit, also for a value that would make it another method.
    """
    chosen = get(method)
    for name, value in chosen.fixed.items():
        if values.get(name, value) != value:
            raise ConfigError(f"{name}={values[name]!r} contradicts method {method}, which is {name}={value!r}")
    config = configs.from_dict({**chosen.values, **values, **chosen.fixed, "method": method})
    if chosen.first_stage is not None:
        if config.dataset != configs.TINYWORLD and config.complement == configs.TINYWORLD:
            raise ConfigError(f"{method} on {config.dataset} needs a complement: problems for its second stage")
        if (config.dataset, config.dataset_split) == (config.complement, config.complement_split):
            raise ConfigError(f"the complement of {method} must be other problems than its dataset")
    return config


def read_values(path: str | Path, method: str) -> dict[str, Any]:
    """The fields that a configuration file sets for a method: one of luffy/configs by its name, or a file of one's own.

    Besides fields it may have `base`, another such file whose values these go over, and `methods`, a mapping of methods
    to fields of theirs alone. Raises ConfigError.
    """
    named = CONFIGS / f"{path}.yaml"
    values = configs.read_file(named if named.is_file() else path)
    base, own = values.pop("base", None), values.pop("methods", None) or {}
    if not isinstance(own, dict) or not set(own) <= set(METHODS):
        raise ConfigError(f"{path}: `methods` is a mapping of {', '.join(METHODS)} to fields")
    return {**(read_values(base, method) if base else {}), **values, **(own.get(method) or {})}


def stages(config: Config, run_dir: Path) -> list[tuple[Config, Path]]:
    """The stages of a run in order, each a configuration and its directory; the last one's is the run's own.

    Only sft_rl has two: supervised fine-tuning of the base model in run_dir/first_stage (its learning rate is
    sft_learning_rate), then on-policy RL from its checkpoint, on the complement: problems the first has not seen.
    """
    first = get(config.method).first_stage
    if first is None:
        return [(config, run_dir)]
    before = run_dir / "first_stage"
    values = {"steps": config.first_stage_steps or config.steps, "num_off_policy": max(1, config.num_off_policy)}
    first_config = config.replace(**{**first, **values, "method": "sft", "final_eval_problems": 0})
    last_config = config.replace(
        model=str(before / "final"), dataset=config.complement, dataset_split=config.complement_split
    )
    return [(first_config, before), (last_config, run_dir)]
