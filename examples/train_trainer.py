"""Transformers' Trainer on a logit dataset: python examples/train_trainer.py out/smollm2-135m-python-docs student/"""

import sys

from datasets import load_dataset
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from logit_dataset import LogitCollator
from logit_dataset.trainers import DistillationTrainer

dataset, output = sys.argv[1:]
splits = load_dataset(dataset)
rows, held_out = splits["train"], splits.get("validation")
if held_out is None:  # a dataset without a hold-out: some whole documents, to evaluate on
    names = set(rows.unique("id")[::10])
    held_out = rows.filter(lambda id: id in names, input_columns="id")
    rows = rows.filter(lambda id: id not in names, input_columns="id")
collator = LogitCollator.of(dataset, packed=True, length=512, split_long=True)
student = LlamaConfig(vocab_size=collator.vocab_size, hidden_size=128, num_hidden_layers=2)
trainer = DistillationTrainer(
    model=LlamaForCausalLM(student),  # or one that has the teacher's tokenizer, from_pretrained
    args=TrainingArguments(output, learning_rate=2e-3, eval_strategy="epoch", report_to=[]),
    data_collator=collator,
    train_dataset=rows,
    eval_dataset=held_out,
    text_weight=0.1,
)
trainer.train()
trainer.save_model()
