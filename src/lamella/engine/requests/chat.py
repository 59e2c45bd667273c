"""Chats as prompts: render messages with a model's chat template, and collect their images.

Templates are untrusted, so they run in Jinja2's immutable sandbox, and their variables are plain data. Template
variables, and the continuation of a final message, are those of transformers' `apply_chat_template`.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias

from lamella.errors import ParameterError
from lamella.validation import shown

if TYPE_CHECKING:
    import jinja2

Message: TypeAlias = Mapping[str, Any]
Templates: TypeAlias = "str | Mapping[str, str] | None"

CONTENT_FORMATS = ("auto", "string", "openai")
_IMAGE_PARTS = ("image", "image_url", "image_pil", "input_image")
_TEXT_PARTS = ("text", "input_text", "output_text", "refusal", "thinking")
# Keys of an assistant's reasoning in messages. Templates read the first one; templates of gpt-oss the second.
_REASONING = ("reasoning_content", "thinking", "reasoning")
_END_MARK = "END-OF-FINAL-MESSAGE "
_MAX_RENDERED = 1 << 26  # characters


def select_template(templates: Templates, asked: str | None, has_tools: bool) -> str:
    """Return the template to use.

    Args:
        templates: of the model: one, several by name, or None.
        asked: `chat_template` of the caller: the name of one of several, or the text of a template.
        has_tools: True if tools are given; the template `tool_use` is then preferred.

    Raises:
        ParameterError: there is no template, or several without a default.
    """
    if asked is not None and not isinstance(asked, str):
        raise ParameterError(f"chat_template={shown(asked)}: must be a template's text, or the name of one")
    if isinstance(templates, Mapping):
        if asked is not None:
            return templates.get(asked, asked)
        name = "tool_use" if has_tools and "tool_use" in templates else "default"
        if name not in templates:
            raise ParameterError(
                f"chat_template: the model has several and no default: give one of {', '.join(sorted(templates))}"
            )
        return templates[name]
    if asked is not None:
        return asked
    if templates is None:
        raise ParameterError(
            "chat: the model's files have no chat template (chat_template.jinja, or chat_template in "
            "tokenizer_config.json): give chat_template=, or use generate() with a text"
        )
    return templates


def render_chat(
    template: str,
    messages: Sequence[Message],
    *,
    tools: Sequence[Any] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """Render a chat.

    Args:
        template: Jinja2 text.
        messages: with contents in the form that the template expects, see `read_messages`.
        tools: JSON schemas of the functions that the model can call.
        add_generation_prompt: append the text that starts an assistant message.
        continue_final_message: end inside the final message, so that the model continues it.
        variables: additional template variables.

    Returns:
        The text of the chat.

    Raises:
        ParameterError: the chat is empty, the template rejects it or fails, or the final message cannot be continued.
    """
    if not messages:
        raise ParameterError("messages: an empty chat: give at least one message")
    if continue_final_message and add_generation_prompt:
        raise ParameterError("continue_final_message=True: contradicts add_generation_prompt=True")
    chat = [_with_reasoning(message) for message in plain(list(messages))]
    final = _mark_end(chat) if continue_final_message else None
    names = {"tools": plain(list(tools)) if tools else None, "documents": None, **plain(dict(variables or {}))}
    text = _render(template, {**names, "messages": chat, "add_generation_prompt": add_generation_prompt})
    return text if final is None else _until_end(text, final)


def _render(template: str, names: Mapping[str, Any]) -> str:
    import jinja2

    pieces, length = [], 0
    try:
        for piece in _compiled(template).generate(**names):
            pieces.append(piece)
            length += len(piece)
            if length > _MAX_RENDERED:
                raise ParameterError(f"chat_template: renders more than {_MAX_RENDERED} characters; give another one")
    except jinja2.TemplateSyntaxError as error:
        raise ParameterError(f"chat_template: line {error.lineno}: {error.message}; correct it") from error
    except jinja2.TemplateError as error:
        raise ParameterError(f"chat_template: {_line(error)}; change the messages, or give another template") from error
    except ParameterError:
        raise
    except (Exception, RecursionError) as error:  # templates can raise any error, for example on unexpected types
        raise ParameterError(
            f"chat_template: fails on these messages ({type(error).__name__}: {_line(error)}); change the messages, or "
            "give another template"
        ) from error
    return "".join(pieces)


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _mark_end(chat: list[dict[str, Any]]) -> str:
    """Append a marker to the text of the final message in place, and return the text without it."""
    content = chat[-1].get("content")
    if isinstance(content, str):
        chat[-1]["content"] = content + _END_MARK
        return content
    for part in reversed(content if isinstance(content, list) else []):
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            text: str = part["text"]
            part["text"] = text + _END_MARK
            return text
    raise ParameterError("continue_final_message=True: the final message has no text to continue")


def _until_end(text: str, final: str) -> str:
    """Return the rendered text up to the marker, stripped if the template strips trailing spaces."""
    mark = _END_MARK.strip()
    if mark not in text or final.strip() not in text:
        raise ParameterError(
            "continue_final_message=True: the chat template does not show the final message as it is; give another "
            "chat_template, or the final message without what the template removes"
        )
    end = text.rindex(mark)
    kept = text[end : end + len(_END_MARK)] == _END_MARK
    return text[:end] if kept else text[:end].rstrip()


def _with_reasoning(message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise ParameterError(f"messages: each must be a dict with role and content, not {type(message).__name__}")
    given = {key: value for key, value in message.items() if value is not None}
    reasoning = next((given[key] for key in _REASONING if key in given), None)
    return given if reasoning is None else {"thinking": reasoning, **given, "reasoning_content": reasoning}


def plain(value: Any) -> Any:
    """Return a copy of a value in JSON types, the only types that templates get.

    The sandbox cannot restrict methods of other types, so such objects become a text with the name of their type.
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind in (str, int, float):  # enums, numpy scalars
        if isinstance(value, kind):
            return getattr(kind, f"__{kind.__name__}__")(value)
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {each.name: plain(getattr(value, each.name)) for each in dataclasses.fields(value)}
    if callable(getattr(value, "model_dump", None)):  # pydantic models, such as those of OpenAI's client
        return plain(value.model_dump())
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return plain(value.item())
    return f"<{type(value).__name__}>"


