"""Completion of commands, options and file names in bash, from the parsers themselves."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping

SCRIPT = """\
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


def script(parsers: Mapping[str, argparse.ArgumentParser], others: Iterable[str]) -> str:
    """A script for bash; where neither a command nor an option is wanted, bash completes file names.

    Args:
        parsers: of each command that has its options completed.
        others: names of further commands.
    """
    options = {
        name: sorted(set(re.findall(r"(?<![\w-])-{1,2}[a-z][\w-]*", parser.format_help())))
        for name, parser in parsers.items()
    }
    cases = "\n".join(f'            {name}) words="{" ".join(words)}" ;;' for name, words in options.items())
    return SCRIPT.format(commands=" ".join(sorted([*parsers, *others])), options=cases)
