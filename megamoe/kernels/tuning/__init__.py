"""Shape -> kernel config, one file per architecture. Pure functions: no torch, no CUDA, no kernel knowledge beyond the config classes."""
