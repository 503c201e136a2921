"""Completion of commands, options and file names in bash and zsh, from the parsers themselves."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping

BASH = """\
_dvq_rt() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" words=""
    if [ "$COMP_CWORD" -eq 1 ]; then
        words="{commands}"
    elif [ "${{word:0:1}}" = "-" ]; then
        case "${{COMP_WORDS[1]}}" in
{options}
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o bashdefault -o default -F _dvq_rt dvq-rt
"""
ZSH = """\
#compdef dvq-rt
_dvq_rt() {{
    local wanted=""
    if (( CURRENT == 2 )); then
        wanted="{commands}"
    elif [[ "${{words[CURRENT]}}" == -* ]]; then
        case "${{words[2]}}" in
{options}
        esac
    else
        _files
        return
    fi
    compadd -- ${{=wanted}}
}}
if [[ "${{funcstack[1]}}" == _dvq-rt ]]; then
    _dvq_rt
else
    compdef _dvq_rt dvq-rt
fi
"""
"""A file ``_dvq-rt`` in ``$fpath`` is loaded when it is first needed, and is to complete at once; else it is evaluated.
"""
SHELLS = {"bash": (BASH, "words"), "zsh": (ZSH, "wanted")}


def script(shell: str, parsers: Mapping[str, argparse.ArgumentParser], others: Iterable[str]) -> str:
    """A script for a shell; where neither a command nor an option is wanted, the shell completes file names.

    Args:
        shell: one of ``SHELLS``.
        parsers: of each command that has its options completed.
        others: names of further commands.
    """
    text, variable = SHELLS[shell]
    options = {
        name: sorted(set(re.findall(r"(?<![\w-])-{1,2}[a-z][\w-]*", parser.format_help())))
        for name, parser in parsers.items()
    }
    cases = "\n".join(f'            {name}) {variable}="{" ".join(words)}" ;;' for name, words in options.items())
    return text.format(commands=" ".join(sorted([*parsers, *others])), options=cases)
