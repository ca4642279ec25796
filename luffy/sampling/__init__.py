"""Generation: the protocol of a sampler, the samplers on transformers and vLLM, and the ranks that share its work.
May import model, config, errors."""
