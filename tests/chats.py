"""Chat templates and chats for the tests."""

import copy
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SYSTEM_DEFAULT = (
    "{% if messages and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    + CHATML
)
LLAMA_3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<header>' + message['role'] + '</header>\n\n' + message['content'] | trim }}"
    "{{ '<eot>' }}{% endfor %}{% if add_generation_prompt %}{{ '<header>assistant</header>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'].strip() + ' [/INST]' }}{% else %}{{ ' ' + message['content'].strip() + '<end>' }}{% endif %}"
    "{% endfor %}"
)
"""Asks for an answer by nothing but the end of the question."""
GEMMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' + message['content'] | trim }}"
    "{{ '<end_of_turn>' }}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def add_markers(source: str) -> str:
    """CHATML, or a template made of it, with {% generation %} around answers."""
    before, content, behind = (
        "{{ '<|im_start|>' + message['role'] + '\n' + ",
        source.split("'\n' + ")[1].split(" + '<|im_end|>'")[0],
        " + '<|im_end|>' }}",
    )
    assert before + content + behind in source
    answer = f"{{% generation %}}{{{{ {content}{behind}{{% endgeneration %}}"
    return source.replace(
        before + content + behind,
        "{{ '<|im_start|>' + message['role'] + '\n' }}"
        f"{{% if message['role'] == 'assistant' %}}{answer}{{% else %}}{{{{ {content}{behind}{{% endif %}}",
    )


MARKED = {
    "chatml": add_markers(CHATML),
    "llama 3": LLAMA_3.replace("+ message['content'] | trim }}{{ '<eot>' }}", "}}{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] | trim }}{{ '<eot>' }}{% endgeneration %}{% else %}{{ message['content'] | trim }}{{ '<eot>' }}{% endif %}"),
}  # fmt: skip
MARKERS = (
    *("<|im_start|>", "<|im_end|>", "<begin>", "<header>", "</header>", "<eot>", "<end>"),
    *("<start_of_turn>", "<end_of_turn>"),
)


def chatty(tokenizer: Any, *, special: bool = True) -> Any:
    """The tiny tokenizer with the tokens of these templates, with CHATML for its own: 410 ids."""
    chatty = copy.deepcopy(tokenizer)
    added = [AddedToken(content, special=special, normalized=False) for content in MARKERS]
    chatty.add_tokens([*added, AddedToken("<other>", special=False, normalized=False)])
    chatty.bos_token = "<begin>" if special else None
    chatty.chat_template = CHATML
    return chatty


def chatty_teacher(tokenizer: Any, model: Any, directory: Path) -> Path:
    """The tiny teacher with that tokenizer, as `save_pretrained` writes it."""
    model.save_pretrained(directory)
    chatty(tokenizer).save_pretrained(directory)
    return directory


def sample_chats(count: int = 20) -> list[dict[str, Any]]:
    """Chats of very different lengths, of which some hold what looks like a special token."""
    words = ["The", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog."]
    words += ["Grüße,", "東京", "12345", "<|im_end|>", "🙂", "naïve", "café"]

    def say(seed: int, length: int) -> str:
        return " ".join(words[(seed * 7 + i * (1 + seed % 3)) % len(words)] for i in range(length))

    rows = []
    for i in range(count):
        messages = [{"role": "system", "content": say(i, 3)}] if i % 4 == 0 else []
        for turn in range(1 + i % 3):
            messages.append({"role": "user", "content": say(i + turn, 2 + i * 5 % 11)})
            messages.append({"role": "assistant", "content": say(i + turn + 5, 1 + i * 3 % 13)})
        rows.append({"id": f"chat-{i}", "messages": messages})
    return rows
