"""Upstream's own cases, run through this package.

ggml's test program ``test-backend-ops`` lists its cases as text: an operation and its parameters. Here each is rebuilt
with ggml_cffi's operations, computed on several devices, and compared as upstream compares: by the mean square of the
difference over the mean square of the reference, below the limit that upstream's program has for the operation.

=============  =======================================================================
``listing``    builds the program once, and keeps its list
``text``       parses the parameters
``draw``       makes the input tensors, and values for them as upstream draws them
``builders``   one function for each of upstream's test classes, from parameters to a tensor
``judge``      the limits, and how far two results are apart
``runner``     computes cases in child processes, so that none can take the others with it
=============  =======================================================================
"""
