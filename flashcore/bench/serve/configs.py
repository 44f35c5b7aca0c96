"""A model's config.json: the part on language, and the same with fewer layers of every kind."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

_LISTS = ("layer", "pattern", "type")  # in the name of what has an entry a layer
# Every n-th layer is of another kind: numbers that say n.
_PERIODS = ("full_attention_interval", "sliding_window_pattern", "attn_layer_period")
_FIRST = "first_k_dense_replace"  # so many layers without experts come first


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part that describes the language model: nested in one that also sees or hears."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def cut_layers(config: dict[str, Any], layers: int) -> dict[str, Any]:
    """The config with that many layers, in their order, at least one of each kind left.

    Lists and strings with an entry a layer are cut alike. The first layers are kept where these
    are of all kinds; otherwise the first of each missing kind stands in for the last ones.
    Raises ValueError if so few layers cannot hold every kind, naming the least that can.
    """
    result = copy.deepcopy(config)
    text = text_config(result)
    count = int(text["num_hidden_layers"])
    if not 1 <= layers <= count:
        raise ValueError(f"must be 1 to {count}, got {layers}")
    # What repeats with a period is told by a layer's number, so only the first ones can be kept.
    periods = [
        len(value) if isinstance(value, str) else int(value)
        for name in _PERIODS
        if isinstance(value := text.get(name), (int, str))
    ]
    if periods and layers < min(count, max(periods)):
        raise ValueError(
            f"must be at least {min(count, max(periods))}, one period of its kinds, got {layers}"
        )
    kinds = _kinds(text, count)
    kept = _kept(kinds, layers)
    if periods and kept != list(range(layers)):
        least = next(n for n in range(1, count + 1) if set(kinds[:n]) == set(kinds))
        raise ValueError(f"must be at least {least}, for a layer of each kind, got {layers}")
    for name, value in _per_layer(text, count):
        chosen = [value[number] for number in kept]
        text[name] = "".join(chosen) if isinstance(value, str) else chosen
    if isinstance(text.get(_FIRST), int):
        text[_FIRST] = sum(number < text[_FIRST] for number in kept)
    if isinstance(text.get("mlp_only_layers"), list):
        dense = set(text["mlp_only_layers"])
        text["mlp_only_layers"] = [place for place, number in enumerate(kept) if number in dense]
    text["num_hidden_layers"] = layers
    return result


def _per_layer(text: dict[str, Any], count: int) -> Iterator[tuple[str, Any]]:
    for name, value in list(text.items()):
        if (
            isinstance(value, (list, str))
            and len(value) == count
            and name not in ("mlp_only_layers", "model_type")
            and any(part in name for part in _LISTS)
            and (isinstance(value, list) or name.startswith("hybrid"))
        ):
            yield name, value


def _kinds(text: dict[str, Any], count: int) -> list[str]:
    """A name for the kind of each layer."""
    columns: list[list[Any]] = [list(value) for _, value in _per_layer(text, count)]
    if isinstance(text.get(_FIRST), int):
        columns.append([number < text[_FIRST] for number in range(count)])
    if isinstance(text.get("mlp_only_layers"), list):
        columns.append([number in text["mlp_only_layers"] for number in range(count)])
    return [json.dumps([column[number] for column in columns]) for number in range(count)]


def _kept(kinds: list[str], layers: int) -> list[int]:
    """Numbers of the layers to keep, ascending."""
    wanted = list(dict.fromkeys(kinds))
    if layers < len(wanted):
        raise ValueError(f"must be at least {len(wanted)}, for a layer of each kind, got {layers}")
    kept = list(range(layers))
    for kind in wanted:
        if kind in {kinds[number] for number in kept}:
            continue
        # The last layer whose kind another one keeps makes room.
        of_kept = [kinds[number] for number in kept]
        place = max(p for p, number in enumerate(kept) if of_kept.count(kinds[number]) > 1)
        kept.pop(place)
        kept.append(kinds.index(kind))
    return sorted(kept)
