"""TRL's SFTTrainer with LoRA (pip install trl peft): python examples/train_trl.py DATASET MODEL student/

MODEL is a path or a name on the Hub, of a student that has the teacher's tokenizer.
"""

import sys

from datasets import load_dataset
from peft import LoraConfig
from torch import cuda
from trl import SFTConfig

from logit_dataset import LogitCollator
from logit_dataset.trainers import DistillationSFTTrainer

dataset, model, output = sys.argv[1:]
trainer = DistillationSFTTrainer(
    model,
    args=SFTConfig(output, learning_rate=1e-3, report_to=[], use_cpu=not cuda.is_available()),
    data_collator=LogitCollator.of(dataset),
    train_dataset=load_dataset(dataset, split="train"),
    peft_config=LoraConfig(target_modules="all-linear"),
)
trainer.train()
trainer.save_model()
