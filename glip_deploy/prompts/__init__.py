"""The path of a prompt: words to tokens, and the cache of their embeddings."""

from __future__ import annotations

from glip_deploy.prompts.files import read_prompt_file
from glip_deploy.prompts.phrases import find_phrases
from glip_deploy.prompts.syntax import Caption, ClassName, Phrases, PromptText
from glip_deploy.prompts.tokens import MAX_TOKENS, Prompt, parse_prompt, thresholds

__all__ = [
    "MAX_TOKENS",
    "Caption",
    "ClassName",
    "Phrases",
    "Prompt",
    "PromptText",
    "find_phrases",
    "parse_prompt",
    "read_prompt_file",
    "thresholds",
]
