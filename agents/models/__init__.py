"""Hugging Face models as scorers of token contexts, the memo under them, critics and references."""
