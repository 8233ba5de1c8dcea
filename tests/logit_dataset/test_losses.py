"""Every loss against a dense float64 computation, its gradient too; what it must not do with extreme values; its memory."""

import math
from typing import get_args

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from logit_dataset import distillation_loss, distillation_loss_from_hidden, load_logits
from logit_dataset.divergences import Loss
from logit_dataset.gather import _prepare, gather_logprobs
from logit_dataset.losses import _at_temperature
from tests.conftest import REPOSITORY

LOSSES = get_args(Loss)
B, T, V, K, J = 2, 5, 37, 6, 4


def make_batch(seed=0, *, spread=2.0, dtype=torch.float16, top_k=K):
    """A batch of a teacher with the given spread of logits, and its full float64 distribution [B, T, V]."""
    generator = torch.Generator().manual_seed(seed)
    raw = spread * torch.randn(B, T, V, generator=generator, dtype=torch.float64)
    logp = raw.log_softmax(-1)
    top = logp.topk(top_k)
    rest = logp.scatter(-1, top.indices, -torch.inf)
    tail = rest.logsumexp(-1)
    batch = {
        "input_ids": torch.randint(V, (B, T), generator=generator, dtype=torch.int32),
        "target_ids": torch.randint(V, (B, T), generator=generator, dtype=torch.int32),
        "mask": torch.tensor([[True] * T, [True] * (T - 2) + [False] * 2]),
        "topk_indices": top.indices.int(),
        "topk_logprobs": top.values.clamp(min=-65504).to(dtype),
        "tail_logprob": tail.clamp(min=-65504).to(dtype),
        "logsumexp": raw.logsumexp(-1).float(),
        "logsumexp_t2": (raw / 2).logsumexp(-1).float(),
    }
    if top_k < V:
        draws = torch.multinomial(
            rest.exp().flatten(0, 1), J, replacement=True, generator=generator
        ).view(B, T, J)
        batch["tail_indices"] = draws.int()
        batch["tail_logprobs"] = logp.gather(-1, draws).to(dtype)
    batch["target_ids"][0, 1] = batch["topk_indices"][0, 1, 2]  # one target inside the top K
    batch["target_ids"][0, 2] = -100  # one unknown
    batch["target_ids"][1, T - 2 :] = -100
    batch["mask"][0, 3] = False  # one whose token is known, but no distribution
    return batch, logp


def reference(logits, batch, kind, *, text_weight=0.0, temperature=1.0, tail_t=None):
    """The same loss from the stored numbers, in float64, position by position, with a full softmax."""
    logq_all = (logits.double() / temperature).log_softmax(-1)
    logq_text = logits.double().log_softmax(-1)
    losses, texts = [], []
    for b in range(B):
        for t in range(T):
            target = int(batch["target_ids"][b, t])
            if target >= 0:
                texts.append(-logq_text[b, t, target])
            if not batch["mask"][b, t] or (kind == "residual" and target < 0):
                continue
            ids = batch["topk_indices"][b, t].long()
            logp = batch["topk_logprobs"][b, t].double()
            p_tail = batch["tail_logprob"][b, t].double().exp()
            if temperature != 1:
                raw = logp + batch["logsumexp"][b, t].double()
                logp = raw / temperature - batch["logsumexp_t2"][b, t].double()
                p_tail = tail_t[b, t]
            p, logq = logp.exp(), logq_all[b, t]
            outside = torch.ones(V, dtype=torch.bool).index_fill(0, ids, False)
            q_tail = logq.exp()[outside].sum()
            if kind == "tail_bucket":
                loss = kl(p, logq[ids].exp()) + kl(p_tail, q_tail)
            elif kind == "tail_draws":
                draws = batch["tail_indices"][b, t].long()
                loss = -(p * logq[ids]).sum() - p_tail * logq[draws].mean()
            elif kind == "residual":
                whole = torch.zeros(V, dtype=torch.float64).index_put((ids,), p)
                whole[target] += p_tail
                loss = kl(whole, logq.exp())
            elif kind == "renormalised_top_k":
                loss = kl(p / p.sum(), logq[ids].exp())
            else:
                p_events = torch.cat([p, p_tail[None]])
                q_events = torch.cat([logq[ids].exp(), q_tail[None]])
                middle = (p_events + q_events) / 2
                loss = (
                    kl(q_events, p_events)
                    if kind == "reverse_kl"
                    else (kl(p_events, middle) + kl(q_events, middle)) / 2
                )
            losses.append(loss * temperature**2)
    distilled, text = torch.stack(losses).mean(), torch.stack(texts).mean()
    return (1 - text_weight) * distilled + text_weight * text


