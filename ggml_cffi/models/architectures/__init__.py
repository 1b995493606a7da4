"""Model architectures: sizes, tensors and graph of each, one file per architecture."""
