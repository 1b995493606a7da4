"""GGUF files: header, values, reader and writer."""