def kl(p, q):
    return (torch.special.xlogy(p, p) - torch.special.xlogy(p, q)).sum()


def value_and_gradient(loss, logits):
    value = loss(logits)
    (gradient,) = torch.autograd.grad(value, logits)
    return value.detach(), gradient


def student_logits(seed=1, *, spread=2.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(B, T, V, generator=generator)).to(dtype).requires_grad_()


@pytest.mark.parametrize("text_weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", LOSSES)
def test_value_and_gradient_equal_the_dense_float64_reference(kind, text_weight):
    batch, _ = make_batch()
    logits = student_logits()
    options = {"loss": kind, "text_weight": text_weight}
    value, gradient = value_and_gradient(lambda z: distillation_loss(z, batch, **options), logits)
    expected, expected_gradient = value_and_gradient(
        lambda z: reference(z, batch, kind, text_weight=text_weight), logits
    )
    assert abs(value - expected) < 1e-5
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("text_weight", [0.0, 0.3])
@pytest.mark.parametrize("kind", [kind for kind in LOSSES if kind != "tail_draws"])
def test_a_stored_temperature(kind, text_weight):
    batch, logp = make_batch(dtype=torch.float64)
    batch["logsumexp"], batch["logsumexp_t2"] = (  # unrounded: the tail at T is a difference
        batch["logsumexp"].double() * 0 + 7.0,
        (logp / 2).logsumexp(-1) + 3.5,
    )
    whole = (logp / 2).softmax(-1)
    tail_t = 1 - whole.gather(-1, batch["topk_indices"].long()).sum(-1)
    logits = student_logits()
    options = {"text_weight": text_weight, "temperature": 2.0}
    value, gradient = value_and_gradient(
        lambda z: distillation_loss(z, batch, loss=kind, **options), logits
    )
    expected, expected_gradient = value_and_gradient(
        lambda z: reference(z, batch, kind, tail_t=tail_t, **options), logits
    )
    assert abs(value - expected) < 1e-5
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("spread", [0.5, 3.0, 12.0])
def test_the_tail_at_a_temperature_is_close_even_where_it_cancels_in_float16(spread, seed):
    batch, logp = make_batch(seed, spread=spread)
    rows = torch.arange(B * T)
    head, tail = (batch[name].flatten(0, 1).float() for name in ("topk_logprobs", "tail_logprob"))
    _, tail_t = _at_temperature(batch, rows, head, tail, 2.0)
    rest = (logp / 2).scatter(-1, batch["topk_indices"].long(), -torch.inf).logsumexp(-1)
    expected = (rest - (logp / 2).logsumexp(-1)).flatten()
    assert ((tail_t.exp() - expected.exp()).abs() < 2e-3).all()
    # Never below what the stored tail at 1 makes certain: exp(r / 2 − r) of it, with r the smallest logit of the head.
    smallest = head.double().amin(-1) + batch["logsumexp"].flatten().double()
    certain = tail.double() + batch["logsumexp"].flatten() - smallest / 2
    assert (tail_t >= certain - batch["logsumexp_t2"].flatten() - 1e-3).all()
    assert (tail_t <= expected.clamp(min=math.log(2e-3)) + 1).all()


@pytest.mark.parametrize(("temperature", "apparent"), [(2.0, 1e-6), (0.5, 0.9)])
def test_the_tail_at_a_temperature_stays_within_what_the_tail_at_1_allows(temperature, apparent):
    """Where rounding left a difference 1 − Σ that cannot be: 0.6 and 0.3 are listed, and no other token has more than 0.3."""
    p, tail = torch.tensor([[0.6, 0.3]]).double(), torch.tensor([0.1]).double()
    partition = (p ** (1 / temperature)).sum(-1) / (1 - apparent)
    batch = {
        "logsumexp": torch.zeros(1, 1),
        f"logsumexp_t{temperature:g}": partition.log()[None],
    }
    head_t, tail_t = _at_temperature(batch, torch.tensor([0]), p.log(), tail.log(), temperature)
    torch.testing.assert_close(head_t.exp(), p ** (1 / temperature) / partition)
    bound = 0.1 * 0.3 ** (1 / temperature - 1) / partition
    torch.testing.assert_close(tail_t.exp(), bound)


