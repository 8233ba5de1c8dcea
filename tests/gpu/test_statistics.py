"""Statistics on a GPU against those of the CPU, which are tested against float64, over dtypes, vocabularies and K; and draws."""

import copy

import pytest
import torch

from builder.capture import pipeline as module
from builder.capture.distribution import Distribution, capture
from builder.capture.draws import uniforms
from builder.capture.pipeline import Pipeline
from builder.teacher import precision
from builder.teacher.loading import load_teacher
from builder.teacher.model import Teacher
from logit_dataset.schema import Layout
from tests.capture.test_pipeline import assert_each_equals_alone, run
from tests.capture.test_pipeline import sequences as sequences
from tests.capture.test_pipeline import teacher as teacher
from tests.gpu.device import DEVICE, needs_cuda
from tests.teacher.test_model import make_model, random_sequences

pytestmark = pytest.mark.gpu
HALVES = (torch.bfloat16, torch.float16)
SHAPES = [
    *((49_152, 50), (49_152, 1), (49_152, 128), (49_152, 200), (50_257, 50)),
    *((151_936, 50), (262_144, 64), (64, 50), (5, 2)),
]
"""V and K: with and without kernels, V not divisible by 64, fewer entries than a block."""
ROWS = 96


def on_both(
    vocab_size: int, top_k: int, dtype: torch.dtype, draws: int
) -> tuple[Distribution, Distribution]:
    """The same logits, captured on the GPU and on the CPU; of 16 bits, with hundreds of ties in a row."""
    generator = torch.Generator().manual_seed(vocab_size + top_k)
    logits_NV = (torch.randn(ROWS, vocab_size, generator=generator) * 4).to(dtype)
    logits_NV[3, vocab_size // 2 :] = -torch.inf
    logits_NV[4] = 0.5
    logits_NV[5, vocab_size - 1] = 80
    targets_N = torch.randint(-1, vocab_size, (ROWS,), generator=generator)
    numbers_NM = uniforms(0, "doc", 0, num_positions=ROWS, count=draws) if draws else None
    options = {"top_k": top_k, "temperatures": (0.5, 2.0)}
    there = capture(
        [logits_NV.to(DEVICE)],
        targets_N.to(DEVICE),
        uniforms_NM=None if numbers_NM is None else numbers_NM.to(DEVICE),
        **options,
    )
    here = capture([logits_NV], targets_N, uniforms_NM=numbers_NM, **options)
    assert all(column.device.type == torch.device(DEVICE).type for column in there.values())
    return {name: column.cpu() for name, column in there.items()}, here


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize(("vocab_size", "top_k"), SHAPES)
def test_the_same_logits_give_the_same_values(vocab_size, top_k, dtype):
    found, expected = on_both(vocab_size, top_k, dtype, draws=0)
    assert torch.equal(found["topk_indices"], expected["topk_indices"])
    assert set(found) == set(expected)
    for name in found:
        # A last bit of a float32 sum may turn the rounding to float16 round: a step of float16 is 2⁻¹⁰.
        torch.testing.assert_close(
            found[name].double(), expected[name].double(), rtol=2**-10, atol=1e-4, equal_nan=True
        )


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("draws", [4, 24, 64, 100])
@pytest.mark.parametrize(("vocab_size", "top_k"), [(49_152, 50), (151_936, 50), (50_257, 1)])
def test_the_same_logits_give_the_same_draws(vocab_size, top_k, draws, dtype):
    found, expected = on_both(vocab_size, top_k, dtype, draws=draws)
    equal = (found["tail_indices"] == expected["tail_indices"]).float().mean()
    assert equal >= 0.999


def test_a_gpu_gives_the_rows_of_the_cpu(tiny_model, tiny_tokenizer, sequences, teacher):
    on_gpu = Teacher(copy.deepcopy(tiny_model), tiny_tokenizer, device=torch.device(DEVICE))
    _, blocks = run(on_gpu, sequences)
    assert all(block.distribution["logsumexp"].device.type == "cpu" for block in blocks)
    assert_each_equals_alone(teacher, blocks)


@needs_cuda
@pytest.mark.parametrize("top_k", [50, "all", 200])
@pytest.mark.parametrize("hidden_states", [False, True])
def test_nothing_of_a_batch_waits_for_the_gpu(
    tiny_model, tiny_tokenizer, sequences, top_k, hidden_states
):
    model = copy.deepcopy(tiny_model).to(torch.bfloat16)
    teacher = Teacher(model, tiny_tokenizer, device=torch.device(DEVICE))
    layout = Layout(
        top_k=top_k,
        tail_samples=0 if top_k == "all" else 4,
        temperatures=(2.0,),
        hidden_states=hidden_states,
        vocab_size=teacher.vocab_size,
        hidden_size=teacher.hidden_size,
    )
    pipeline = Pipeline(teacher, layout=layout, batch_tokens=4096)
    expected = module.start_copy(pipeline._capture(sequences))()  # kernels are compiled
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")  # any call that waits raises
    try:
        arrive = module.start_copy(pipeline._capture(sequences))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name, column in arrive().items():
        assert torch.equal(column, expected[name]) or column.is_floating_point()


@pytest.mark.parametrize("rows", [1, 5, 640])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_products_in_float32(dtype, rows):
    torch.manual_seed(0)
    inputs = torch.randn(rows, 576, device=DEVICE, dtype=dtype)
    weights = torch.randn(49_152, 576, device=DEVICE, dtype=dtype)
    expected = precision.by_float64(inputs, weights)
    errors = {
        product.__name__: float((product(inputs, weights).double() - expected).abs().max())
        for product in precision.products_for(inputs.device)
    }
    assert max(errors.values()) < 1e-4 * float(expected.std()), errors


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "cohere", "phi", "mamba"])
def test_logits_of_a_16_bit_teacher_are_in_float32(family, tiny_tokenizer, tmp_path):
    make_model(family).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    teacher = load_teacher(str(tmp_path), dtype="bfloat16", device=DEVICE)
    if DEVICE == "cuda":
        assert teacher._exact.product is precision.by_out_dtype
    hidden_ND = teacher.hidden(random_sequences())
    found_NV = torch.cat(list(teacher.head(hidden_ND)))
    wanted_NV = precision.with_product(
        teacher._rounded_head, teacher._exact.layer, precision.by_float64
    )(inputs_embeds=hidden_ND[None], use_cache=False).logits[0]
    assert found_NV.dtype == torch.float32
    assert float((found_NV - wanted_NV).abs().max() / wanted_NV.std()) < 1e-4
