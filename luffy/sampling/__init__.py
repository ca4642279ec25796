"""Generation: the protocol of a sampler, and the samplers on transformers and vLLM.
May import model, config, errors."""