@lru_cache(maxsize=64)
def _compiled(template: str) -> jinja2.Template:
    import jinja2

    try:
        return _environment().from_string(template)
    except RecursionError as error:
        raise jinja2.TemplateError("nested too deep") from error


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    """Return a sandbox with the filters and globals that chat templates use."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Render the body of `{% generation %}`, which marks assistant tokens for training, unchanged."""

        tags = {"generation"}  # noqa: RUF012 (declared so by the base class)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    class Namespace(jinja2.utils.Namespace):
        """Namespace that rejects names starting with an underscore."""

        def __init__(*args: Any, **values: Any) -> None:
            self, *rest = args
            given = dict(*rest, **values)
            for name in given:
                _check_name(name)
            jinja2.utils.Namespace.__init__(self, given)

        def __setitem__(self, name: str, value: Any) -> None:
            _check_name(name)
            super().__setitem__(name, value)

    def _check_name(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"namespace: a name may not start with an underscore: {name}")

    class Dictionary:
        """Callable `dict(...)` that does not expose the attributes of the type."""

        def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
            return dict(*args, **values)

    def refuse(message: object) -> None:
        raise jinja2.TemplateError(str(message))

    def now(form: str) -> str:
        return datetime.now().strftime(form)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    sandbox.filters["tojson"] = to_json
    sandbox.globals.update(raise_exception=refuse, strftime_now=now, namespace=Namespace, dict=Dictionary())
    return sandbox


@lru_cache(maxsize=64)
def content_format(template: str) -> str:
    """Return the form of message contents that a template expects: "openai" if it loops over parts, else "string"."""
    import jinja2
    from jinja2 import nodes

    try:
        tree = _environment().parse(template)
    except jinja2.TemplateError:
        return "string"  # rendering reports the error

    def is_content(node: Any, names: set[str]) -> bool:
        if isinstance(node, nodes.Filter | nodes.Test):
            return node.node is not None and is_content(node.node, names)
        if isinstance(node, nodes.Getitem):
            return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
        if isinstance(node, nodes.Getattr):
            return node.attr == "content"
        return isinstance(node, nodes.Name) and node.name in names

    names: set[str] = set()
    for node in tree.find_all(nodes.Assign):
        if isinstance(node.target, nodes.Name) and is_content(node.node, set()):
            names.add(node.target.name)
    for macro in tree.find_all(nodes.Macro):  # macros that take a content as argument
        names |= {arg.name for arg in macro.args if arg.name == "content"}
    return "openai" if any(is_content(loop.iter, names) for loop in tree.find_all(nodes.For)) else "string"


def is_chat(value: Any) -> bool:
    """Return True for a list of messages."""
    return isinstance(value, Sequence) and not isinstance(value, str) and bool(value) and _is_message(value[0])


def _is_message(value: Any) -> bool:
    return (isinstance(value, Mapping) and "role" in value) or callable(getattr(value, "model_dump", None))