@pytest.mark.parametrize("kind", LOSSES)
def test_gradcheck(kind):
    batch, _ = make_batch(spread=1.0)
    logits = student_logits(spread=1.0, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda z: distillation_loss(z, batch, loss=kind, text_weight=0.2), (logits,)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", LOSSES)
def test_half_precision_logits_give_the_loss_of_their_exact_values(kind, dtype):
    batch, _ = make_batch()
    logits = student_logits(dtype=dtype)
    value, gradient = value_and_gradient(lambda z: distillation_loss(z, batch, loss=kind), logits)
    expected, expected_gradient = value_and_gradient(lambda z: reference(z, batch, kind), logits)
    assert value.dtype == torch.float32
    assert abs(value - expected) < 1e-5
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-6, rtol=0.01)


def test_draws_are_unbiased_in_value_and_gradient():
    """The mean over all draws, weighted as they are drawn, is the whole cross-entropy."""
    batch, logp = make_batch(dtype=torch.float64)
    batch["target_ids"].fill_(-100)
    rest = logp.scatter(-1, batch["topk_indices"].long(), -torch.inf).softmax(-1)
    logits = student_logits(dtype=torch.float64)
    value, gradient = torch.zeros(()), torch.zeros_like(logits)
    for b, t in batch["mask"].nonzero().tolist():
        alone = {**batch, "mask": torch.zeros_like(batch["mask"])}
        alone["mask"][b, t] = True
        for token in rest[b, t].nonzero()[:, 0].tolist():
            alone["tail_indices"] = torch.full((B, T, 1), token, dtype=torch.int32)
            part = value_and_gradient(
                lambda z, alone=alone: distillation_loss(z, alone, loss="tail_draws"), logits
            )
            value = value + rest[b, t, token] * part[0]
            gradient = gradient + rest[b, t, token] * part[1]
    cross_entropy = -(logp.exp() * logits.log_softmax(-1)).sum(-1)[batch["mask"]].sum()
    assert abs(value - cross_entropy) < 1e-9
    torch.testing.assert_close(gradient, torch.autograd.grad(cross_entropy, logits)[0])


@pytest.mark.parametrize("seed", range(5))
def test_coarser_divergences_are_lower_bounds_and_vanish_at_the_truth(seed):
    batch, logp = make_batch(seed, dtype=torch.float64)
    logits = student_logits(seed + 10, dtype=torch.float64)
    logq, mask = logits.log_softmax(-1), batch["mask"]
    middle = torch.logaddexp(logp, logq) - math.log(2)
    dense = {
        "tail_bucket": (logp.exp() * (logp - logq)).sum(-1),
        "reverse_kl": (logq.exp() * (logq - logp)).sum(-1),
        "jensen_shannon": (
            (logp.exp() * (logp - middle)).sum(-1) + (logq.exp() * (logq - middle)).sum(-1)
        )
        / 2,
    }
    for kind, whole in dense.items():
        found = distillation_loss(logits, batch, loss=kind)
        assert 0 < found <= whole[mask].mean() + 1e-12
        truth = logp.clone().requires_grad_()
        value, gradient = value_and_gradient(
            lambda z, kind=kind: distillation_loss(z, batch, loss=kind), truth
        )
        assert abs(value) < 1e-12
        assert gradient.abs().max() < 1e-12
    # The renormalised target does not leave a student alone that is right.
    biased = value_and_gradient(
        lambda z: distillation_loss(z, batch, loss="renormalised_top_k"),
        logp.clone().requires_grad_(),
    )
    assert biased[1].abs().max() > 1e-3


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize(("teacher", "student"), [(30.0, 30.0), (30.0, 1.0), (1.0, 60.0)])
def test_peaked_rows_in_float32_equal_float64(kind, teacher, student):
    """Tails of 1e-30 and less, where 1 − Σ q is 0 or negative in float32."""
    batch, _ = make_batch(spread=teacher)
    logits = student_logits(spread=student)
    value, gradient = value_and_gradient(lambda z: distillation_loss(z, batch, loss=kind), logits)
    double = logits.detach().double().requires_grad_()
    expected, expected_gradient = value_and_gradient(
        lambda z: distillation_loss(z, batch, loss=kind), double
    )
    scale = max(1.0, float(expected))  # up to 60 nats, of which float32 knows seven digits
    assert abs(value - expected) < 1e-5 * scale
    torch.testing.assert_close(gradient.double(), expected_gradient, atol=1e-6 * scale, rtol=1e-4)


