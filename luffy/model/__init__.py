"""The language model: loading it, packing sequences for it, log-probs and entropies from it.
May import data, config, errors."""
