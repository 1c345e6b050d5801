"""Input-adaptive routers: every token chooses its own sub-network in every block (Flextron, section 3.2; docs/adaptive.md).

Young work, fenced off: nothing in the core imports this package, only commands do. It stands on the core, and on
`layers/tokens/`, which computes blocks whose tokens have different levels.
"""