def test_a_tail_of_1e_40_keeps_its_logarithm_and_its_gradient():
    logits = torch.zeros(1, V)
    logits[0, :K] = 92.0
    logits.requires_grad_()
    head = torch.arange(K)[None]
    _, tail, _ = gather_logprobs(logits, torch.tensor([0]), head, head[:, :0])
    expected = math.log(V - K) - 92 - math.log(K)
    assert abs(tail.item() - expected) < 1e-4
    (gradient,) = torch.autograd.grad(tail.sum(), logits)
    torch.testing.assert_close(gradient[0, K:], torch.full((V - K,), 1 / (V - K)))
    torch.testing.assert_close(gradient[0, :K], torch.full((K,), -1 / K))


@pytest.mark.parametrize("kind", LOSSES)
def test_no_mass_makes_no_nan(kind):
    """−65504 (that is −∞) in the head and the tail, a student that rules tokens out too, and nothing in the tail at all."""
    batch, _ = make_batch()
    batch["topk_logprobs"][0, 0, 1:] = -65504
    batch["topk_logprobs"][0, 0, 0] = 0
    batch["tail_logprob"][0, 0] = -65504
    batch["topk_indices"][0, 1, 3:] = -1  # empty places, as a projection leaves them
    batch["topk_logprobs"][0, 1, 3:] = -65504
    logits = student_logits().detach()
    logits[0, 0] = -torch.inf  # all but the one that the teacher is sure of
    logits[0, 0, int(batch["topk_indices"][0, 0, 0])] = 1.0
    batch["target_ids"][0, 0] = batch["topk_indices"][0, 0, 0]
    logits.requires_grad_()
    value, gradient = value_and_gradient(lambda z: distillation_loss(z, batch, loss=kind), logits)
    assert value.isfinite()
    assert gradient.isfinite().all()
    assert not gradient[0, 0].any()  # that position is right


@pytest.mark.parametrize("kind", LOSSES)
def test_a_position_where_nothing_is_listed_is_finite(kind):
    """As a projection onto another tokenizer leaves it, where it finds a place for none of the top K."""
    batch, _ = make_batch()
    batch["topk_indices"][0, 0], batch["topk_logprobs"][0, 0] = -1, -65504
    batch["tail_logprob"][0, 0] = 0
    value, gradient = value_and_gradient(
        lambda z: distillation_loss(z, batch, loss=kind), student_logits()
    )
    assert value.isfinite()
    assert gradient.isfinite().all()
    if kind == "renormalised_top_k":  # of no list nothing can be learned
        assert not gradient[0, 0].any()


@pytest.mark.parametrize("kind", [kind for kind in LOSSES if kind != "tail_draws"])
def test_a_head_that_is_the_whole_vocabulary(kind):
    batch, logp = make_batch(dtype=torch.float64, top_k=V)
    logits = student_logits(dtype=torch.float64)
    value, gradient = value_and_gradient(lambda z: distillation_loss(z, batch, loss=kind), logits)
    assert value.isfinite()
    assert gradient.isfinite().all()
    if kind == "tail_bucket":
        whole = (logp.exp() * (logp - logits.log_softmax(-1))).sum(-1)
        assert abs(value - whole[batch["mask"]].mean()) < 1e-12


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
@pytest.mark.parametrize("kind", [kind for kind in LOSSES if kind != "tail_draws"])
def test_whole_distributions_make_every_loss_the_dense_one_at_any_temperature(kind, temperature):
    batch, logp = make_batch(dtype=torch.float64)
    for name in ("topk_indices", "topk_logprobs", "tail_logprob", "logsumexp_t2"):
        del batch[name]
    batch["logprobs"] = logp
    logits = student_logits(dtype=torch.float64)

    def dense(z):
        p = (logp / temperature).softmax(-1)
        q = (z / temperature).softmax(-1)
        mixture = (p + q) / 2
        loss = {
            "reverse_kl": (q * (q / p).log()),
            "jensen_shannon": (p * (p / mixture).log() + q * (q / mixture).log()) / 2,
        }.get(kind, p * (p / q).log())
        counts = batch["mask"] & (batch["target_ids"] >= 0) if kind == "residual" else batch["mask"]
        return temperature**2 * loss.sum(-1)[counts].mean()

    options = {"loss": kind, "temperature": temperature}
    found = value_and_gradient(lambda z: distillation_loss(z, batch, **options), logits)
    for ours, reference_ in zip(found, value_and_gradient(dense, logits), strict=True):
        torch.testing.assert_close(ours, reference_, rtol=0, atol=1e-10)
    head = torch.nn.Linear(V, V, bias=False, dtype=torch.float64)
    torch.nn.init.eye_(head.weight)
    from_hidden = distillation_loss_from_hidden(logits, head, batch, **options)
    torch.testing.assert_close(from_hidden, found[0], rtol=0, atol=1e-10)


