"""The data: problems, benchmarks and the embedded world, prompt templates, and all of these as tokens.
May import verifier, methods (for Trace), config, errors."""
