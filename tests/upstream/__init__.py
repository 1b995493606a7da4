"""Test cases of ggml itself, run through this package.

ggml's test program ``test-backend-ops`` lists its cases as text: an operation and its parameters. The tests here build
each case with ggml_cffi's operations, compute it on several devices, and compare as upstream does: the mean square of
the difference over the mean square of the reference must be below upstream's limit for the operation.

=============  ===========================================================================
``listing``    the program, and its list of cases
``text``       parser of the parameters
``draw``       input tensors, with values drawn as upstream does
``builders``   one function per test class of upstream, from parameters to a tensor
``judge``      limits, and the distance of two results
``runner``     computation in child processes, so that a crash ends one case only
``refusals``   reasons for which this package refuses cases that ggml's CPU backend computes
=============  ===========================================================================
"""