def test_draws_are_refused_where_there_is_no_tail():
    batch, logp = make_batch()
    batch["logprobs"] = logp
    with pytest.raises(ValueError, match="use loss 'tail_bucket', which is the exact KL"):
        distillation_loss(student_logits(), batch, loss="tail_draws")


@pytest.mark.parametrize("kind", LOSSES)
def test_padding_has_no_say(kind):
    batch, _ = make_batch()
    logits = student_logits()
    before = distillation_loss(logits, batch, loss=kind, text_weight=0.5)
    changed = {name: values.clone() for name, values in batch.items()}
    for name in ("topk_indices", "topk_logprobs", "tail_logprob", "tail_indices"):
        changed[name][1, T - 2 :] = 0
    other = logits.detach().clone()
    other[1, T - 2 :] = torch.nan
    other.requires_grad_()
    value, gradient = value_and_gradient(
        lambda z: distillation_loss(z, changed, loss=kind, text_weight=0.5), other
    )
    assert value == before
    assert not gradient[1, T - 2 :].any()


def test_a_batch_of_nothing_but_padding_is_zero_with_a_zero_gradient():
    batch, _ = make_batch()
    batch["mask"][:] = False
    batch["target_ids"][:] = -100
    for num_positions in (None, 0, torch.tensor(0)):
        options = {"text_weight": 0.5, "num_positions": num_positions}
        value, gradient = value_and_gradient(
            lambda z, options=options: distillation_loss(z, batch, **options), student_logits()
        )
        assert value == 0
        assert not gradient.any()
    hidden, head = torch.randn(B, T, 8, requires_grad=True), torch.nn.Linear(8, V)
    value = distillation_loss_from_hidden(hidden, head, batch)
    assert value == 0
    value.backward()
    for part in (hidden, *head.parameters()):  # not None, for which DDP would wait
        assert not part.grad.any()


@pytest.mark.parametrize("kind", LOSSES)
def test_under_autocast_the_loss_is_float32_of_the_same_logits(kind):
    batch, _ = make_batch()
    hidden, head = torch.randn(B, T, 8), torch.nn.Linear(8, V)
    options = {"loss": kind, "text_weight": 0.2}
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(hidden)
        found = [
            distillation_loss(logits, batch, **options),
            distillation_loss_from_hidden(hidden, head, batch, **options),
        ]
    assert logits.dtype == torch.bfloat16
    expected = reference(logits, batch, kind, text_weight=0.2)
    for value in found:
        assert value.dtype == torch.float32
        assert abs(value - expected) < 1e-5


