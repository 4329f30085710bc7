"""Hugging Face models: their distribution of tokens, their critic, the frozen reference, and the cache of contexts
already seen.
"""
