"""Blocks whose tokens have different levels, with the work really saved: every level's part is a dense product for its tokens."""
