"""Blocks with a width for every token (a level), as dense products for the tokens of each level, without padding or masks."""
