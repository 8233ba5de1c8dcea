"""`Reach`: which lengths may share a batch, by the configurations that people have; and what models remember of earlier batches."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING

from builder.corpus.sequences import length_sorted_batches
from builder.teacher.lengths import ANY, ANYWHERE, Reach, reach_of
from builder.teacher.loading import load_teacher
from tests.architectures import documents
from tests.tiny_models import (
    BORDER,
    VARIANTS,
    VOCAB_SIZE,
    small_tokenizer,
    tiny_config,
    tiny_model,
)


def reach_of_config(model_type: str, **fields: Any) -> Reach:
    return reach_of(SimpleNamespace(config=CONFIG_MAPPING[model_type](**fields)))


def test_a_border_parts_lengths_and_beyond_a_limit_only_equal_ones_are_together():
    reach = Reach(borders=(10, 20), exact_beyond=30)
    assert [reach(n) for n in (1, 10, 11, 20, 21, 30, 31, 32)] == [10, 10, 20, 20, 30, 30, 31, 32]
    assert Reach(borders=(10,))(11) == ANYWHERE(1) == ANY
    assert [Reach(exact_beyond=0)(n) for n in (1, 2)] == [1, 2]
    for _ in range(50):
        lengths = torch.randint(1, 40, (30,)).tolist()
        for batch in length_sorted_batches(lengths, 100, reach):
            found = [lengths[i] for i in batch]
            assert reach(max(found)) == reach(min(found)) >= max(found)
        batches = length_sorted_batches(lengths, 100, ANYWHERE)
        assert batches == length_sorted_batches(lengths, 100)


FACTORS = {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
PHI3 = {
    **{"hidden_size": 3072, "num_attention_heads": 32, "max_position_embeddings": 131_072},
    "original_max_position_embeddings": 4096,
}
LONGROPE, DYNAMIC = Reach(borders=(4096,)), Reach(exact_beyond=2048)


@pytest.mark.parametrize(
    ("model_type", "fields", "expected"),
    [
        ("llama", {}, ANYWHERE),
        ("gpt2", {}, ANYWHERE),
        ("mamba2", {}, ANYWHERE),
        ("phi3", {"max_position_embeddings": 4096}, ANYWHERE),
        # As Phi-3-mini-128k writes it, and as transformers does.
        ("phi3", {**PHI3, "rope_scaling": {"type": "longrope", **FACTORS}}, LONGROPE),
        ("phi3", {**PHI3, "rope_parameters": {"rope_type": "longrope", **FACTORS}}, LONGROPE),
        # Of llama3's and YaRN's scaling, the frequencies are always the same.
        (
            "llama",
            {
                "rope_scaling": {
                    **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0},
                    **{"high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
                }
            },
            ANYWHERE,
        ),
        (
            "qwen2",
            {
                "rope_scaling": {
                    **{"rope_type": "yarn", "factor": 4.0},
                    "original_max_position_embeddings": 32_768,
                }
            },
            ANYWHERE,
        ),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, DYNAMIC),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, DYNAMIC),
        ("deepseek_v3", {}, ANYWHERE),
        ("deepseek_v32", {}, Reach(exact_beyond=2048)),
        ("glm_moe_dsa", {"index_topk": 1024}, Reach(exact_beyond=1024)),
        ("deepseek_v4", {}, Reach(exact_beyond=4 * 512)),
        ("doge", {}, Reach(exact_beyond=2048)),
    ],
)
def test_what_a_configuration_says(model_type, fields, expected):
    assert reach_of_config(model_type, **fields) == expected


def test_a_border_is_found_wherever_it_stands():
    """Nested, by kinds of layers, and in the fields of code that is not transformers' own."""
    gemma = {
        "max_position_embeddings": 32_768,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default"},
            "full_attention": {
                **{"rope_type": "longrope", "original_max_position_embeddings": 8192},
                **{"short_factor": [1.0], "long_factor": [2.0]},
            },
        },
    }

    def of(values: dict[str, Any]) -> Reach:
        config = SimpleNamespace(model_type="theirs", to_dict=lambda: values)
        return reach_of(SimpleNamespace(config=config))

    assert of(gemma) == Reach(borders=(8192,))
    assert of({"text_config": gemma, "vision_config": {}}) == Reach(borders=(8192,))
    minicpm = {
        "max_position_embeddings": 32_768,
        "original_max_position_embeddings": 4096,
        "rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.1]},
    }
    assert of(minicpm) == Reach(borders=(4096,))
    assert of({**minicpm, "text_config": {"index_topk": 64}}) == Reach(
        borders=(4096,), exact_beyond=64
    )
    phi3_first = {**minicpm, "rope_scaling": {"type": "su", "short_factor": [1.0]}}
    assert of(phi3_first) == Reach(borders=(4096,))
    assert of({"index_topk": None, "rope_scaling": None}) == ANYWHERE


def test_models_that_say_something_else_each_time_are_refused():
    with pytest.raises(ValueError, match=r"attends within buckets .* use another teacher"):
        reach_of_config("reformer", is_decoder=True)
    assert reach_of_config("reformer", is_decoder=True, attn_layers=["local"]) == ANYWHERE
    with pytest.raises(ValueError, match=r'set attention_type to "original_full"'):
        reach_of_config("big_bird", is_decoder=True)
    assert reach_of_config("big_bird", attention_type="original_full") == ANYWHERE


@pytest.mark.parametrize("name", ["llama+dynamic", "gemma3_text+dynamic"])
def test_a_teacher_forgets_the_lengths_of_earlier_batches(name, tmp_path):
    """transformers keeps the frequencies for the longest batch so far, and for one of just the border's length always."""
    model_type, changes = VARIANTS[name]
    tiny_model(tiny_config(model_type, **changes)).save_pretrained(tmp_path)
    small_tokenizer().save_pretrained(tmp_path)
    long, short = torch.randint(VOCAB_SIZE, (40,)).tolist(), documents()[0]
    for length in (BORDER - 1, BORDER, BORDER + 1, 33):
        fresh, used = load_teacher(str(tmp_path)), load_teacher(str(tmp_path))
        list(used.logits([long]))
        found, expected = (
            torch.cat(list(teacher.logits([short[:length]]))) for teacher in (used, fresh)
        )
        assert torch.equal(found, expected), length
        whole, once_more = (fresh._whole(torch.tensor([ids]))[0] for ids in (long, short[:length]))
        assert len(whole) == 40
        torch.testing.assert_close(once_more, expected, atol=1e-4, rtol=0)
