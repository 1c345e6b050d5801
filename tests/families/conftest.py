"""Fixture `engine`, which runs GGUF files in llama.cpp, for the tests of families."""

from tests.exports.conftest import engine  # noqa: F401  (a fixture)
