"""Chat templates that behave as those of models that people use, in words of our own.

What they have in common with them is said of each; none writes the same text.
"""

from tests.chats import CHATML, GEMMA, LLAMA_3, MARKED, MISTRAL, SYSTEM_DEFAULT, add_markers

TOOLS_FIRST = (
    "{% if tools %}{{ '<|im_start|>system\n' + (messages[0].content + '\n' if messages[0].role == 'system' else '') }}"
    "{% for tool in tools %}{{ tool | tojson }}{{ '\n' }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% elif messages[0].role == 'system' %}{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{% endif %}"
)
ANSWER_CALLS = (
    '{% for call in message.tool_calls or [] %}{% set f = call.function or call %}{{ \'<call>{"name": "\' + f.name + \'", "arguments": \' }}'
    "{{ f.arguments if f.arguments is string else f.arguments | tojson }}{{ '}</call>' }}{% endfor %}"
)
LAST_QUESTION = (
    "{% set ns = namespace(last=-1) %}{% for message in messages %}{% if message.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}"
)
SPLIT = (
    "{% set thought = message.reasoning_content or '' %}{% set content = message.content %}"
    "{% if not thought and '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
)

THINKS = (
    TOOLS_FIRST
    + LAST_QUESTION
    + "{% for message in messages %}{% if message.role == 'user' %}{{ '<|im_start|>user\n' + message.content + '<|im_end|>\n' }}"
    "{% elif message.role == 'tool' %}{{ '<|im_start|>user\n<result>' + message.content + '</result><|im_end|>\n' }}"
    "{% elif message.role == 'assistant' %}"
    + SPLIT
    + "{{ '<|im_start|>assistant\n' }}{% if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ content }}"
    + ANSWER_CALLS
    + "{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
"""Qwen3: a block of reasoning, be it empty, before answers to the last question only."""
THINKS_FIRST = THINKS.replace(
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}",
    "{{ '<think>\n\n</think>\n\n' }}{% else %}{{ '<think>\n' }}{% endif %}{% endif %}",
)
"""Qwen3.5: the same, and it asks with the beginning of that block."""
ASKS_TO_THINK = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}{{ message.content }}"
    "{% elif message.role == 'user' %}{{ '<header>' + message.content }}"
    "{% elif message.role == 'tool' %}{{ '<result>' + message.content + '</result>' }}"
    "{% else %}{{ '</header>' + message.content.split('</think>')[-1] }}"
    "{% for call in message.tool_calls or [] %}{{ '<call>' + call.function.name + ' ' + call.function.arguments + '</call>' }}{% endfor %}"
    "{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '</header><think>\n' }}{% endif %}"
)
"""DeepSeek R1: it drops reasoning from every answer, and asks with the beginning of one. Arguments have to be text."""
ENDS_TWICE = (
    "{% for message in messages %}{{ '<header>' + message.role + '</header>\n' + message.content + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<header>assistant</header>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
"""Phi-3: another token behind the end of a text."""
CHANNELS = (
    "{{ '<header>system</header>Today is ' + strftime_now('%Y-%m-%d') + '.<end>' }}"
    "{% for message in messages %}{% if message.role == 'assistant' %}"
    "{% if message.tool_calls %}{% set f = message.tool_calls[0].function %}"
    "{{ '<header>assistant to=' + f.name + '</header>' + f.arguments | tojson + '<call>' }}"
    "{% elif loop.last and not add_generation_prompt %}"
    "{% if message.thinking %}{{ '<header>assistant</header>thought<other>' + message.thinking + '<end>' }}{% endif %}"
    "{{ '<header>assistant</header>said<other>' + message.content + '<return>' }}"
    "{% else %}{{ '<header>assistant</header>said<other>' + message.content + '<end>' }}{% endif %}"
    "{% else %}{{ '<header>' + message.role + '</header>' + message.content + '<end>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<header>assistant' }}{% endif %}"
)
"""gpt-oss: the day, one call a message, reasoning before the last answer only, and a token of its own behind that."""
DATED = LLAMA_3.replace(
    "{{ bos_token }}",
    "{{ bos_token }}{{ '<header>system</header>\n\nToday Date: ' + strftime_now('%d %b %Y') + '<eot>' }}",
)
"""Llama 3.2."""
SORTS = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content }}"
    "{% for call in message.tool_calls or [] %}{{ call.function.name + (call.function.arguments | tojson(sort_keys=True)) }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""It sorts the keys of what a call is given."""
