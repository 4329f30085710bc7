"""Checks of the tokenizer and the prompts: where texts end, how conversations are written, and what fits."""

from __future__ import annotations

from agents.runs.doctor_checks.patient import Finding, Patient
from text_env.chat_templates import apply_chat_template
from text_env.tokenization import Message, appended_ids, encode

QUESTION: Message = {"role": "user", "content": "What is one and one?"}
ANSWER: Message = {"role": "assistant", "content": "Two."}
THOUGHT: Message = {"role": "assistant", "content": "<think>\nOne more than one.\n</think>\n\nTwo."}
"""An answer with its thinking before it, as templates of reasoning models expect it."""


def end_of_text(patient: Patient) -> Finding:
    """
    :param patient: who is examined.
    :return: whether the model's own end of a turn ends a text.
    """
    env, tokenizer = patient.everything, patient.tokenizer
    ends = _named(patient, env.eos_token_ids)
    found = f"A text ends at {ends}."
    if len(env.eos_token_ids) > 1:
        found = f"A text ends at any of {len(env.eos_token_ids)} tokens: {ends}."
    if env.prompts.conversational and tokenizer.chat_template is not None:
        [written] = apply_chat_template(tokenizer, [[QUESTION, ANSWER]])
        [turn_end] = encode(tokenizer, [written.rpartition(ANSWER["content"])[2].strip()], add_special_tokens=False)
        if turn_end and not set(turn_end) & set(env.eos_token_ids):
            return Finding(
                "problem",
                f"{found} The chat template ends a turn by {_named(patient, turn_end)}, which is none of them, so that "
                "texts would go on until the budget is spent.",
                f"Pass --eos-token-ids {turn_end[0]}, or name it in the model's generation_config.json.",
            )
    return Finding("ok", found)


def padding_token(patient: Patient) -> Finding:
    """
    :param patient: who is examined.
    :return: whether padding looks like the end of a text.
    """
    tokenizer, ends = patient.tokenizer, patient.everything.eos_token_ids
    if tokenizer.pad_token_id is None:
        return Finding("ok", "The tokenizer has no pad token, and needs none here: texts are told apart by length.")
    pad = _named(patient, [int(tokenizer.pad_token_id)])
    if tokenizer.pad_token_id in ends:
        return Finding(
            "warning",
            f"The pad token is an end of text, {pad}. Here the score lands on the true last token all the same, but "
            "trainers that mask padding have hidden the end from a model's loss.",
            "See in the finding `speed` whether texts end at all; elsewhere give the tokenizer a pad token of its own.",
        )
    return Finding("ok", f"The pad token, {pad}, is no end of text.")


def appended_tokens(patient: Patient) -> Finding:
    """
    :param patient: who is examined.
    :return: whether the tokenizer writes something behind prompts.
    """
    appended = appended_ids(patient.tokenizer, patient.prompts[0].text)
    if appended:
        return Finding(
            "warning",
            f"The tokenizer writes {_named(patient, appended)} behind every text. Prompts are used without it here.",
            "Nothing to do here; wherever else you tokenise prompts, switch it off (add_eos_token=False).",
        )
    return Finding("ok", "The tokenizer writes nothing behind a text.")


def chat_template(patient: Patient) -> Finding:
    """
    :param patient: who is examined.
    :return: whether what a conversation has written stays the same when it goes on.
    """
    tokenizer = patient.tokenizer
    if tokenizer.chat_template is None:
        return Finding("ok", "The tokenizer has no chat template: prompts are plain texts.")
    for answer, what in ((ANSWER, "An answer"), (THOUGHT, "The thinking in an answer")):
        [asked] = apply_chat_template(tokenizer, [[QUESTION]], add_generation_prompt=True)
        [answered] = apply_chat_template(tokenizer, [[QUESTION, answer]])
        [asked_again] = apply_chat_template(tokenizer, [[QUESTION, answer, QUESTION]], add_generation_prompt=True)
        if not asked_again.startswith(answered.rstrip()):
            return Finding(
                "warning",
                f"The chat template rewrites history: {what.lower()} is written in another way once the user replies.",
                "Conversations of one answer are not concerned; for several turns, change the template such that it "
                "writes earlier turns as they were.",
            )
        if not answered.startswith(asked.rstrip()):
            return Finding(
                "warning",
                f"{what} is not written behind what the template opens the assistant's turn with, {asked[-40:]!r}.",
                "Texts are sampled behind that opening; models that were tuned without it may need a template that "
                "writes the same in both cases.",
            )
    return Finding("ok", "The chat template leaves what is written as it is when a conversation goes on.")


def prompts_fit(patient: Patient) -> Finding:
    """
    :param patient: who is examined.
    :return: whether all prompts have at most ``max_prompt_tokens``.
    """
    longest, room, prompts = patient.everything.max_prompt_tokens, patient.room, patient.prompts
    if room is None or longest <= room:
        limit = "as many as it needs" if room is None else f"at most {room}"
        return Finding("ok", f"{len(prompts)} prompts were read; the longest has {longest} tokens, {limit} may be.")
    count = sum(len(prompt.token_ids) > room for prompt in prompts)
    found = (
        f"{count} of {len(prompts)} prompts have more than {room} tokens (max_prompt_tokens), the longest {longest}."
    )
    advice = f"Pass --max-prompt-tokens {longest}, or leave the longest prompts out."
    if patient.run.env.overlong_prompts == "truncate_left":
        return Finding("warning", f"{found} They lose their beginnings.", advice)
    return Finding("problem", f"{found} Training would not start.", advice)


def _named(patient: Patient, token_ids: list[int] | tuple[int, ...]) -> str:
    names = patient.tokenizer.convert_ids_to_tokens(list(token_ids))
    return ", ".join(f"{name!r} ({token})" for name, token in zip(names, token_ids, strict=True))
