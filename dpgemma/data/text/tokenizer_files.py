"""The files by which transformers knows a tokenizer: tokenizer.json with the ids of training, and what goes with it.

The class that is named, PreTrainedTokenizerFast, takes tokenizer.json as it is. Gemma's own class would build another
one from its vocabulary, with other ids where pieces have unusual names.
"""

import json
import pathlib
import shutil
from typing import Any

from dpgemma.data.text import chat
from dpgemma.data.text.tokenizer import CONFIG_FILE, JSON_FILE, MODEL_FILE, TEMPLATE_FILE, Tokenizer


def write(tokenizer: Tokenizer, directory: pathlib.Path, max_length: int, template: str | None = None) -> None:
    """Writes the files.

    Args:
      max_length: tokens of the model's context.
      template: chat template of the tokenizer's own directory; by default that of data.text.chat, where the tokenizer
        has turn markup.
    """
    from tokenizers import Tokenizer as Fast
    from tokenizers.processors import TemplateProcessing

    made, names = tokenizer.as_fast()
    fast = Fast.from_str(made.to_str())
    bos = names.get("bos") or fast.id_to_token(tokenizer.bos)
    fast.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.bos)]
    )
    (directory / JSON_FILE).write_text(fast.to_str(pretty=True), encoding="utf-8")
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name}_token": token for name, token in names.items()},
        "bos_token": bos,
        "eos_token": names.get("eos") or fast.id_to_token(tokenizer.eos),
        "pad_token": names.get("pad") or fast.id_to_token(tokenizer.pad),
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_max_length": max_length,
    }
    (directory / CONFIG_FILE).write_text(json.dumps(settings, indent=1, ensure_ascii=False) + "\n")
    for path in tokenizer.files():
        if path.name == MODEL_FILE or path.suffix == ".model":
            shutil.copyfile(path, directory / MODEL_FILE)
    template = template or (chat.TEMPLATE if chat.has_turns(tokenizer) else None)
    if template is not None:
        (directory / TEMPLATE_FILE).write_text(template)


def template_of(directory: pathlib.Path) -> str | None:
    """The chat template of a directory; None where it has none, or several."""
    if (directory / TEMPLATE_FILE).is_file():
        return (directory / TEMPLATE_FILE).read_text()
    if not (directory / CONFIG_FILE).is_file():
        return None
    template = json.loads((directory / CONFIG_FILE).read_text()).get("chat_template")
    return template if isinstance(template, str) else None