@pytest.mark.filterwarnings("ignore")
def test_compiled_it_is_the_same():
    """There are breaks in its graph, and no errors; the backend is of no matter to that."""
    batch, _ = make_batch()
    logits = student_logits()

    def loss(z):
        return distillation_loss(z, batch, text_weight=0.2)

    found = value_and_gradient(torch.compile(loss, backend="eager"), logits)
    for ours, expected in zip(found, value_and_gradient(loss, logits), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("kind", LOSSES)
def test_from_hidden_states_it_is_the_same(kind, monkeypatch):
    monkeypatch.setattr("logit_dataset.losses.HEAD_CHUNK_POSITIONS", 3)
    batch, _ = make_batch()
    torch.manual_seed(3)
    hidden, head = torch.randn(B, T, 8, requires_grad=True), torch.nn.Linear(8, V)
    inputs = (hidden, *head.parameters())
    options = {"loss": kind, "text_weight": 0.25}
    whole = distillation_loss(head(hidden), batch, **options)
    chunked = distillation_loss_from_hidden(hidden, head, batch, **options)
    assert abs(whole - chunked) < 1e-6
    for found, expected in zip(
        torch.autograd.grad(chunked, inputs), torch.autograd.grad(whole, inputs), strict=True
    ):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_sums_of_accumulated_batches_equal_the_mean_of_one():
    batch, _ = make_batch()
    logits = student_logits()
    parts = [{name: values[b : b + 1] for name, values in batch.items()} for b in range(B)]
    total = sum(
        distillation_loss(logits[b : b + 1], parts[b], num_positions=int(batch["mask"].sum()))
        for b in range(B)
    )
    assert abs(total - distillation_loss(logits, batch)) < 1e-6


class LargestTensors(TorchDispatchMode):
    """Counts tensors of at least `elements` elements that operations allocate (views do not)."""

    def __init__(self, elements):
        super().__init__()
        self.elements, self.known, self.made = elements, set(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, torch.Tensor) or tensor.numel() < self.elements:
                continue
            address = tensor.untyped_storage().data_ptr()
            if address not in self.known:
                self.known.add(address)
                self.made.append(str(func))
        return out


@pytest.mark.parametrize("from_hidden", [False, True])
def test_no_second_tensor_of_the_size_of_the_logits_is_made(from_hidden, monkeypatch):
    monkeypatch.setattr("logit_dataset.gather.CHUNK_BYTES", 4 * V * 2)
    monkeypatch.setattr("logit_dataset.losses.HEAD_CHUNK_POSITIONS", 2)
    batch, _ = make_batch()
    head = torch.nn.Linear(8, V)
    hidden = torch.randn(B, T, 8, requires_grad=True)
    logits = student_logits()
    watch = LargestTensors(B * T * V)
    watch.known.add(logits.untyped_storage().data_ptr())
    with watch:
        if from_hidden:
            distillation_loss_from_hidden(hidden, head, batch, text_weight=0.5).backward()
        else:
            distillation_loss(logits, batch, text_weight=0.5).backward()
    assert len(watch.made) == (0 if from_hidden else 1), watch.made  # the gradient itself


def test_what_is_refused():
    batch, _ = make_batch()
    logits = student_logits()
    without = {name: v for name, v in batch.items() if not name.startswith("tail_i")}
    small = logits[..., :10]
    with pytest.raises(ValueError, match="loss is 'kl', expected one of tail_bucket"):
        distillation_loss(logits, batch, loss="kl")
    with pytest.raises(ValueError, match="text_weight is 2, expected 0 to 1"):
        distillation_loss(logits, batch, text_weight=2)
    with pytest.raises(ValueError, match="needs the column tail_indices"):
        distillation_loss(logits, without, loss="tail_draws")
    with pytest.raises(ValueError, match=r"temperature 1.5 was not stored .*stored: logsumexp_t2"):
        distillation_loss(logits, batch, temperature=1.5)
    with pytest.raises(ValueError, match="the draws were made at 1"):
        distillation_loss(logits, batch, loss="tail_draws", temperature=2.0)
    with pytest.raises(ValueError, match="but the student has 10 logits"):
        distillation_loss(small, batch)
    with pytest.raises(ValueError, match=r"the batch has no mask, target_ids; take it from load_"):
        distillation_loss(logits, {"input_ids": batch["input_ids"]})
    with pytest.raises(ValueError, match=r"logits have shape \(2, 4, 37\), but the batch \(2, 5\)"):
        distillation_loss(logits[:, 1:], batch)
    with pytest.raises(ValueError, match=r"logits have shape \(5, 2, 37\), but the batch \(2, 5\)"):
        distillation_loss(logits.transpose(0, 1), batch)  # as many positions, in another order
    with pytest.raises(ValueError, match=r"hidden states have shape \(2, 4, 37\), but the batch"):
        distillation_loss_from_hidden(logits[:, 1:], torch.nn.Identity(), batch)


def test_the_first_id_too_many_is_out_of_bounds_where_nothing_looks_before():
    """`other`, for a student that was made without it: on a GPU it must not pass for an empty place."""
    logits, rows = torch.zeros(1, V), torch.tensor([0])
    none, empty, beyond = (torch.tensor([[i]], dtype=torch.int32) for i in (0, -1, V))
    padded_CV, head_CK, other_CJ = _prepare(logits, rows, empty, beyond, 1.0)
    assert padded_CV.gather(1, head_CK) == -torch.inf
    with pytest.raises(RuntimeError, match="out of bounds"):
        padded_CV.gather(1, other_CJ)
    assert _prepare(logits, rows, none, none, 1.0)[1] == 0


def test_the_graph_breaks_of_a_compiled_loss_are_as_many_as_the_docs_say(built):
    import torch._dynamo

    batch = next(iter(load_logits(built).batches(batch_size=2)))
    logits = torch.randn(*batch["input_ids"].shape, 448, requires_grad=True)
    torch._dynamo.reset()
    found = torch._dynamo.explain(distillation_loss)(logits, batch)
    assert found.graph_break_count == 7
    text = (REPOSITORY / "docs" / "training.md").read_text(encoding="utf-8")
    assert "breaks the graph seven times" in text
