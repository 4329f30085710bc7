"""Prompts for an instruct model: ask for a short film review. Conversations, as its chat template takes them.

textrlhf train --model SMOLLM2 --prompts examples.film_reviews:training_prompts ...
textrlhf evaluate --policy runs/mine/policy --prompts examples.film_reviews:held_out_prompts
"""

from __future__ import annotations

SYSTEM = "You write short, plain movie reviews in everyday English."
TRAINING_GENRES = [
    *("horror", "comedy", "war", "crime", "science-fiction", "animated"),
    *("western", "spy", "sports", "fantasy", "disaster", "heist"),
]
HELD_OUT_GENRES = ["drama", "romantic", "mystery", "adventure", "road", "superhero"]
ASPECTS = ["story", "acting", "music", "ending", "dialogue", "characters", "camera-work", "pace"]


def conversation(genre: str, aspect: str) -> list[dict[str, str]]:
    """
    :return: a system message, and what the user asks for. Neither says whether the film is to be liked.
    """
    request = f"Write a very short review of a {genre} film. Say something about the {aspect}."
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": request}]


def training_prompts() -> list[list[dict[str, str]]]:
    """
    :return: 96 conversations.
    """
    return [conversation(genre, aspect) for genre in TRAINING_GENRES for aspect in ASPECTS]


def held_out_prompts() -> list[list[dict[str, str]]]:
    """
    :return: 48 conversations about genres that are not among the others.
    """
    return [conversation(genre, aspect) for genre in HELD_OUT_GENRES for aspect in ASPECTS]
