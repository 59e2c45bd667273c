"""Conversion of chats to prompts of `LLM.generate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lamella.engine.engine import Engine
from lamella.engine.requests.chat import (
    CONTENT_FORMATS,
    content_format,
    conversations,
    read_messages,
    render_chat,
    select_template,
)
from lamella.errors import ParameterError
from lamella.validation import shown


def chat_prompts(
    engine: Engine,
    messages: Sequence[Any],
    *,
    chat_template: str | None = None,
    chat_template_content_format: str = "auto",
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    tools: Sequence[Any] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    tokenization_kwargs: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Return the prompt of each chat. Arguments: see `LLM.chat`.

    Raises:
        ParameterError: the model has no tokenizer or template, or the template does not accept the messages.
    """
    tokenizer = engine.tokenizer
    if tokenizer is None:
        raise ParameterError("chat: the model has no tokenizer: give tokenizer=, without skip_tokenizer_init")
    if chat_template_content_format not in CONTENT_FORMATS:
        raise ParameterError(
            f"chat_template_content_format={shown(chat_template_content_format)}: must be "
            f"{', '.join(CONTENT_FORMATS[:-1])} or {CONTENT_FORMATS[-1]}"
        )
    variables = chat_template_kwargs or {}
    if not isinstance(variables, Mapping):
        raise ParameterError(f"chat_template_kwargs={shown(variables)}: must be a dict of names for the template")
    if tools is not None and (isinstance(tools, str | Mapping) or not isinstance(tools, Sequence)):
        raise ParameterError(f"tools={shown(tools)}: must be a list of JSON schemas")
    # The template writes the special tokens, so the tokenizer must not add them again.
    special = {"add_special_tokens": False, **(tokenization_kwargs or {})}
    template = select_template(tokenizer.chat_template, chat_template, bool(tools))
    if chat_template is None and "chat_template" in variables:
        raise ParameterError("chat_template_kwargs: give the template as chat_template=")
    form = chat_template_content_format
    wraps_text, form = form == "openai", content_format(template) if form == "auto" else form
    prompts = []
    for index, chat in enumerate(conversations(messages)):
        try:
            read, images = read_messages(chat, form, wraps_text, engine.admission.image_placeholder)
            text = render_chat(
                template,
                read,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                variables={**tokenizer.special_tokens_map, **variables},
            )
        except ParameterError as error:
            raise ParameterError(f"chats[{index}]: {error}" if index else str(error)) from error
        prompt: dict[str, Any] = {"prompt": text, **special}
        if images:
            prompt["multi_modal_data"] = {"image": images}
        prompts.append(prompt)
    return prompts
