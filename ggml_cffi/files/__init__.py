"""Model files and the tensors in them: GGUF, safetensors, encoding and quantization. Nothing here needs a device."""
