"""Neural tangent kernels of language models, per layer, on Ray, in Arrow."""
