"""Objects that own C memory: devices, backends, buffers, contexts and tensors, and what moves data between them."""
