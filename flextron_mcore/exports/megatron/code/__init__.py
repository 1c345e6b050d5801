"""Code that travels inside an exported directory. It needs Megatron-Core only; nothing in flextron_mcore imports it, so what it
repeats of the package (activation functions) is meant."""
