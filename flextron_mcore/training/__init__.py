"""Training: one loop for all phases, the sampler of sub-networks, and the learners of routers."""
