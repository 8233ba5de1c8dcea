"""What a build has asked of the Hub and read of local files → answers that a later run of the same build takes as they are.

In:   a branch or tag, a path, a teacher whose attention the recipe leaves open.
Out:  KnownSources: commits, hashes, attentions and columns, as plain values that a build keeps.

Cost: a request to the Hub for each branch or tag, and a hash of each file (about 1 GB/s), once in a build: a later run trusts an
      unchanged size and time of change.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from builder.recipe.sections import CorpusRecipe, TeacherRecipe
from builder.sources.changes import Seen, hash_file


@dataclass(slots=True)
class KnownSources:
    """What an earlier run of the same build resolved, so that resuming neither asks the Hub nor reads the files again."""

    commits: dict[str, str] = field(default_factory=dict)
    """`repo@revision` → commit."""
    hashes: dict[str, list[Any]] = field(default_factory=dict)
    """Path → [bytes, time of change in ns, sha256]."""
    attentions: dict[str, str] = field(default_factory=dict)
    """Teacher, pinned → its attention where the recipe leaves it open, so that a newer transformers does not choose another one."""
    columns: dict[str, dict[str, str]] = field(default_factory=dict)
    """Of a corpus, its columns and what they are."""

    def commit(
        self, recipe: CorpusRecipe | TeacherRecipe, repo_type: Literal["dataset", "model"]
    ) -> str:
        """The commit behind a branch or tag, asked of the Hub once in a build.

        Raises:
            ValueError: the Hub cannot be reached, or has no such repository or revision.
        """
        repo, revision = recipe.repo, recipe.revision
        assert repo
        if recipe.is_pinned:
            return revision
        key = f"{repo_type} {repo}@{revision}"
        if key not in self.commits:
            self.commits[key] = _commit_on_hub(repo, revision, repo_type)
        return self.commits[key]

    def sha256(self, path: Path) -> str:
        """The hash of a file's content."""
        known = self.hashes.get(str(path))
        if known is None or not Seen(*known).is_same(path.stat()):
            self.hashes[str(path)] = known = list(hash_file(path))
        return str(known[2])

    @property
    def seen(self) -> dict[str, Seen]:
        """The files that were hashed, by their paths."""
        return {path: Seen(*values) for path, values in self.hashes.items()}

    def forget(self, path: Path) -> None:
        """Have a file hashed again, whatever its size and time of change say."""
        self.hashes.pop(str(path), None)

    def attention(
        self,
        recipe: TeacherRecipe,
        location: str,
        config: str | None,
        provenance: dict[str, Any],
    ) -> str:
        """What computes a teacher's attention: what the recipe says, else the best that its class supports."""
        if recipe.attention:
            return recipe.attention
        key = " ".join([location, *map(str, provenance.values())])
        if key not in self.attentions:
            from builder.teacher.attention import best_attention  # which loads transformers

            self.attentions[key] = best_attention(
                location,
                commit=provenance.get("commit"),
                trust_remote_code=recipe.trust_remote_code and recipe.repo is not None,
                config=config,
            )
        return self.attentions[key]


def _commit_on_hub(repo: str, revision: str, repo_type: Literal["dataset", "model"]) -> str:
    import httpx2
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    from logit_dataset.files import first_line

    try:
        commit = HfApi().repo_info(repo, revision=revision, repo_type=repo_type).sha
    except HFValidationError:
        raise ValueError(f"{repo!r} is not a Hub {repo_type} name; expected ORG/NAME") from None
    except RepositoryNotFoundError:
        raise ValueError(
            f"the Hub has no {repo_type} {repo!r} that you can read; check the name, and log in if it is private"
        ) from None
    except RevisionNotFoundError:
        raise ValueError(f"{repo_type} {repo!r} has no revision {revision!r} on the Hub") from None
    except OfflineModeIsEnabled:
        raise ValueError(
            f"cannot reach the Hub to resolve {repo_type} {repo}@{revision} because HF_HUB_OFFLINE is set; unset it, give the full commit of a cached copy, or use local files"
        ) from None
    except (HfHubHTTPError, httpx2.HTTPError, OSError) as error:
        raise ValueError(
            f"cannot reach the Hub to resolve {repo_type} {repo}@{revision} ({first_line(error)}); "
            "check the network, or use local files"
        ) from None
    assert commit
    return commit
