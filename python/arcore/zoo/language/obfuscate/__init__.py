"""ObscuraCoder: a code model trained on code and its obfuscated form, both ways (Paul et al., arXiv:2504.00019).

Obfuscation renames functions, classes, variables, arguments and imports to FUNC_i, CLASS_i, VAR_i and IMPORT_i, each
name to one everywhere in its file, so the code does the same and says less. Texts of training are, in equal shares,
source then obfuscated, obfuscated then source, source alone, and obfuscated alone; the model is an ordinary causal one
(`llama`) and nothing is masked. What it learns of names serves to give obfuscated code readable ones again: here the
code's other text is forced and only names are written, so what comes out always is the given program.

Python is renamed by its own `ast`; C, JavaScript, Java and Go by tree-sitter's grammars (extra `code`), more carefully:
only names that nothing outside of the file's identifiers can mean. Left out: the paper's other languages.

Nearest neighbour here: `llama`, trained on text.
"""

from __future__ import annotations

from typing import Any

from arcore.catalog import System

SYSTEM = System(
    name="obfuscate",
    title="ObscuraCoder",
    paper="arXiv:2504.00019",
    paper_title="ObscuraCoder: Powering Efficient Code LM Pre-Training Via Obfuscation Grounding",
    topic="language",
    kind="model",
    model="ObscuraCoder",
    builds_on=("llama",),
    ops=("block_sparse_attention", "sample"),
    recipe="own",
    summary="Renames the identifiers of code consistently, learns from both forms, and gives names again.",
    claim=(
        "All modules of the standard library compile after obfuscation and come back by the inverse map; with pairs in "
        "training, names of held-out functions are no harder to predict than from source alone."
    ),
    checked_on="real data",
    aliases=("obscura",),
)


def __getattr__(name: str) -> Any:
    # The recipe needs the packages for training; the network does not.
    if name == "RECIPE":
        from arcore.zoo.language.obfuscate.recipe import RECIPE

        return RECIPE
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
