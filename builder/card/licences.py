"""The licences of a dataset's corpus and teacher → what its card says of them."""

import re
from typing import Any

from builder.card.markdown import plain
from builder.sources import demo

HUB_LICENSES = frozenset(
    re.findall(
        r"\S+",
        """afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
    bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0
    cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0
    cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0
    creativeml-openrail-m ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 gemma gfdl gpl gpl-2.0 gpl-3.0 isc lgpl lgpl-2.1
    lgpl-3.0 llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openrail
    openrail++ osl-3.0 pddl postgresql unlicense wtfpl zlib""",
    )
)
"""Identifiers that the Hub knows; it takes any other as `other` with a license_name."""


def licences(manifest: dict[str, Any]) -> dict[str, str | None]:
    """Licence of the `corpus` and of the `teacher`, as the recipe states it or as the embedded ones have it."""
    recipe = manifest["recipe"]
    embedded = {"corpus": demo.CORPUS_LICENSE, "teacher": demo.TEACHER_LICENSE}
    return {
        section: recipe[section].get("license")
        or (embedded[section] if recipe[section].get("embedded") else None)
        for section in embedded
    }


def licence_head(manifest: dict[str, Any]) -> dict[str, str]:
    """One licence where corpus and teacher share it and the Hub knows it, else `other` with both names."""
    found = licences(manifest)
    if not all(found.values()):
        return {}
    names = list(dict.fromkeys(str(name).lower() for name in found.values()))
    if len(names) == 1 and names[0] in HUB_LICENSES:
        return {"license": names[0]}
    return {
        "license": "other",
        "license_name": "-and-".join(names).replace("+", "-plus"),
        "license_details": f"texts: {found['corpus']}; teacher: {found['teacher']}",
    }


def licence_text(manifest: dict[str, Any]) -> str:
    """The paragraph of the card."""
    found = {section: name or "not stated" for section, name in licences(manifest).items()}
    return (
        f"The texts{'' if manifest['recipe']['output']['text'] else ' (as token ids)'} are under the licence of the "
        f"corpus: **{plain(found['corpus'])}**. The distributions are outputs of the teacher, whose licence is "
        f"**{plain(found['teacher'])}**. Whoever uses or passes on this dataset has to respect both."
    )