PARTS = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""SmolVLM, LLaVA: contents are lists of parts."""

EXTRA_TOKENS = ("<think>", "</think>", "<call>", "</call>", "<result>", "</result>", "<return>")
"""What these have besides the tokens of `chatty`."""

STEADY = {
    "chatml": CHATML,
    "system default": SYSTEM_DEFAULT,
    "llama 3": LLAMA_3,
    "mistral": MISTRAL,
    "gemma": GEMMA,
    "dated": DATED,
    "parts": PARTS,
}
"""They write each turn the same, whatever comes behind it."""
MOVING = {
    "thinks": THINKS,
    "thinks first": THINKS_FIRST,
    "asks to think": ASKS_TO_THINK,
    "ends twice": ENDS_TWICE,
    "channels": CHANNELS,
}
"""They do not."""


def _marked(source: str, *replacements: tuple[str, str]) -> str:
    for old, new in replacements:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    return source


BEGIN, END = "{% generation %}", "{% endgeneration %}"
_ENDS_TURN = (
    "{{ '<|im_end|>\n' }}{% endif %}{% endfor %}",
    f"{{{{ '<|im_end|>' }}}}{END}{{{{ '\n' }}}}{{% endif %}}{{% endfor %}}",
)
_THOUGHT = "{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ content }}"
_BY_ROLE = "{{ '<header>' + message.role + '</header>\n' + message.content + '<end>\n' }}"
ANSWERS_MARKED = {
    "chatml": MARKED["chatml"],
    "system default": add_markers(SYSTEM_DEFAULT),
    "llama 3": MARKED["llama 3"],
    "mistral": _marked(
        MISTRAL,
        ("{{ ' ' + message['content'].strip() + '<end>' }}", f"{BEGIN}{{{{ ' ' + message['content'].strip() + '<end>' }}}}{END}"),
    ),
    "gemma": _marked(
        GEMMA,
        (
            "message['role']) + '\n' + message['content'] | trim }}{{ '<end_of_turn>' }}",
            f"message['role']) + '\n' }}}}{{% if message['role'] == 'assistant' %}}{BEGIN}{{{{ message['content'] | trim }}}}"
            f"{{{{ '<end_of_turn>' }}}}{END}{{% else %}}{{{{ message['content'] | trim }}}}{{{{ '<end_of_turn>' }}}}{{% endif %}}",
        ),
    ),
    "dated": MARKED["llama 3"].replace("{{ bos_token }}", DATED.split("{% for")[0]),
    "parts": _marked(
        PARTS,
        ("{% for part in", f"{{% if message.role == 'assistant' %}}{BEGIN}{{% for part in message.content %}}{{{{ part.text }}}}{{% endfor %}}"
         f"{{{{ '<|im_end|>' }}}}{END}{{{{ '\n' }}}}{{% else %}}{{% for part in"),
        ("{% endif %}{% endfor %}{{ '<|im_end|>\n' }}", "{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}"),
    ),
    "thinks": _marked(
        THINKS,
        ("{{ '<|im_start|>assistant\n' }}{% if loop", f"{{{{ '<|im_start|>assistant\n' }}}}{BEGIN}{{% if loop"),
        _ENDS_TURN,
    ),
    "thinks first": _marked(
        THINKS_FIRST,
        (_THOUGHT, f"{{{{ '<think>\n' }}}}{BEGIN}{{{{ thought + '\n</think>\n\n' }}}}{END}{{% endif %}}{BEGIN}{{{{ content }}}}"),
        _ENDS_TURN,
    ),
    "asks to think": _marked(
        ASKS_TO_THINK,
        ("{{ '</header>' + message.content.split", f"{{{{ '</header>' }}}}{BEGIN}{{{{ message.content.split"),
        ("{{ eos_token }}{% endif %}", f"{{{{ eos_token }}}}{END}{{% endif %}}"),
    ),
    "ends twice": _marked(
        ENDS_TWICE,
        (
            _BY_ROLE,
            f"{{{{ '<header>' + message.role + '</header>\n' }}}}{{% if message.role == 'assistant' %}}{BEGIN}{{{{ message.content + '<end>' }}}}"
            f"{END}{{{{ '\n' }}}}{{% else %}}{{{{ message.content + '<end>\n' }}}}{{% endif %}}",
        ),
    ),
    "channels": _marked(
        CHANNELS,
        ("{{ '<header>assistant to=' + f.name + '</header>' + f.arguments | tojson + '<call>' }}",
         f"{{{{ '<header>assistant' }}}}{BEGIN}{{{{ ' to=' + f.name + '</header>' + f.arguments | tojson + '<call>' }}}}{END}"),
        ("{{ '<header>assistant</header>thought<other>' + message.thinking + '<end>' }}{% endif %}",
         f"{{{{ '<header>assistant' }}}}{BEGIN}{{{{ '</header>thought<other>' + message.thinking + '<end><header>assistant' }}}}{END}"
         "{% else %}{{ '<header>assistant' }}{% endif %}"),
        ("{{ '<header>assistant</header>said<other>' + message.content + '<return>' }}",
         f"{BEGIN}{{{{ '</header>said<other>' + message.content + '<return>' }}}}{END}"),
        ("{% else %}{{ '<header>assistant</header>said<other>' + message.content + '<end>' }}{% endif %}{% else %}",
         f"{{% else %}}{{{{ '<header>assistant' }}}}{BEGIN}{{{{ '</header>said<other>' + message.content + '<end>' }}}}{END}{{% endif %}}{{% else %}}"),
    ),
}  # fmt: skip
"""The same, and they mark the answers: as the authors of training templates do it, but for what the assistant is asked with."""
