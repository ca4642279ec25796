"""What the tests of generation with vLLM have in common: small models, requests, and what to compare."""

import torch

from luffy.sampling.protocol import SamplingParams, SamplingRequest

EOS = 1
WINDOW = 256
SMALL = dict(
    steps=4, rollout_batch_size=4, mini_batch_size=2, num_generations=4, max_completion_length=48, num_problems=40,
    eval_steps=0, final_eval_problems=4, final_eval_samples=2, save_steps=1, sampler="vllm",
)  # fmt: skip


def options(model, **values):
    from luffy.sampling.vllm_sampler import VLLMOptions

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return VLLMOptions(
        **{
            "model": str(model),
            "eos_ids": (EOS,),
            "max_model_len": WINDOW,
            "dtype": "float32",
            "device": device,
            **values,
        }
    )


def moved(model, seed, scale=0.05):
    """Changes every weight, as an optimiser step would, only more."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * scale * (parameter.std() + 1e-3))
    return model


def weights(model):
    return ((name, parameter.detach()) for name, parameter in model.named_parameters())


def requests(lengths=(3, 9, 150), generations=3, vocabulary=40):
    """Prompts, one of them longer than a block of the prefix cache by far."""
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, vocabulary, (n,), generator=generator).numpy() for n in lengths]
    return [SamplingRequest(prompt, i, g) for i, prompt in enumerate(prompts) for g in range(generations)]


def sample(sampler, reqs, *, temperature, step=0, seed=0):
    found = dict(sampler.sample(reqs, SamplingParams(24, temperature, seed=seed, step=step)))
    return [found[i] for i in range(len(reqs))]


def tokens(rollouts):
    return [rollout.token_ids.tolist() for rollout in rollouts]


def comparable(run):
    """Metrics without what depends on the machine; rounded, because vLLM batches rows as they come."""
    rows = run.metrics()
    return [{k: round(v, 4) for k, v in r.items() if not k.startswith(("time/", "machine/", "grad"))} for r in rows]