def read_messages(
    messages: Sequence[Any], form: str, wraps_text: bool, placeholder: str | None
) -> tuple[list[dict[str, Any]], list[Any]]:
    """Convert messages to the form that a template expects, and collect their images.

    Args:
        messages: in OpenAI's format: `role`, `content` (a text or a list of parts), and other keys for the template.
        form: "string" joins the parts of a content with newlines, "openai" keeps the parts.
        wraps_text: True to convert a text to a list of one part, for templates that accept only lists.
        placeholder: text of an image in the "string" form; None if the model does not accept images.

    Returns:
        The messages, and the images in order.

    Raises:
        ParameterError: a message or part has an unsupported form, or an image cannot be read.
    """
    images: list[Any] = []
    read = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        given = message if isinstance(message, Mapping) else _dumped(message, where)
        if not isinstance(given.get("role"), str):
            raise ParameterError(f"{where}: role={shown(given.get('role'))}: must be a text such as user")
        content = given.get("content")
        values = {**given, **_parsed_calls(given, where)}
        if isinstance(content, Sequence) and not isinstance(content, str):
            parts = [_read_part(part, f"{where}.content[{i}]", images, placeholder) for i, part in enumerate(content)]
            values["content"] = parts if form == "openai" else "\n".join(_as_text(part, placeholder) for part in parts)
        elif isinstance(content, str):
            values["content"] = [{"type": "text", "text": content}] if wraps_text and form == "openai" else content
        elif content is not None:
            raise ParameterError(
                f"{where}: content of type {type(content).__name__}: must be a text or a list of parts"
            )
        read.append(values)
    return read, images


def _dumped(message: Any, where: str) -> Mapping[str, Any]:
    dump: Callable[[], Any] | None = getattr(message, "model_dump", None)
    if dump is None:
        raise ParameterError(f"{where}: must be a dict with role and content, not {type(message).__name__}")
    values = dump()
    assert isinstance(values, Mapping)
    return values


def _parsed_calls(message: Message, where: str) -> dict[str, Any]:
    """Return the tool calls of a message with arguments as objects, which OpenAI clients send as JSON text."""
    calls = message.get("tool_calls")
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        return {}
    parsed = []
    for call in calls:
        function = call.get("function") if isinstance(call, Mapping) else None
        arguments = function.get("arguments") if isinstance(function, Mapping) else None
        if isinstance(function, Mapping) and isinstance(arguments, str):
            try:
                arguments = json.loads(arguments) if arguments.strip() else {}
            except ValueError as error:
                raise ParameterError(f"{where}.tool_calls: arguments are not JSON ({error})") from error
            call = {**call, "function": {**function, "arguments": arguments}}
        parsed.append(call)
    return {"tool_calls": parsed}


def _read_part(part: Any, where: str, images: list[Any], placeholder: str | None) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, Mapping):
        raise ParameterError(f"{where}: must be a part such as {{'type': 'text', 'text': ...}}")
    kind = part.get("type") or next((name for name in (*_TEXT_PARTS, *_IMAGE_PARTS) if name in part), None)
    if kind in _IMAGE_PARTS:
        if placeholder is None:
            raise ParameterError(f"{where}: an image, and the model reads none")
        images.append(_read_image(part, kind, where))
        return {"type": "image"}
    if kind in _TEXT_PARTS:
        text = part.get("text", part.get(kind))
        if not isinstance(text, str):
            raise ParameterError(f"{where}: a {kind} part needs a text")
        return {**part, "type": "text", "text": text}
    raise ParameterError(f"{where}: type={shown(kind)}: must be text, image_url or image")


def _as_text(part: Mapping[str, Any], placeholder: str | None) -> str:
    return placeholder or "" if part["type"] == "image" else str(part["text"])


def _read_image(part: Mapping[str, Any], kind: str, where: str) -> Any:
    given = next((part[name] for name in (kind, *_IMAGE_PARTS, "url") if part.get(name) is not None), None)
    if isinstance(given, Mapping):
        given = given.get("url")
    if given is None:
        raise ParameterError(
            f"{where}: an image part needs the image: image_url={{'url': 'data:image/png;base64,...'}}"
        )
    if not isinstance(given, str):
        return given  # a Pillow image, array or tensor; `read_pixels` checks it
    head, comma, data = given.partition(",")
    if not comma or not head.startswith("data:") or not head.endswith(";base64"):
        raise ParameterError(
            f"{where}: url={shown(given, 60)}: nothing is fetched from the network or from files: give a data: URL in "
            "base64, or the image itself"
        )
    try:
        from PIL import Image
    except ImportError as error:
        raise ParameterError(f"{where}: reading images needs Pillow: pip install 'lamella[images]'") from error
    try:
        image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
        image.load()
    except (binascii.Error, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ParameterError(f"{where}: the image cannot be read ({_line(error)})") from error
    return image


def conversations(messages: Any) -> Iterator[Sequence[Any]]:
    """Yield the chats of `LLM.chat`'s first argument.

    Args:
        messages: a chat, or a list of chats.

    Raises:
        ParameterError: `messages` has another form, or is empty.
    """
    if is_chat(messages):
        yield messages
        return
    if isinstance(messages, Sequence) and not messages:
        raise ParameterError("messages: an empty chat: give at least one message")
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise ParameterError("messages: must be a list of messages such as {'role': 'user', 'content': 'Hello'}")
    for index, chat in enumerate(messages):
        if not is_chat(chat):
            raise ParameterError(f"messages[{index}]: must be a list of messages, each a dict with role and content")
        yield chat
