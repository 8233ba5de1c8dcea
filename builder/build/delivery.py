"""A recipe → a tagged version on the Hub, whose shards go there while they are built.

How:  What would make publishing fail is looked at first, for a build can take weeks. An `Outbox` sends the shards to a branch of
      the repository; from it, a new machine with an empty directory resumes. When the manifest stands, `hub.publish` does the
      rest: from that branch to main and to a tag.
"""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from builder.build.branch import BRANCH, is_branch_of, is_left_over
from builder.build.build import BuildResult, build, check_pool
from builder.build.finished import changes_since, described_anew
from builder.build.outbox import Outbox
from builder.build.task import Pool
from builder.dataset.manifest import FILE_NAME, read_manifest
from builder.hub import publish as hub
from builder.hub.calls import PATIENT_SECONDS, Notice
from builder.hub.limits import MAX_LOCAL_SHARDS
from builder.hub.release import Destination, look_at, prepare
from builder.hub.repository import Repository
from builder.hub.versions import Step, Version, choose, least_step
from builder.plan.estimate import expect
from builder.plan.storage import too_large_files, too_many_files
from builder.recipe.recipe import Recipe
from builder.sources.resolve import Sources, local_teacher


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
    """Build a dataset and publish it, or resume that. Return how the build ended, and the version if it is complete.

    Args:
        recipe: what to build.
        base: directory from which the recipe's relative paths start.
        output: directory of the dataset.
        repo_id: ORG/NAME on the Hub; created if it does not exist.
        discard: delete each local shard once it is on the Hub.
        tag: a version like v1.2.3; None for the next one.
        private: whether a new repository is private.
        message: a line for the changelog.
        recompute: number of random rows for the re-scoring pass.
        device: a torch device, for these rows and, if there is no pool, for the build.
        pool: several workers that build.
        notice: called with one line that the user should know.
        options: further arguments of `build`.

    Raises:
        ValueError: the dataset cannot be built or published as asked, or the Hub fails for too long.
        OSError: the disk is full or not writable.
    """
    message = " ".join((message or "").split())
    there = look_at(repo_id, recipe.published(), private=private, message=message, notice=notice)
    there.repo.check_login()
    former, head = there.former_manifest(), there.branches.get(BRANCH)
    if former:  # so that the versions of a dataset share their rows
        recipe = recipe.with_batch_tokens(former["recipe"]["sequences"])
    if former and is_left_over(there.repo, head, former):
        there.repo.delete_branch(BRANCH)
        head = None
    if found := _published_already(there, former, recipe, base, output, tag):
        return found
    branch: str | None = BRANCH
    if (output / FILE_NAME).exists():
        result = build(recipe, base, output, notice=notice)
        if not is_branch_of(there.repo, head, read_manifest(output)):
            branch = None  # of another build, which may still be resumed
    else:
        # What it leaves open, attention and columns, is found later; till then they are what they were.
        said = former["recipe"] if former else {"corpus": {}, "teacher": {}}
        attention = said["teacher"].get("attention", "sdpa")
        as_they_were = recipe.with_columns(said["corpus"])
        if former:
            as_they_were = as_they_were.with_head_dtype(said["teacher"])
        published = as_they_were.published(attention=attention)
        _check_tag(there, tag, {"recipe": published})
        _check_count(recipe)
        if pool:
            check_pool(pool, recipe)
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
                planned=partial(_check_plan, there, recipe, tag, notice),
                notice=notice,
                **options,
            )
        finally:
            outbox.abandon()
    if result.manifest is None:
        return result, None
    plan = prepare(
        repo_id,
        output,
        tag=tag,
        private=private,
        message=message,
        branch=branch,
        notice=notice,
        waits=PATIENT_SECONDS,
    )
    commit = hub.publish(
        plan,
        recompute=recompute,
        device=device,
        teacher_path=local_teacher(recipe.teacher, base),
        notice=notice,
    )
    return result, Published(plan.version.tag, commit, is_new=not plan.is_published)


def _published_already(
    there: Destination,
    former: dict[str, Any] | None,
    recipe: Recipe,
    base: Path,
    output: Path,
    tag: str | None,
) -> tuple[BuildResult, Published] | None:
    """The highest version, if it is what the recipe asks for, and no other one is wanted.

    Raises:
        ValueError: only the description has changed, and the dataset's directory is elsewhere.
    """
    if former is None or there.former is None or tag not in (None, there.former.tag):
        return None
    if changes_since(former, recipe, base):
        return None
    if changes := described_anew(former, recipe):
        if (output / FILE_NAME).exists():
            return None
        raise ValueError(
            f"{there.repo.id} {there.former.tag} has the same data, and only the description differs ({'; '.join(changes)}); run this command, or logit-dataset publish, where the dataset's directory is"
        )
    result = BuildResult(status="built already", shards_built=0, manifest=former)
    commit = there.repo.tagged(there.former.tag)
    return result, Published(there.former.tag, commit, is_new=False)


def _check_tag(there: Destination, tag: str | None, plan: dict[str, Any]) -> Step:
    """Refuse a tag that is too small for what a plan leads to, or the recipe alone: the least step from the former version."""
    step: Step = "patch"
    reasons: list[str] = []
    if there.former:
        former = there.former_manifest()
        if former is None:
            step, reasons = "major", [f"the manifest of {there.former.tag} cannot be read"]
        else:
            step, reasons = least_step(former, {"corpus": former["corpus"], "teacher": {}, **plan})
    choose(tag, there.taken, there.former, step, reasons)
    return step


def _check_count(recipe: Recipe) -> None:
    tokens = recipe.corpus.max_tokens
    if tokens and (too_many := too_many_files(recipe, tokens)):
        raise ValueError(too_many)


def _check_plan(
    there: Destination,
    recipe: Recipe,
    tag: str | None,
    notice: Notice,
    plan: dict[str, Any],
    sources: Sources,
    is_new: bool,
) -> None:
    """What can be known once the sources are, before weeks of work: whether the tag will do, and the Hub take the files."""
    step, wanted = _check_tag(there, tag, plan), Version.parse(tag or "")
    if (
        there.former
        and wanted
        and step == "patch"
        and wanted < (more := there.former.next("minor"))
    ):
        notice(
            f"--tag {tag} is right only if the data are those of {there.former.tag}; if the build adds rows, use --tag {more.tag}"
        )
    if not is_new:
        return
    try:
        tokens, per_token = expect(recipe, sources)
    except (
        Exception
    ) as error:  # what matters of it, the build will find; a tokenizer of other code is none of it
        why = error if isinstance(error, ValueError) else type(error).__name__
        notice(f"the size of the dataset cannot be estimated ({why})")
        return
    too_large = per_token and too_large_files(recipe, tokens, per_token)
    if too_large and tokens and not recipe.output.completions_only:
        raise ValueError(too_large)
    too_many = tokens and too_many_files(recipe, tokens)
    for line in filter(None, (too_large, too_many)):
        notice(f"estimated from the first documents: {line}. The build stops if that happens")
