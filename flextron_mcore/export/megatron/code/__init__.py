"""What travels inside an exported directory. It needs Megatron-Core only; nothing in flextron_mcore imports it."""
