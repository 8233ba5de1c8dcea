"""A recipe → a tagged version on the Hub, whose shards go there while they are built.

How:  What would make publishing fail is looked at first, for a build can take weeks. An `Outbox` sends the shards to a branch of
      the repository; from it, a new machine with an empty directory goes on. When the manifest stands, `hub.publish` does the
      rest: from that branch to main and to a tag.
"""

from pathlib import Path
from typing import Any, NamedTuple

from builder import hub
from builder.build import BuildResult, build, changes_since, check_pool, described_anew
from builder.manifest import FILE_NAME, read_manifest
from builder.outbox import BRANCH, MAX_LOCAL_SHARDS, Outbox, is_branch_of
from builder.recipe import Recipe, expand_home
from builder.release import MAX_FILES, look_at, prepare
from builder.remote import PATIENT_SECONDS, Notice, Repository
from builder.versions import choose
from builder.worker import Pool


class Published(NamedTuple):
    """A version on the Hub."""

    tag: str
    commit: str
    is_new: bool
    """Whether this call made it."""


def deliver(
    recipe: Recipe,
    base: Path,
    output: Path,
    repo_id: str,
    *,
    discard: bool = False,
    tag: str | None = None,
    private: bool = False,
    message: str | None = None,
    recompute: int = 5,
    device: str = "cpu",
    pool: Pool | None = None,
    notice: Notice,
    **options: Any,
) -> tuple[BuildResult, Published | None]:
    """Build a dataset and publish it, or go on with that: how the build ended, and the version if it is complete.

    Args:
        recipe: what to build.
        base: directory at which the recipe's relative paths start.
        output: directory of the dataset.
        repo_id: ORG/NAME on the Hub; made if it does not exist.
        discard: delete each shard here once it is on the Hub.
        tag: a version like v1.2.3; the next one by default.
        private: whether a new repository is to be private.
        message: a line for the changelog.
        recompute: random rows to run through the teacher again.
        device: a torch device, for the rows and where there is no pool.
        pool: several workers that build.
        notice: told, in a line, what the user should know.
        options: others of `build`.

    Raises:
        ValueError: it cannot be built or published as asked, or the Hub fails for too long.
        OSError: the disk is full or cannot be written.
    """
    message = " ".join((message or "").split())
    published = recipe.published()
    there = look_at(repo_id, published, private=private, message=message, notice=notice)
    there.repo.check_login()
    build_head = there.branches.get(BRANCH)
    if there.former and tag in (None, there.former.tag):
        former = there.former_manifest()
        is_out = former and not changes_since(former, recipe, base)
        if former and is_out and (changes := described_anew(former, recipe)):
            if not (output / FILE_NAME).exists():
                raise ValueError(
                    f"{repo_id} {there.former.tag} has the same data, and only the description differs ({'; '.join(changes)}); run "
                    "this where the dataset's directory is, or use logit-dataset publish there"
                )
        elif former and is_out:
            if is_branch_of(there.repo, build_head, former):
                there.repo.delete_branch(BRANCH)
            result = BuildResult(status="built already", shards_built=0, manifest=former)
            commit = there.repo.tagged(there.former.tag)
            return result, Published(there.former.tag, commit, is_new=False)
    choose(tag, there.taken, there.former, "patch", [])
    _check_count(recipe)
    if pool:
        check_pool(pool, recipe)
    branch: str | None = BRANCH
    if (output / FILE_NAME).exists():
        result = build(recipe, base, output, notice=notice)
        if not is_branch_of(there.repo, build_head, read_manifest(output)):
            branch = None  # of another build, which may still go on
    else:
        there.repo.create(private=private)
        repo = Repository(repo_id, notice, waits=PATIENT_SECONDS)
        further_workers = pool.workers - 1 if pool else 0
        outbox = Outbox(
            repo, discard=discard, max_local=MAX_LOCAL_SHARDS + further_workers, notice=notice
        )
        try:
            result = build(
                recipe,
                base,
                output,
                device=device,
                pool=pool,
                outbox=outbox,
                notice=notice,
                **options,
            )
        finally:
            outbox.abandon()
    if result.manifest is None:
        return result, None
    plan = prepare(
        repo_id, output, tag=tag, private=private, message=message, branch=branch, notice=notice
    )
    commit = hub.publish(
        plan,
        recompute=recompute,
        device=device,
        teacher_path=local_teacher(recipe, base),
        notice=notice,
    )
    return result, Published(plan.version.tag, commit, is_new=not plan.is_published)


def local_teacher(recipe: Recipe, base: Path) -> Path | None:
    """Where a recipe's teacher is, if it is a directory or file of the user's."""
    path = recipe.teacher.path or recipe.teacher.gguf
    return base / expand_home(path) if path else None


def _check_count(recipe: Recipe) -> None:
    tokens, shard_tokens = recipe.corpus.max_tokens, recipe.output.shard_tokens
    if tokens and tokens // shard_tokens + recipe.output.partitions > MAX_FILES:
        raise ValueError(
            f"{tokens:,} tokens in shards of {shard_tokens:,} are more than the {MAX_FILES:,} files that the Hub takes; "
            "choose a larger output.shard_tokens"
        )
