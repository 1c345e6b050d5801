"""Code that is copied into exported directories. It needs Megatron-Core only, so it repeats the table of activation functions.

Nothing in flextron_mcore imports it.
"""
