"""A manifest and a release → how to cite a dataset."""

import re
from typing import Any

from builder.dataset.printable import one_line


def citation(manifest: dict[str, Any], release: dict[str, Any] | None) -> str:
    """An entry for BibTeX; of names from outside, what means nothing there or in Markdown."""
    name = _bare(manifest["recipe"]["name"])
    teacher = manifest["teacher"]
    who = _bare(teacher.get("repo") or teacher["name"])
    fields = {
        "title": f"{{{name}: distributions of {who}}}",
        "note": f"Logit dataset, fingerprint {_bare(manifest['fingerprint'])[:12]}",
    }
    if release:
        dates = [entry["date"][:4] for entry in release["changelog"]]
        fields |= {
            "author": f"{{{_bare(release['repo'].split('/')[0])}}}",
            **({"year": dates[0]} if dates and re.fullmatch("[0-9]{4}", dates[0]) else {}),
            "version": _bare(release["version"]),
            "url": f"https://huggingface.co/datasets/{release['repo']}",
        }
    key = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "logit-dataset"
    lines = "".join(f"  {field} = {{{value}}},\n" for field, value in fields.items())
    return f"@misc{{{key},\n{lines}}}"


def _bare(text: Any) -> str:
    return re.sub(r"[^\w .,:()/+-]", "", one_line(text)).strip()
