"""The chat template of an output: one of the models', a known one, or the spec's own text.

A template is Jinja source; it is carried and never run here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from mergecore.errors import CheckpointError
from mergecore.small_files import read_object, read_text
from mergecore.tokenizer import Files

CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' ~ message['role'] ~ '\\n' ~ message['content'] ~ '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
NAMED = {"chatml": CHATML}
FILE = "chat_template.jinja"


def named_template(wanted: str) -> str:
    """The template of this name, or `wanted` itself if it is Jinja; ValueError if it is neither."""
    if "{" in wanted:
        return wanted
    if wanted in NAMED:
        return NAMED[wanted]
    raise ValueError(
        f"{wanted!r} is no chat template: expected auto, {', '.join(NAMED)}, or the template's own text (Jinja; copy "
        f"it from the {FILE} or tokenizer_config.json of a model that has it)"
    )


def commonest_template(folders: Sequence[Path]) -> str | None:
    """The template that most of the models have, the first one of equally common ones; None if none has one."""
    found: dict[str, list[str]] = {}
    for template in filter(None, map(folder_template, folders)):
        found.setdefault(template.strip(), []).append(template)
    return max(found.values(), key=len)[0] if found else None


def folder_template(folder: Path) -> str | None:
    """The (default) chat template of a model folder, from where transformers looks for it; None without one."""
    if (folder / FILE).is_file():
        return read_text(folder / FILE)
    for name in ("tokenizer_config.json", "chat_template.json"):
        template = read_object(folder / name).get("chat_template")
        if isinstance(template, list):
            named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
            template = named[0].get("template") if named else None
        if isinstance(template, str):
            return template
    return None


def with_template(files: Files, template: str) -> Files:
    """These tokenizer files with this template as their only one, as transformers 5 stores it: chat_template.jinja."""
    files = {name: content for name, content in files.items() if not name.startswith("chat_template")}
    name = "tokenizer_config.json"
    if name in files:
        content = files[name]
        config = read_object(content) if isinstance(content, Path) else json.loads(content)
        if config.pop("chat_template", None) is not None:
            files[name] = (json.dumps(config, indent=2) + "\n").encode()
    try:
        files[FILE] = template.encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(f"the chat template is not valid text: {error}") from None
    return files
