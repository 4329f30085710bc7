"""Prompts for an instruct model: ask for a short film review, and say nothing of whether the film is to be liked.

textrlhf train --model MODEL --prompts examples.film_reviews:training_prompts ...
textrlhf evaluate --policy runs/mine/policy --prompts examples.film_reviews:held_out_prompts
"""

from __future__ import annotations

TRAINING_GENRES = [
    *("horror", "comedy", "war", "crime", "science-fiction", "animated"),
    *("western", "spy", "sports", "fantasy", "disaster", "heist"),
]
HELD_OUT_GENRES = ["drama", "romantic", "mystery", "adventure", "road", "superhero"]
ASPECTS = ["story", "acting", "music", "ending", "dialogue", "characters", "camera-work", "pace"]


def requests(genres: list[str]) -> list[str]:
    """
    :param genres: of films.
    :return: for each of them one request an aspect; the chat template makes turns of them.
    """
    text = "Write a very short review of a {} film. Say something about the {}."
    return [text.format(genre, aspect) for genre in genres for aspect in ASPECTS]


def training_prompts() -> list[str]:
    """
    :return: 96 requests.
    """
    return requests(TRAINING_GENRES)


def held_out_prompts() -> list[str]:
    """
    :return: 48 requests about genres that are not among the others.
    """
    return requests(HELD_OUT_GENRES)
