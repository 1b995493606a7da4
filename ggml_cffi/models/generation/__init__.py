"""Text generation: continuous batching, sampling, chat templates and the KV cache."""
