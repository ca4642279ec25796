"""The base models of the embedded world: one pre-training, and how much of its skill a base shows by itself.

"tiny" is the model that pretrain.py makes. It answers a question at once; it can work step by step, but only after
another cue. "tiny:own_share=0.4" is "tiny" after a short further training that teaches a prompt which ends inside an
open think block (as the paper's does), and how such a block is filled: in a share of the answers, own_share, with the
model's own steps, each of which may be wrong, and which give up on long chains; else not at all. So own_share says how
much of the skill the base elicits by itself, from none (0) to always (1).

Those that defaults use are shipped (luffy/model/shipped, made by `python -m luffy.model.bases NAME --out DIR`); others
are made when they are first asked for, in about a minute on one core, and kept in the cache folder ($LUFFY_CACHE, else
~/.cache/luffy).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import random
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from ..config import TINY
from ..data import tinyworld
from ..data.hub import made_in_cache
from ..data.templates import THINK_OPEN
from ..data.tinyworld import FAMILIES
from ..errors import ConfigError
from ..runs import file_hash

log = logging.getLogger(__name__)

VERSION = 1  # another number where documents are drawn otherwise
SHIPPED = Path(__file__).parent / "shipped"
# Only a prompt opens a think block: what follows an answer is its end.
CHAT_TEMPLATE = f"{tinyworld.CHAT_TEMPLATE}{{% if add_generation_prompt %}}{THINK_OPEN}{{% endif %}}"
PRETRAINED = Path(__file__).parent / "tiny"


@dataclass(frozen=True)
class Base:
    """The recipe of a base model that goes on from the shared pre-training."""

    own_share: float = 0.4
    """Share of the answers that are the base's own steps."""
    own_noise: float = 0.1
    """Share of its steps that are wrong; what follows builds on them."""
    own_difficulty: int = 4
    """Hardest chain that its own steps finish; of a harder one they do the beginning, and the answer is a guess."""
    seed: int = 0
    """Another seed is another base model of the same recipe."""

    def __post_init__(self) -> None:
        known = 0 <= self.own_share <= 1 and 0 <= self.own_noise <= 1 and self.own_difficulty >= 2 and self.seed >= 0
        if not known or any(
            float(f"{value:g}") != value for value in asdict(self).values()
        ):  # it would not be its name's
            raise ConfigError(f"no such base model: {asdict(self)}")

    @property
    def name(self) -> str:
        """What a configuration calls it: the fields that differ from their defaults, own_share always."""
        usual = {f.name: f.default for f in fields(self)}
        values = {n: v for n, v in asdict(self).items() if n == "own_share" or v != usual[n]}
        return f"{TINY}:" + ",".join(f"{name}={value:g}" for name, value in values.items())

    @property
    def folder_name(self) -> str:
        return self.name.replace(":", "-").replace(",", "-").replace("=", "_")

    def digest(self) -> str:
        """Names what a folder depends on: these fields, the mixture, the model that it goes on from, the prompt, and by
        VERSION the code below."""
        pretrained = file_hash(PRETRAINED / "model.safetensors")
        text = json.dumps([VERSION, asdict(self), asdict(Mixture()), pretrained, CHAT_TEMPLATE])
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Mixture:
    """What the further training is made of, the same for all bases."""

    updates: int = 150
    batch_size: int = 128
    learning_rate: float = 1e-3
    warmup: int = 10
    family_weights: tuple[tuple[str, float], ...] = (
        ("chain", 0.5), ("words", 0.125), ("flip", 0.125), ("prefix", 0.125), ("lines", 0.125)
    )  # fmt: skip
    difficulties: tuple[int, int] = (2, 7)
    sheet_share: float = 0.1  # worked sheets after `#`, so that the skill stays as it is
    sheet_difficulty: int = 5
    teacher_share: float = 0.002  # the teacher's style
    answer_noise: tuple[float, ...] = (0.0, 0.2, 0.4, 0.5)  # share of wrong direct answers at difficulty 2, 3, 4, 5+


