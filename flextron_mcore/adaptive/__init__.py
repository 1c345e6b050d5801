"""Input-adaptive routers, which choose a level for every token in every block (Flextron, section 3.2; docs/adaptive.md).

A level is the index of a block's candidate, 0 the smallest. Experimental: only commands import this package, the core does not.
Blocks with a level for every token are computed by `layers/tokens/`.
"""
