"""What a Hugging Face directory holds beside weights: tokenizer, chat template, how to generate. Carried along, or made.

A run that came from such a directory keeps these files in its folder ``huggingface``, as they were.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olmo_fn.formats.config_json import CONFIG, differences, json_of, model_of, read_json, write_json
from olmo_fn.models.config import Model

if TYPE_CHECKING:
    from olmo_fn.data.tokenizer import Tokenizer

KEPT = "huggingface"
GENERATION = "generation_config.json"
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
TEMPLATES = "additional_chat_templates"
IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")
"""What a config.json says of the tokenizer, and of the context."""


def keep(source: Path, run: Path, dtype: str = "") -> None:
    """Copy a directory's files other than weights into the folder of a run; ``dtype``: that of the weights, if known."""
    kept = run / KEPT
    kept.mkdir(parents=True, exist_ok=True)
    copy(source, kept, (CONFIG, GENERATION, *TOKENIZER))
    raw = read_json(kept)
    if dtype and dtype_in(raw) != dtype:
        raw.pop("torch_dtype", None)
        write_json(kept / CONFIG, raw | {"dtype": dtype})


def dtype_in(raw: Mapping[str, Any]) -> str:
    """The dtype of the weights that a config.json names, as transformers 5 or 4 does; empty if it does not."""
    return str(raw.get("dtype") or raw.get("torch_dtype") or "")


def dtype_of(run: Path) -> str:
    """The dtype that a run's weights came in from a Hugging Face directory; float32 if they are its own."""
    return (dtype_in(read_json(run / KEPT)) if (run / KEPT).is_dir() else "") or "float32"


def copy(source: Path, target: Path, names: tuple[str, ...]) -> None:
    """Copy those of the files that are there, and the chat templates."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if (source / TEMPLATES).is_dir():
        shutil.copytree(source / TEMPLATES, target / TEMPLATES, dirs_exist_ok=True)


def eos_of(directory: Path) -> str:
    """The end-of-document token of a directory, by its tokenizer_config.json or else its config.json; empty if unknown."""
    settings = _json(directory / "tokenizer_config.json")
    token = settings.get("eos_token")
    if isinstance(token, dict):
        token = token.get("content")
    if isinstance(token, str) and token:
        return token
    eos = read_json(directory).get("eos_token_id")
    first = eos[0] if isinstance(eos, list) and eos else eos
    added = _json(directory / "tokenizer.json").get("added_tokens", [])
    return next((one["content"] for one in added if one.get("id") == first), "")


def named_tokens(directory: Path) -> dict[str, str]:
    """The special tokens of a directory, such as ``eos_token``, by its tokenizer_config.json."""
    found = {name: value for name, value in _json(directory / "tokenizer_config.json").items() if name.endswith("_token")}
    contents = {name: value.get("content") if isinstance(value, dict) else value for name, value in found.items()}
    return {name: value for name, value in contents.items() if isinstance(value, str)}


def chat_template(directory: Path) -> str:
    """The chat template of a directory: chat_template.jinja, or else that in its tokenizer_config.json; empty without one."""
    if (own := directory / "chat_template.jinja").is_file():
        return own.read_text(encoding="utf-8")
    found = _json(directory / "tokenizer_config.json").get("chat_template")
    if isinstance(found, list):  # several, by name
        found = next((one.get("template") for one in found if isinstance(one, dict) and one.get("name") == "default"), "")
    return found if isinstance(found, str) else ""


def load_tokenizer(directory: Path) -> Tokenizer | None:
    """The tokenizer of a directory, if it has a tokenizer.json."""
    from olmo_fn.data.tokenizer import load

    path = directory / "tokenizer.json"
    return load(path, eos_of(directory)) if path.is_file() else None


def config_of(model: Model, run: Path, context: int, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The config.json of a run's model: the one that it came with, if it describes that model, or else a new one."""
    kept = run / KEPT
    raw: Mapping[str, Any] = read_json(kept) if (kept / CONFIG).is_file() else {}
    if raw and not differences(model_of(raw), model):
        return dict(raw)
    new = json_of(model) | {"max_position_embeddings": context, "eos_token_id": tokenizer.eos_id if tokenizer else None}
    return new | {name: raw[name] for name in IDS if name in raw and same_tokenizer(kept, tokenizer)}


def write_text_files(draft: Path, run: Path, context: int, tokenizer: Tokenizer | None) -> None:
    """Write tokenizer, chat template and generation config into a draft: those that the run came with, if they are of its
    tokenizer, or else new ones of that.
    """
    kept = run / KEPT
    if same_tokenizer(kept, tokenizer):
        copy(kept, draft, (GENERATION, *TOKENIZER))
    elif tokenizer:
        eos = tokenizer.backend.id_to_token(tokenizer.eos_id)
        tokenizer.save(draft / "tokenizer.json")
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "model_max_length": context}
        write_json(draft / "tokenizer_config.json", settings | {"clean_up_tokenization_spaces": False})
        write_json(draft / "special_tokens_map.json", {"eos_token": eos})
    if not (draft / GENERATION).exists():
        write_json(draft / GENERATION, {"eos_token_id": tokenizer.eos_id} if tokenizer else {})


def same_tokenizer(kept: Path, tokenizer: Tokenizer | None) -> bool:
    """Whether the files that a run keeps are of its tokenizer. Those without a tokenizer.json count as such."""
    if not kept.is_dir():
        return False
    there = load_tokenizer(kept)
    return there is None or tokenizer is None or there.vocab_hash == tokenizer.vocab_hash


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
