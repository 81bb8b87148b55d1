"""`flarec bench kernels`: times the Triton kernels against flash-linear-attention and torch, after checking them.

`rows` is the table of what is measured, `session` runs it; `linear`, `conv`, `softmax` and `decode` hold the
measurements of one op each. Needs a CUDA device; rows against flash-linear-attention need that package, too.
"""
