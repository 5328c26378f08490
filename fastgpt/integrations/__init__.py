"""Other libraries' models on the fused kernels; each part needs that library's extra."""
