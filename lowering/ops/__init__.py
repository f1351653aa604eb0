"""The operators, under ``torch.ops.mhf_compiler``."""
