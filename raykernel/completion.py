"""`raykernel completion`: commands, options and overrides at the press of Tab.

The shell's script asks `raykernel completion words LINE`, where LINE is what is typed so far; what
is an override is answered by Hydra.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from raykernel.catalog import LISTS, studies
from raykernel.store.named import QUERIES
from raykernel.tools import TOOL_PARSERS

_FLAGS = ("--help", "--cfg", "--multirun")
"""Of commands that take overrides."""

_BASH = r"""# eval "$(raykernel completion bash)", in ~/.bashrc
_raykernel() {
    local line="${COMP_LINE:0:COMP_POINT}" word breaks found
    word="${line##*[[:space:]]}"
    # Bash completes what follows the last = or : and wants no more than that back.
    breaks=""
    [[ "$COMP_WORDBREAKS" == *=* ]] && breaks+="="
    [[ "$COMP_WORDBREAKS" == *:* ]] && breaks+=":"
    local before=""
    [[ -n "$breaks" ]] && before="${word%"${word##*[$breaks]}"}"
    COMPREPLY=()
    while IFS= read -r found; do
        COMPREPLY+=("${found#"$before"}")
    done < <(raykernel completion words "$line" 2>/dev/null)
    [[ ${#COMPREPLY[@]} -eq 1 && "${COMPREPLY[0]}" == *[=./] ]] && compopt -o nospace
}
complete -o default -F _raykernel raykernel
"""
_ZSH = r"""# eval "$(raykernel completion zsh)", in ~/.zshrc after compinit
_raykernel() {
    local -a found
    found=("${(@f)$(raykernel completion words "${(j: :)words[1,CURRENT]}" 2>/dev/null)}")
    found=("${(@)found:#}")
    compadd -Q -S '' -- "${(@M)found:#*[=./]}"
    compadd -Q -- "${(@)found:#*[=./]}"
    (( ${#found} )) || _files
}
compdef _raykernel raykernel
"""
_FISH = r"""# raykernel completion fish > ~/.config/fish/completions/raykernel.fish
function _raykernel
    raykernel completion words (commandline -cp | string collect) 2>/dev/null
end
complete -c raykernel -a '(_raykernel)'
"""
SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}
"""By shell."""


def candidates(line: str, runs: Sequence[str], tools: Sequence[str]) -> list[str]:
    """What the last word of a command line can become.

    Args:
        line: the command line so far, `raykernel` included; a space at its end begins a word.
        runs: commands that take overrides.
        tools: the other ones.

    Returns:
        Whole words, sorted.
    """
    words = line.split()
    if not line or line[-1].isspace():
        words.append("")
    _, *before, word = words if len(words) > 1 else ["", *words, ""]
    if not before:
        return _beginning(word, [*runs, *tools])
    command, given = before[0], before[1:]
    if command in runs:
        return _beginning(word, _FLAGS) if word.startswith("-") else _overrides([*given, word])
    if command == "sweep":
        return _overrides([*given[1:], word]) if given else _beginning(word, studies())
    if word.startswith("-"):
        usage = TOOL_PARSERS[command]().format_usage() if command in TOOL_PARSERS else ""
        return _beginning(word, ["--help", *re.findall(r"--[a-z]+", usage)])
    first: dict[str, Iterable[str]] = {
        "query": QUERIES,
        "list": LISTS,
        "completion": SCRIPTS,
        "report": studies() if command == "report" else (),
    }
    return _beginning(word, first.get(command, ())) if not given else []


def _beginning(word: str, known: Iterable[str]) -> list[str]:
    return sorted(each for each in known if each.startswith(word))


def _overrides(words: Sequence[str]) -> list[str]:
    """Hydra's own candidates for the last word, given the overrides before it."""
    # Imported here: Hydra takes most of the time that a press of Tab has.
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from hydra.plugins.completion_plugin import DefaultCompletionPlugin
    from omegaconf.errors import OmegaConfBaseException

    from raykernel.compose import conf_dir, register_schema

    register_schema()
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            loader = GlobalHydra.instance().config_loader()
            found = DefaultCompletionPlugin(loader)._query("config", " ".join(words))
    except (HydraException, OmegaConfBaseException):  # an override before it is wrong
        return []
    return [each for each in found if not each.startswith("hydra")]