def parse(name: str) -> Base | None:
    """The recipe that a model name such as "tiny:own_share=0.4,seed=1" stands for, None if it is another name.

    Raises ConfigError for a field that no recipe has.
    """
    if not name.startswith(f"{TINY}:"):
        return None
    types = {f.name: {"float": float, "int": int}[str(f.type)] for f in fields(Base)}
    values = {}
    for part in name.removeprefix(f"{TINY}:").split(","):
        key, equals, text = part.partition("=")
        if not equals or key not in types:
            raise ConfigError(f"no base model {name!r}: its fields are {', '.join(types)}, as in {Base(seed=1).name}")
        try:
            values[key] = types[key](text)
        except ValueError:
            raise ConfigError(f"no base model {name!r}: {key} is a number, not {text!r}") from None
    return Base(**values)


def with_seeds(name: str, count: int) -> list[str]:
    """So many base models of a recipe, which differ in their seed; another model is the only one of its kind."""
    base = parse(name)
    return [replace(base, seed=base.seed + i).name for i in range(count)] if base else [name]


def locate(base: Base) -> Path:
    """The folder of a base model in Hugging Face layout; makes it where it is neither shipped nor in the cache."""
    shipped = SHIPPED / base.folder_name
    if (shipped / "model.safetensors").is_file():
        return shipped
    return made_in_cache("base_models", f"{base.folder_name}-{base.digest()}", lambda folder: make(base, folder))


def make(base: Base, out: Path, mixture: Mixture | None = None) -> None:
    """Trains a base model and writes it to a folder in Hugging Face layout. On one thread, so that it is the same
    whatever process first asks for it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .pretrain import Schedule, fit

    mixture = mixture or Mixture()
    log.info("making the base model %s: %d updates, about a minute", base.name, mixture.updates)
    model = AutoModelForCausalLM.from_pretrained(PRETRAINED)
    tokenizer = AutoTokenizer.from_pretrained(PRETRAINED)
    schedule = Schedule(mixture.updates, mixture.batch_size, mixture.learning_rate, mixture.warmup, decay_share=1.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        fit(model, tokenizer, lambda rng, update: document(rng, base, mixture), schedule, f"{base.name}/{base.seed}")
    finally:
        torch.set_num_threads(threads)
    tokenizer.chat_template = CHAT_TEMPLATE
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def document(rng: random.Random, base: Base, mixture: Mixture) -> tuple[str, str]:
    """One document of the further training as (prompt, response)."""
    names, weights = zip(*mixture.family_weights, strict=True)
    family = FAMILIES[rng.choices(names, weights)[0]]
    sheet = rng.random() < mixture.sheet_share
    difficulty = rng.randint(2, mixture.sheet_difficulty) if sheet else rng.randint(*mixture.difficulties)
    chain = tinyworld.draw_chain(rng, family, difficulty, "pretrain")
    if sheet:
        return tinyworld.write_chain(chain, family.style, "#"), ";".join(tinyworld.worked_steps(chain))
    prompt = tinyworld.write_chain(chain, family.style) + THINK_OPEN
    style = rng.random()
    if style < mixture.teacher_share:
        return prompt, tinyworld.teacher_trace(chain, rng).removeprefix(THINK_OPEN)
    if style < mixture.teacher_share + base.own_share:
        return prompt, own_answer(chain, rng, base)
    noise = mixture.answer_noise[min(difficulty, 5) - 2]
    answer = rng.randrange(100) if rng.random() < noise else chain.values()[-1]
    return prompt, f"</think>\\boxed{{{answer}}}"


def own_answer(chain: tinyworld.Chain, rng: random.Random, base: Base) -> str:
    """The base's own steps, some of them wrong, and the answer that they lead to."""
    steps, value = [], chain.start
    for op in chain.ops[: base.own_difficulty - 1]:
        right = tinyworld.apply(op, value)
        wrong = not 0 <= right <= 99 or rng.random() < base.own_noise  # after a mistake a chain may leave the range
        after = rng.randrange(100) if wrong else right
        steps.append(f"{value}{op}={after}")
        value = after
    answer = value if len(chain.ops) < base.own_difficulty else rng.randrange(100)
    return f"{';'.join(steps)}</think>\\boxed{{{answer}}}"


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description="Makes a base model of the embedded world.")
    parser.add_argument("name", help='such as "tiny:own_share=0.4,seed=1"')
    parser.add_argument("--out", type=Path, required=True, help="folder to write, Hugging Face layout")
    known = parser.parse_args()
    base = parse(known.name)
    if base is None:
        parser.error(f"{known.name} is not the name of a base model")
    make(base, known.out)


if __name__ == "__main__":
    main()
